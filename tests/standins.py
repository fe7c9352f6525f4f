"""Batch norm layers in the manner of other libraries, which the tests do not install."""

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
