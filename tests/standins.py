"""Batch norm layers in the manner of other libraries, which are not installed; and models."""

import torch
from torch import nn
from torch.nn import functional as F


class BatchNormAct2d(nn.BatchNorm2d):
    """Normalises, and applies `drop` and `act`: as in timm."""

    def __init__(self, num_features, act=nn.ReLU, drop=nn.Identity, inplace=True, **options):
        super().__init__(num_features, **options)
        self.drop = drop()
        self.act = act(inplace=True) if inplace and act is not nn.Identity else act()

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected 4D input")
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        update = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if update else None,
            self.running_var if update else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            momentum,
            self.eps,
        )
        return self.act(self.drop(x))


class SyncBatchNormAct(nn.SyncBatchNorm):
    """As timm's."""

    def forward(self, x):
        x = super().forward(x)
        if hasattr(self, "act"):
            x = self.act(x)
        return x


class FrozenBatchNorm2d(nn.Module):
    """Never trains: as in torchvision, where eps is an attribute."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x):
        weight, bias, mean, var = (
            buffer.reshape(1, -1, 1, 1)
            for buffer in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class FrozenBatchNorm1d(FrozenBatchNorm2d):
    """The same for (samples, channels)."""

    def forward(self, x):
        return (x - self.running_mean) * (
            self.running_var + self.eps
        ).rsqrt() * self.weight + self.bias


class DetrFrozenBatchNorm2d(FrozenBatchNorm2d):
    """As in transformers, where eps is a number in `forward`."""

    def __init__(self, num_features):
        super().__init__(num_features)
        del self.eps

    def forward(self, x):
        weight, bias, mean, var = (
            buffer.reshape(1, -1, 1, 1)
            for buffer in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """As timm's."""

    def __init__(self, num_features, act=nn.ReLU):
        super().__init__(num_features)
        self.drop = nn.Identity()
        self.act = act()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class AnyRank(nn.BatchNorm1d):
    """What many libraries have for inputs of any rank."""

    def __init__(self, channels, **options):
        super().__init__(channels, **options)
        self.note = "kept"

    @classmethod
    def of(cls, other):
        return cls(other.num_features)

    def _check_input_dim(self, x):
        pass


def act(activation, **options):
    return lambda channels: BatchNormAct2d(channels, act=activation, **options)


#: What makes a layer, the rank of its input, and what its activation becomes.
TRAINS = {
    "1d": (nn.BatchNorm1d, 2, None),
    "1d, sequence": (nn.BatchNorm1d, 3, None),
    "2d": (nn.BatchNorm2d, 4, None),
    "3d": (nn.BatchNorm3d, 5, None),
    "average": (lambda c: nn.BatchNorm2d(c, momentum=None), 4, None),
    "no affine": (lambda c: nn.BatchNorm2d(c, eps=0.1, affine=False), 4, None),
    "no statistics": (lambda c: nn.BatchNorm2d(c, track_running_stats=False), 4, None),
    "derived": (AnyRank, 4, None),
    "relu": (act(nn.ReLU), 4, "relu"),
    "relu, average": (act(nn.ReLU, momentum=None), 4, "relu"),
    "leaky relu": (act(nn.LeakyReLU), 4, "leaky_relu"),
    "steeper": (act(lambda inplace: nn.LeakyReLU(0.1, inplace)), 4, nn.LeakyReLU),
    "silu in place": (act(nn.SiLU), 4, nn.SiLU),
    "prelu": (act(nn.PReLU, inplace=False), 4, nn.PReLU),
    "identity": (act(nn.Identity), 4, None),
    "dropout": (act(nn.Identity, drop=nn.Dropout), 4, nn.Dropout),
}
EVALUATES = {
    "sync": (nn.SyncBatchNorm, 3, None),
    "sync, relu": (SyncBatchNormAct, 4, "relu"),
    "torchvision": (FrozenBatchNorm2d, 4, None),
    "detectors": (lambda c: FrozenBatchNorm2d(c, eps=0.0), 4, None),
    "eps 0": (lambda c: nn.BatchNorm2d(c, eps=0.0), 4, None),
    "transformers": (DetrFrozenBatchNorm2d, 4, None),
    "frozen, silu": (lambda c: FrozenBatchNormAct2d(c, nn.SiLU), 4, nn.SiLU),
    "frozen, relu": (FrozenBatchNormAct2d, 4, "relu"),
}
SIZES = (6, 3, 4, 2, 5)


def made(kind):
    """A model with one layer twice and another once, and an input for it."""
    make, rank, _ = (TRAINS | EVALUATES)[kind]
    shared, other = make(3), make(3)
    if kind == "sync, relu":
        shared.act, other.act = nn.ReLU(), nn.ReLU()
    model = nn.Sequential(shared, other, shared)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return model, torch.randn(SIZES[:rank]) * 2 + 1


def gradient(model, x, cotangent):
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # of a dropout
    y = model(x)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    return y.detach(), *torch.autograd.grad(y, inputs, cotangent)


def assert_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        # Three layers of a dozen roundings each, to 2⁻²⁴; sums of 144 products of size 1.
        torch.testing.assert_close(a, b, rtol=2e-5, atol=5e-5)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}
