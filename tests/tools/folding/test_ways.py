"""What is not in the flow of data: what a model keeps, and ways that the example does not go."""

import logging

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from batchnorm import FoldError, fold
from folds import assert_same, count, randomized, reasons


@pytest.fixture
def x():
    return torch.randn(2, 4, 5, 5, dtype=torch.float64)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


def test_layers_that_the_model_keeps_elsewhere(x):
    """In a list that is no nn.ModuleList, or deeper."""

    class Listed(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.block = Block()
            layers = [self.block.conv, self.block.bn]
            self.kept = {"list": layers, "dict": {"deep": (tuple(layers),)}}[how]

        def forward(self, x):
            for layer in tree_leaves(self.kept):
                x = layer(x)
            return x

    for how in ("list", "dict"):
        model = randomized(Listed(how)).double()
        folded = fold(model, x)
        assert_same(folded, model, x)
        assert count(folded) == 0
        assert tree_leaves(model.kept) == [model.block.conv, model.block.bn]
        assert tree_leaves(folded.kept) == [folded.block.conv, folded.block.bn]


@pytest.mark.parametrize("how", ["attribute", "list", "dict", "child"])
def test_what_a_model_keeps_is_as_it_was(x, how):
    """For whoever asks after the pass, such as a feature extractor."""

    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.kept = Block(), None

        def forward(self, x):
            y = self.block.conv(x)
            if how == "child":
                self.block.kept = y
            else:
                self.kept = {"attribute": y, "list": [y], "dict": {"features": (y,)}}[how]
            return self.block.bn(y)

        def features(self):
            (y,) = tree_leaves(self.block.kept if how == "child" else self.kept)
            return y

    model = randomized(Keeping()).double()
    model(x)  # with a graph: torch refuses to copy it
    folded = fold(model, x)
    assert_same(folded, model, x)
    torch.testing.assert_close(folded.features(), model.features(), rtol=0, atol=0)
    assert "'block.conv' (Conv2d), which has 2 readers" in reasons(folded)["block.bn"]


class Branching(nn.Module):
    """Another way for other inputs, on which the batch norm is not."""

    def __init__(self, condition):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.condition = condition

    def forward(self, x):
        return self.block[0](x) if self.condition(x) else self.block(x)


@pytest.mark.parametrize(
    ("condition", "which"),
    [
        (lambda x: x.mean() < 0, "its negative"),
        (lambda x: x.shape[0] > 3, "twice its samples"),
        (lambda x: x.shape[-1] > 8, "larger inputs"),
        (lambda x: x.shape[-2] > 8, "larger inputs"),
        (lambda x: x.shape[0] == 1, "its first sample"),
    ],
)
def test_other_inputs_that_go_another_way(x, condition, which):
    """Where Python code decides, the example is not all there is."""
    with pytest.raises(FoldError, match=f"got output 0 in itself on {which} with an error of"):
        fold(randomized(Branching(condition)).double(), x.abs())


def test_arguments_of_every_rank_are_changed_for_that(x):
    """Also a number, and what has samples only."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.conv, self.bn = Block(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x, scale, each):
            if x.shape[0] > 1000:
                return x, x
            y = self.conv(self.block(x * scale + each[:, None, None, None]))
            return self.bn(y), y

    model, arguments = randomized(Scaled()).double(), (x, x[0, 0, 0, 0], x[:, 0, 0, 0])
    folded = fold(model, arguments)
    assert "'conv' (Conv2d), which has 2 readers" in reasons(folded)["bn"]
    assert count(folded) == 1
    assert len(folded.fold_report.notes) == 1


def test_what_is_returned_beside_is_a_reader(x):
    class Both(Block):
        def forward(self, x):
            y = self.conv(x)
            return self.bn(y), y

    assert (
        "'conv' (Conv2d), which has 2 readers" in reasons(fold(randomized(Both()), x.float()))["bn"]
    )


def test_ways_that_no_input_goes_are_noted(x):
    """What Python code asks is not known; that it asks is."""
    model = randomized(Branching(lambda x: x.shape[0] > 1000)).double()
    folded = fold(model, x)
    assert_same(folded, model, x)
    (note,) = folded.fold_report.notes
    assert note.startswith("torch.fx cannot follow the model as a whole (TraceError: ")
    assert "lead its Python code the same way as the example does" in note
    assert note in str(folded.fold_report)
    assert fold(model.block, x).fold_report.notes == ()
    # Of a model that stays as it is, nothing depends on it.
    model.block[0].register_forward_hook(lambda *_: None)
    assert fold(model, x).fold_report.notes == ()


def test_nothing_is_printed(x, capfd, caplog):
    """torch.export does when it fails; the report says why."""

    class Values(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) if y.mean() < 1e9 else y

    folded = fold(randomized(Values()).double(), x)
    assert "by torch.export: " in reasons(folded)["bn"]
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
