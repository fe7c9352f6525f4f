"""Graphs that keep one of a layer's two tensors: the same gradients, fewer bytes."""

import weakref

import pytest
import torch
from torch import nn

from batchnorm import (
    BatchNorm,
    freeze,
    save_memory,
)
from batchnorm.bench.allocations import allocations
from batchnorm.tools import graph
from saving import BOTH, SIZE, convolutions, same, step, wild

pytestmark = pytest.mark.usefixtures("kernels")


def frozen(model):
    freeze(model, affine=False)
    return model


FUSED = {
    "none": convolutions,
    "relu": lambda: convolutions(activation="relu"),
    "leaky": lambda: convolutions(activation="leaky_relu"),
    "no affine": lambda: convolutions(affine=False),
    "no beta": lambda: convolutions(bias=False, activation="relu"),
    "ghost": lambda: convolutions(activation="relu", virtual_batch_size=2),
    "ragged ghost": lambda: convolutions(virtual_batch_size=4),
    "untracked": lambda: convolutions(track_running_stats=False),
    "evaluation": lambda: convolutions(activation="relu").eval(),
    "frozen": lambda: frozen(convolutions(activation="relu")),
}


AFTER = {
    "ReLU": nn.ReLU(),
    "ReLU in place": nn.ReLU(inplace=True),
    "LeakyReLU": nn.LeakyReLU(0.2),
    "LeakyReLU in place": nn.LeakyReLU(0.2, inplace=True),
    "SiLU": nn.SiLU(),
    "SiLU in place": nn.SiLU(inplace=True),
    "GELU": nn.GELU(),
    "GELU tanh": nn.GELU("tanh"),
    "ReLU6": nn.ReLU6(),
    "ReLU6 in place": nn.ReLU6(inplace=True),
    "Hardswish": nn.Hardswish(),
    "Hardtanh": nn.Hardtanh(-0.5, 2.0),
}


@pytest.mark.parametrize("name", FUSED)
def test_the_output_again_is_the_same_bits(name):
    model, x = FUSED[name](), torch.randn(6, 8, 9, 7)
    expected, _ = step(model, x)
    found, saved = step(model, x, "input")
    assert same(found, expected)
    if "ghost" in name and saved.bytes == 0:
        # Groups that plain torch operations cut and join.
        assert all("a function after" in reason for reason in saved.reasons.values())
    else:
        assert saved.layers == {"1": SIZE, "3": SIZE, "5": SIZE}
        assert saved.reasons == {}


def kept_by(activation):
    """What torch's node of an activation keeps."""
    y = activation(torch.randn(2, requires_grad=True) * 1)
    return [name.removeprefix("_saved_") for name in dir(y.grad_fn) if name.startswith("_saved_")]


@pytest.mark.parametrize("after", AFTER.values(), ids=AFTER)
def test_an_activation_that_follows_is_made_again_too(after):
    model, x = convolutions(after), torch.randn(6, 8, 9, 7)
    expected, _ = step(model, x)
    found, saved = step(model, x, "input")
    assert same(found, expected)
    # ReLU keeps its result, the others what comes in, which is one more.
    kept = 1 if "result" in kept_by(after) else 2
    assert saved.layers == {"1": kept * SIZE, "4": kept * SIZE, "7": kept * SIZE}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtypes_and_layouts(dtype, channels_last):
    model = convolutions(activation="relu").to(dtype)
    x = torch.randn(6, 8, 9, 7, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    expected, _ = step(model, x)
    found, saved = step(model, x, "input")
    assert same(found, expected)
    assert saved.bytes == 3 * SIZE // 4 * dtype.itemsize


@BOTH
def test_a_mask(keep):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.linear = BatchNorm(4, activation="leaky_relu"), nn.Linear(4, 3)

        def forward(self, x, mask):
            return self.linear(self.bn(x, mask))

    x, mask = torch.randn(16, 4), torch.arange(16) < 11
    x[11:] = float("nan")
    model = Masked()
    with torch.no_grad():
        y = model(x, mask)
    assert not y[:11].isnan().any()
    expected, _ = step(model, x, mask=mask)
    found, saved = step(model, x, keep, mask=mask)
    assert same(found, expected)
    assert saved.bytes == (x.nbytes if keep == "input" else 0)


def test_views_of_the_output():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = BatchNorm(6, activation="relu")
            self.linear, self.narrow = nn.Linear(6 * 20, 3), nn.Linear(20, 3)

        def forward(self, x):
            y = self.bn(x)
            part = self.narrow(y[:, 2:5]).sum(1)
            return self.linear(y.flatten(1)) + part * y.transpose(1, 2).square()[:, :3, 0]

    model, x = Views(), torch.randn(5, 6, 20)
    expected, _ = step(model, x)
    found, saved = step(model, x, "input")
    assert same(found, expected)
    assert saved.layers == {"bn": x.nbytes}


def test_made_once_for_all_who_ask(monkeypatch):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.a, self.b = BatchNorm(4, activation="relu"), *(nn.Linear(4, 4),) * 2

        def forward(self, x):
            y = self.bn(x)
            return self.a(y) * self.b(y) + y * y

    made = []
    get = graph._Recipe.get

    def spy(recipe):
        before = recipe.made
        value = get(recipe)
        if before is None:
            made.append(weakref.ref(value))
        return value

    monkeypatch.setattr(graph._Recipe, "get", spy)
    model, x = Twice(), torch.randn(8, 4)
    expected, _ = step(model, x)
    found, _ = step(model, x, "input")
    assert same(found, expected)
    assert len(made) == 1
    assert made[0]() is None
    with save_memory(model):
        loss = model(x).square().sum()
    first = torch.autograd.grad(loss, model.parameters(), retain_graph=True)
    assert len(made) == 2
    assert made[1]() is None
    assert same(torch.autograd.grad(loss, model.parameters()), first)
    assert len(made) == 3


class Blocks(nn.Module):
    """Residual blocks; the first has a layer on the way around, too."""

    def __init__(self, activation="relu", around="convolution", number=4):
        super().__init__()
        self.start, self.end = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(number))
        self.norms = nn.ModuleList(BatchNorm(8, activation=activation) for _ in range(number))
        self.way, self.down, self.around = nn.Conv2d(8, 8, 1), BatchNorm(8), around

    def forward(self, x):
        x = self.start(x)
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            residual = self.down(self.way(x)) if i == 0 and self.around else x
            x = norm(convolution(x), residual=residual)
        return self.end(x)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", None])
