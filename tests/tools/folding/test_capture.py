"""The flow of data is learnt by torch.fx, part by part if need be, then by torch.export."""

import pytest
import torch
from torch import nn
from torch.nn.utils import rnn

from batchnorm import BatchNorm, fold
from batchnorm.tools.folding.capture import capture
from batchnorm.tools.folding.example import Example
from folds import assert_same, count, randomized, reasons

WIDE = torch.float64


class Block(nn.Module):
    """What it asks of the shape torch.fx cannot show; of the values, torch.export cannot either."""

    def __init__(self, asks=None, norm=nn.BatchNorm2d, **options):
        super().__init__()
        self.conv, self.bn, self.asks = nn.Conv2d(4, 4, 1), norm(4, **options), asks

    def forward(self, x, residual=None):
        if self.asks == "shape" and x.shape[-1] > 100:
            return x
        y = self.conv(x)
        if self.asks == "values" and float(y.sum()) > 1e9:
            return y
        return self.bn(y) if residual is None else self.bn(y, residual=residual)


class Outer(nn.Module):
    def __init__(self, *blocks, asks=None):
        super().__init__()
        self.blocks, self.norm, self.asks = nn.ModuleList(blocks), nn.BatchNorm2d(4), asks

    def forward(self, x):
        if self.asks == "values" and float(x.sum()) > 1e9:
            return x
        if self.asks == "shape" and x.shape[0] > 100:
            return x
        for block in self.blocks:
            x = block(x).relu()
        return self.norm(self.blocks[0].conv(x))


def views(model, x):
    return [len(view) for view in capture(model.eval(), Example((x,), {})).views]


@pytest.fixture
def x():
    return torch.randn(2, 4, 5, 5, dtype=WIDE)


def test_as_a_whole(x):
    model = randomized(Outer(Block(), Block())).double()
    assert views(model, x) == [1]
    folded = fold(model, x)
    assert_same(folded, model, x)
    # The first conv is called twice, with two batch norms.
    assert [s.layer for s in folded.fold_report.folded] == ["blocks.1.bn"]


def test_by_parts(x):
    """Values decide the way outside; inside of the blocks all is certain."""
    model = randomized(Outer(Block(), Block(), asks="values")).double()
    assert views(model, x) == [2]
    folded = fold(model, x)
    assert_same(folded, model, x)
    # Nothing shows the call of the first conv outside of its block, but it was counted.
    assert [s.layer for s in folded.fold_report.folded] == ["blocks.1.bn"]
    found = reasons(folded)
    assert list(found) == ["blocks.0.bn", "norm"]  # in the order of the model
    assert "'blocks.0.conv' was called 2 times" in found["blocks.0.bn"]
    assert "the flow of data could not be captured: TypeError" in found["norm"]
    assert "by torch.export: " in found["norm"]


