"""What BatchNorm cannot stand for is refused by name, and then nothing has been changed."""

import types

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from batchnorm import ArgumentError, BatchNorm, Renorm, accumulate_statistics, convert
from standins import BatchNormAct2d, FrozenBatchNorm1d, FrozenBatchNorm2d


class Scaled(nn.BatchNorm2d):
    """Computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class ChannelsLast(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Clipped(nn.BatchNorm2d):
    """Computes the same, and can do more."""

    def clip(self):
        self.weight.data.clamp_(min=0.1)


class Still(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


class Gated(BatchNormAct2d):
    """An attribute that changes nothing now, and may later."""

    def __init__(self, channels):
        super().__init__(channels)
        self.gate = 1.0

    def forward(self, x):
        return self.gate * super().forward(x)


class Above(Gated):
    def forward(self, x):
        return super().forward(x)


class Masked(BatchNormAct2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("alive", torch.ones(channels, 1, 1))

    def forward(self, x):
        return super().forward(x) * self.alive


class Before(BatchNormAct2d):
    """The activation comes first."""

    def forward(self, x):
        return nn.BatchNorm2d.forward(self, self.act(x))


class Absolute(BatchNormAct2d):
    """|γ|, as in-place activated batch norm has it."""

    def forward(self, x):
        y = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight.abs(), self.bias, self.training
        )
        return self.act(y)


class Biased(BatchNormAct2d):
    """The running variance takes in the biased one."""

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
            with torch.no_grad():
                self.running_mean.lerp_(x.mean((0, 2, 3)), 0.1)
                self.running_var.lerp_(x.var((0, 2, 3), correction=0), 0.1)
            return self.act(
                nn.functional.batch_norm(x, None, None, self.weight, self.bias, True, 0, self.eps)
            )
        return super().forward(x)


class Split(nn.BatchNorm2d):
    """Clean and adversarial examples apart: as timm's."""

    def __init__(self, channels):
        super().__init__(channels)
        self.others = nn.ModuleList([nn.BatchNorm2d(channels)])

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        first, second = x.chunk(2)
        return torch.cat([super().forward(first), self.others[0](second)])


class OtherEpsBatchNorm(FrozenBatchNorm2d):
    """The attribute says 1e-5."""

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-3).rsqrt()
        return (x - self.running_mean[:, None, None]) * scale[:, None, None] + self.bias[
            :, None, None
        ]


class OutsideBatchNorm(FrozenBatchNorm2d):
    """eps is added to the root, which shows where the variance is small."""

    def forward(self, x):
        scale = self.weight / (self.running_var.sqrt() + self.eps)
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class Slotted(nn.BatchNorm2d):
    __slots__ = ("extra",)


def both(channels):
    layer = BatchNormAct2d(channels, act=nn.SiLU)
    layer.drop = nn.Dropout()
    return layer


def hooked(channels):
    layer = BatchNormAct2d(channels)
    layer.drop.register_forward_hook(lambda *_: None)
    return layer


def replaced(channels):
    layer = nn.BatchNorm2d(channels)
    layer.forward = types.MethodType(lambda self, x: x, layer)
    return layer


def parametrized(channels):
    layer = nn.BatchNorm2d(channels)
    layer.weight.data = torch.ones(channels, 1)
    weight_norm(layer)
    return layer


def with_attribute(name, value):
    def make(channels):
        layer = nn.BatchNorm2d(channels)
        setattr(layer, name, value)
        return layer

    return make