@pytest.mark.parametrize("around", [True, False])
def test_residuals(activation, around):
    model, x = wild(Blocks(activation, around)), torch.randn(6, 3, 9, 7)
    expected, _ = step(model, x)
    found, saved = step(model, x, "input")
    assert same(found, expected)
    # Every other block's output is made again, of the one before it, which is kept; the first one,
    # of the layer's on the way around, which is made for that.
    assert [saved.layers[f"norms.{i}"] for i in range(4)] == [SIZE, 0, SIZE, 0]
    assert set(saved.reasons) >= {"norms.1", "norms.3"}
    assert "again itself" in saved.reasons["norms.1"]
    assert saved.layers["down"] == 0
    _, saved = step(model, x, "output")
    assert saved.layers["norms.0"] == 0
    assert "with a residual added" in saved.reasons["norms.0"]


def test_residuals_by_the_allocator():
    model, x = Blocks(), torch.randn(16, 3, 16, 16)

    def forward():
        with save_memory(model) as saved:
            loss = model(x).square().mean()
        assert saved.bytes == 2 * 16 * 8 * 16 * 16 * 4
        return loss

    usual = allocations(lambda: model(x).square().mean())
    found = allocations(forward)
    size = 2 * 16 * 8 * 16 * 16 * 4
    assert usual.held - size <= found.held < usual.held - size + 5 * 8 * 64


def test_a_residual_of_another_dtype():
    class Wider(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.a, self.b = BatchNorm(4, activation="relu"), *(nn.Linear(4, 4),) * 2

        def forward(self, x):
            r = self.a(x)
            return r.square() + self.b(self.bn(r.bfloat16(), residual=r))

    model, x = Wider(), torch.randn(8, 4)
    expected, _ = step(model, x)
    found, saved = step(model, x, "input")
    assert same(found, expected)
    assert saved.bytes == x.nbytes


@BOTH
def test_layers_one_after_the_other(keep):
    model = nn.Sequential(BatchNorm(4), BatchNorm(4), BatchNorm(4), nn.Linear(4, 3))
    x = torch.randn(8, 4)
    expected, _ = step(model, x)
    found, saved = step(model, x, keep)
    # Every other tensor: none is made from what is made itself.
    if keep == "input":
        assert same(found, expected)
        assert saved.layers == {"0": x.nbytes, "1": 0, "2": x.nbytes}
        assert "again itself" in saved.reasons["1"]
    else:
        assert saved.layers == {"0": x.nbytes, "1": 0, "2": x.nbytes}
        assert "kept anyway" in saved.reasons["1"]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@BOTH
def test_bytes_by_the_allocator(keep):
    model = convolutions(activation="leaky_relu")
    with torch.no_grad():  # so that no input must be kept
        for layer in model:
            if isinstance(layer, BatchNorm):
                layer.reset_parameters()
    x, saved = torch.randn(16, 8, 32, 32), None

    def forward(keep=None):
        nonlocal saved
        if keep is None:
            return model(x).square().mean()
        with save_memory(model, keep) as saved:
            return model(x).square().mean()

    usual = allocations(forward)
    found = allocations(lambda: forward(keep))
    assert saved.bytes == 3 * x.nbytes
    # Besides, γ, β and what finds the channels: a few numbers a channel.
    assert usual.held - 3 * x.nbytes <= found.held < usual.held - 3 * x.nbytes + 3 * 8 * 64
    whole = allocations(lambda: forward().backward())
    less = allocations(lambda: forward(keep).backward())
    assert less.peak <= whole.peak - x.nbytes


@BOTH
def test_an_input_that_another_operation_wants_is_kept(keep):
    class Shared(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.first, self.bn = first, BatchNorm(4)
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            h = self.a(x)
            if self.first:
                return self.c(h) + self.b(self.bn(h))
            return self.b(self.bn(h)) + self.c(h)

    for first in (True, False):
        model, x = Shared(first), torch.randn(8, 4)
        expected, _ = step(model, x)
        found, saved = step(model, x, keep)
        assert same(found, expected)
        assert saved.bytes == (x.nbytes if keep == "input" else 0)