def test_called_outside_of_the_part_that_is_shown(x):
    class Again(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.block, self.layer = Block(), layer

        def forward(self, x):
            if float(x.sum()) > 1e9:
                return x
            return self.block(x) + self.block.get_submodule(self.layer)(x)

    for layer in ("conv", "bn"):
        model = randomized(Again(layer)).double()
        folded = fold(model, x)
        assert_same(folded, model, x)
        assert f"block.{layer}' was called 2 times" in reasons(folded)["block.bn"]


def test_by_export(x):
    """Shapes are what they are in the example."""
    model = randomized(Outer(Block("shape"), Block("shape"), asks="shape")).double()
    assert views(model, x) == [0, 1]
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert_same(folded, model, x[:1, :, :2])
    assert [s.layer for s in folded.fold_report.folded] == ["blocks.1.bn"]
    assert "'blocks.0.conv' is called in 2 places" in reasons(folded)["blocks.0.bn"]


@pytest.mark.parametrize("options", [
    {}, {"activation": "relu"}, {"activation": torch.tanh}, {"channel_dim": -3},
])  # fmt: skip
def test_by_export_with_our_layers(x, options):
    """The operators of a layer, and what else it does, are one call again."""
    model = nn.Sequential(Block("shape", BatchNorm, **options), nn.ReLU(), nn.BatchNorm2d(4))
    model = randomized(model).double()
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert count(folded) == 1


def test_by_export_with_a_residual(x):
    """Which is met before the input, or after."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block("shape", BatchNorm, activation="relu")

        def forward(self, x):
            return self.block(x, x * 2)

    model = randomized(Residual()).double()
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert count(folded) == 0


def test_by_export_before_and_twice(x):
    class Before(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv, self.drop = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Dropout(0.5)

        def forward(self, x):
            if x.shape[-1] > 100:
                return x
            return self.conv(self.drop(self.bn(x)))

    before = Before()
    model = randomized(nn.Sequential(before, nn.ReLU(), before)).double()
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert count(folded) == 0


def test_values_that_decide_everything(x):
    model = randomized(Block("values")).double()
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert count(folded) == 1
    assert "could not be captured" in reasons(folded)["bn"]


def test_a_block_that_is_called_in_two_ways(x):
    """Its arguments are as in each of its calls."""

    class Flagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x, early=False, *, skip=None):
            y = self.block.conv(x)
            if early:
                return y
            return self.block.bn(y) if skip is None else self.block.bn(y) + skip["x"][0]

    class Twice(nn.Module):
        def __init__(self, *flags):
            super().__init__()
            self.flagged, self.flags = Flagged(), flags

        def forward(self, x):
            if float(x.sum()) > 1e9:
                return x
            y = [self.flagged(x, flag, skip={"x": [x, 3]}) for flag in self.flags]
            return sum(y) + self.flagged(x)

    for flags, left in (((False, False), 0), ((False, True), 1), ((True,), 1)):
        model = randomized(Twice(*flags)).double()
        folded = fold(model, x)
        assert_same(folded, model, x)
        assert count(folded) == left, flags


def test_arguments_of_every_kind(x):
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x, scale, options, *, mask=None, name="a"):
            y = self.block(x["image"]) * scale
            if options["add"] and mask is None and name == "a":
                y = y + options["bias"][1]
            return y

    model = randomized(Many()).double()
    arguments = {
        "x": {"image": x}, "scale": 2.0, "options": {"add": True, "bias": (1, x.mean())},
    }  # fmt: skip
    folded = fold(model, arguments)
    assert count(folded) == 0
    assert_same(folded, model, **arguments)


def test_packed_sequences():
    """Of them nothing is shown, and nothing goes wrong."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.bn = nn.Linear(4, 6), BatchNorm(6)
            self.rnn, self.last = nn.GRU(6, 5, batch_first=True), BatchNorm(5)
            self.head, self.out = nn.Linear(5, 3), nn.BatchNorm1d(3)

        def forward(self, x, lengths):
            x = rnn.pack_padded_sequence(self.linear(x), lengths, batch_first=True)
            y = self.last(self.rnn(self.bn(x))[0])
            return self.classify(y)

        def classify(self, y):
            return self.out(self.head(y.data))

    model = randomized(Recurrent()).double()
    inputs = torch.randn(3, 5, 4, dtype=WIDE), torch.tensor([5, 3, 2])
    folded = fold(model, inputs)
    assert_same(folded, model, *inputs)
    packed = rnn.pack_sequence([torch.randn(n, 5, dtype=WIDE) for n in (4, 2)])
    model.forward = model.classify
    folded = fold(model, packed)
    assert "out" not in reasons(folded)
    assert_same(folded, model, packed)


def test_arguments_without_names(x):
    """torch.fx alone would take a flag that is not given for one that is."""

    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, *args, **kwargs):
            y = self.block.conv(args[0])
            if kwargs.get("early") is not None:
                return y
            return self.block.bn(y)

    class Twice(nn.Module):
        def __init__(self, **kwargs):
            super().__init__()
            self.free, self.kwargs = Free(), kwargs

        def forward(self, x):
            return self.free(self.free(x, **self.kwargs))

    for flags, left in (({}, 0), ({"early": 1}, 1)):
        model = randomized(Twice(**flags)).double()
        folded = fold(model, x)
        assert_same(folded, model, x)
        assert count(folded) == left


def test_a_forward_of_one_instance(x):
    """As libraries put there that move weights about."""
    for part in ("", "block"):
        model = randomized(nn.ModuleDict({"block": Block()})).double()
        model.forward = model["block"].forward if part else (lambda x: x + 1)
        model["block"].bn.forward = lambda x: x * 2
        folded = fold(model, x)
        assert_same(folded, model, x)
        assert count(folded) == 1


def test_calls_around_the_module(x):
    """`layer.forward` runs no hooks and shows up as a function."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block.bn(self.block.conv.forward(x))

    model = randomized(Around()).double()
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert count(folded) == 1


def test_nothing_is_left_in_the_model(x):
    """A forward pass may leave something in the model; not a symbol, and not the example's."""

    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.kept, self.calls = Block(), None, 0

        def forward(self, x):
            self.kept = self.block(x)
            self.calls += 1
            return self.kept * 2

    model = randomized(Keeping()).double()
    folded = fold(model, x)
    assert (model.kept, model.calls, folded.kept, folded.calls) == (None, 0, None, 0)
    assert_same(folded, model, x)
    assert count(folded) == 0