REFUSED = {
    "forward": (Scaled, r"Scaled at '1': BatchNorm would lose its class's own forward"),
    "axes": (ChannelsLast, "ChannelsLast at '1'.* own forward"),
    "method": (Clipped, "lose its class's own 'clip'"),
    "train": (Still, "lose its class's own 'train'"),
    "attribute": (Gated, "forward may use 'gate'"),
    "attribute above": (Above, "forward may use 'gate'"),
    "buffer": (Masked, "forward may use 'alive'"),
    "order": (Before, "output in evaluation would not be the same"),
    "|γ|": (Absolute, "output in evaluation would not be the same"),
    "biased": (Biased, "running_var in training would not be the same"),
    "rank": (
        FrozenBatchNorm1d,
        r"'1': as a BatchNorm, it cannot be tried \(RuntimeError at rank 4",
    ),
    "split": (Split, "Split at '1': as a BatchNorm, it would raise "),
    "eps": (OtherEpsBatchNorm, "output in evaluation would not be the same"),
    "eps outside": (OutsideBatchNorm, "output in evaluation would not be the same"),
    "two children": (both, "own forward has 'act', 'drop' to call, BatchNorm one activation"),
    "compiled": (
        lambda c: torch.jit.script(nn.BatchNorm2d(c)),
        "torch.jit.script has not compiled, got BatchNorm2d at '1'; convert before that",
    ),
    "replaced": (replaced, "its forward was replaced"),
    "parametrized": (parametrized, "it is parametrized; .*remove_parametrizations"),
    "activation": (with_attribute("activation", "relu"), "an attribute 'activation' of its own"),
    "renorm": (with_attribute("renorm", nn.ReLU()), "an attribute 'renorm' of its own"),
    "gamma": (with_attribute("gamma", 2.0), "an attribute 'gamma' of its own"),
    "momentum": (lambda c: nn.BatchNorm2d(c, momentum=1.5), r"momentum in \[0, 1\].* got 1.5"),
    "slots": (Slotted, "lose its class's own 'extra'"),
    "hooked child": (hooked, "own forward"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_is_refused_and_nothing_is_changed(make, message):
    model = nn.Sequential(nn.BatchNorm2d(3), make(3), FrozenBatchNorm2d(3))
    kinds = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=message):
        convert(model)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_all_that_are_refused_are_named_at_once():
    model = nn.ModuleDict({"a": Scaled(2), "b": nn.BatchNorm2d(2), "c": nn.Sequential(Clipped(2))})
    with pytest.raises(ArgumentError, match=r"Scaled at 'a': .*; Clipped at 'c\.0': .*beside it$"):
        convert(model)


def test_a_process_group_that_is_none():
    model = nn.Sequential(nn.SyncBatchNorm(3))
    model[0].process_group = "half of them"
    with pytest.raises(ArgumentError, match=r"SyncBatchNorm at '0': expected process_group"):
        convert(model)


def test_within_a_block_of_a_tool():
    model = nn.Sequential(nn.BatchNorm1d(3))
    with accumulate_statistics(model), pytest.raises(ArgumentError, match="at work"):
        convert(model)
    assert type(convert(model)[0]) is BatchNorm


def test_options_that_cannot_be():
    model = nn.Sequential(nn.BatchNorm1d(3))
    for options, message in [
        ({"affine": False}, r"options of BatchNorm among activation, .*got affine"),
        ({"ghost": 4}, "options of BatchNorm.* got ghost"),
        ({"eps": 0}, "eps > 0"),
        ({"virtual_batch_size": 0}, "virtual_batch_size"),
        ({"process_group": "all"}, "process_group"),
    ]:
        with pytest.raises(ArgumentError, match=f"^expected {message}"):
            convert(model, **options)
    assert type(model[0]) is nn.BatchNorm1d


def test_options_that_a_layer_cannot_have():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ArgumentError, match=r"'1': expected track_running_stats=True with renorm"):
        convert(model, renorm=Renorm())
    own = nn.Sequential(nn.BatchNorm1d(3), BatchNorm(3, track_running_stats=False))
    with pytest.raises(ArgumentError, match=r"'1': expected track_running_stats=True with renorm"):
        convert(own, renorm=Renorm())
    model = nn.Sequential(BatchNormAct2d(3))
    for kind in (BatchNormAct2d, BatchNorm):
        with pytest.raises(ArgumentError, match="'0': it has an activation already"):
            convert(model, activation="leaky_relu")
        assert type(model[0]) is kind
        convert(model)
    assert model[0].activation == "relu"


def test_what_is_no_module():
    with pytest.raises(ArgumentError, match=r"expected a torch\.nn\.Module, got list"):
        convert([nn.BatchNorm2d(3)])
