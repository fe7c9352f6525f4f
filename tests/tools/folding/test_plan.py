"""What must not be folded is not, and says why; where other tools go wrong is in each docstring."""

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm, InputError, fold
from folds import assert_same, count, randomized, reasons

WIDE = torch.float64


class Wired(nn.Module):
    """A conv and two batch norms (`a` of torch's, `b` of ours), wired as a function says."""

    def __init__(self, wiring, conv=None, width=4):
        super().__init__()
        self.conv = conv or nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.a, self.b = nn.BatchNorm2d(width), BatchNorm(width)
        self.relu = nn.ReLU(inplace=True)
        self.wiring = wiring

    def forward(self, x):
        return self.wiring(self, x)


def wired(wiring, *left, folded=0, **options):
    """Fold; check values, and which layers were left. Gives their reasons."""
    model = randomized(Wired(wiring, **options)).double()
    x = torch.randn(2, 4, 6, 6, dtype=WIDE)
    result = fold(model, x)
    assert_same(result, model, x)
    assert len(result.fold_report.folded) == folded
    found = reasons(result)
    assert {name for name in found if "not called" not in found[name]} == set(left)
    return found


def test_linear_on_the_last_axis_and_channels_on_axis_1():
    """torch.fx's fuse is silently wrong here, by 2.7, when L = C."""
    model = randomized(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))).double()
    x = torch.randn(3, 5, 5, dtype=WIDE)
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert "axis 1 of inputs of rank 3" in reasons(folded)["1"]
    # On (N, C) they are the same axis; and what was folded so refuses the other.
    folded = fold(model, x[0])
    assert count(folded) == 0
    assert_same(folded, model, x[0])
    with pytest.raises(InputError, match=r"expected an input of rank 2"):
        folded(x)


def test_linear_with_channels_on_the_last_axis():
    model = randomized(nn.Sequential(nn.Linear(5, 6), BatchNorm(6, channel_dim=-1))).double()
    folded = fold(model, torch.randn(3, 4, 5, dtype=WIDE))
    assert count(folded) == 0
    for shape in [(3, 5), (3, 4, 5), (2, 3, 4, 5)]:
        assert_same(folded, model, torch.randn(shape, dtype=WIDE))


def test_convolution_of_one_sample_without_a_batch():
    """(C, L) of Conv1d: the axis 1 of a batch norm is then that of L."""
    model = randomized(nn.Sequential(nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6))).double()
    x = torch.randn(4, 6, dtype=WIDE)
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert "axis 1 of inputs of rank 2" in reasons(folded)["1"]
    with pytest.raises(InputError, match=r"expected an input of rank 3"):
        fold(model, x[None])(x)


def test_linear_and_flattened_axes():
    """As LeViT has it: the last axis stays the last."""

    class Block(nn.Module):
        def __init__(self, layer, axes):
            super().__init__()
            self.layer, self.bn, self.axes = layer, nn.BatchNorm1d(6), axes

        def forward(self, x):
            y = self.layer(x)
            return self.bn(y.flatten(*self.axes)).reshape_as(y)

    x = torch.randn(2, 3, 5, dtype=WIDE)
    model = randomized(Block(nn.Linear(5, 6), (0, 1))).double()
    folded = fold(model, x)
    assert count(folded) == 0
    assert_same(folded, model, x)
    model = randomized(Block(nn.Conv1d(3, 2, 1), (1, 2))).double()
    model.layer = nn.Conv1d(3, 2, 3).double()  # (2, 2, 3) → (2, 6)
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert "flatten()" in reasons(folded)["bn"]
    model = randomized(Block(nn.Conv1d(3, 4, 1), (0, 1))).double()
    model.bn = randomized(nn.BatchNorm1d(5)).double()  # (2, 4, 5) → (8, 5)
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert "flattened in between" in reasons(folded)["bn"]


def test_one_conv_and_two_batch_norms():
    """torch.fx's fuse folds both into it, and is wrong by 0.67."""

    def wiring(m, x):
        y = m.conv(x)
        return m.a(y) + m.b(y)

    found = wired(wiring, "a", "b")
    assert "'conv' (Conv2d), which has 2 readers" in found["a"]
    assert "'conv' (Conv2d), which has 2 readers" in found["b"]


def test_another_reader():
    found = wired(lambda m, x: (y := m.conv(x)) + m.a(y), "a")
    assert "2 readers" in found["a"]
    wired(lambda m, x: m.b(y := m.conv(x), None, y), "b")
    wired(lambda m, x: (m.a(y := m.conv(x)), y)[0] + y.mean(), "a")
    # Asking for the shape reads nothing.
    wired(lambda m, x: m.a(y := m.conv(x)) * y.shape[1] + y.size(0), folded=1)


def test_changed_in_place_in_between():
    wired(lambda m, x: m.a(m.conv(x).add_(1)), "a")
    wired(lambda m, x: m.a(m.relu(m.conv(x))), "a")

    def aliased(m, x):
        y = m.conv(x)
        y.view(-1).mul_(2)
        return m.a(y)

    wired(aliased, "a")

    def input_changed(m, x):
        """Without the batch norm, the conv would read what came later."""
        x = x * 1
        y = m.a(x)
        x.add_(1)
        return m.conv(y)

    found = wired(input_changed, "a", conv=nn.Conv2d(4, 4, 3))
    assert "add_() comes between" in found["a"]


def test_registered_in_another_order_than_called():
    """mmcv's fuse_conv_bn pairs what stands next to each other in the module."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
            self.conv2, self.bn1 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))

    model, x = randomized(Block()).double(), torch.randn(2, 4, 9, 9, dtype=WIDE)
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert {(s.layer, s.into) for s in folded.fold_report.folded} == {
        ("bn1", "conv1"), ("bn2", "conv2"),
    }  # fmt: skip


def test_shared_layers():
    # One conv and one batch norm, always together: foldable.
    wired(lambda m, x: m.a(m.conv(m.a(m.conv(x)).relu())), folded=1)
    # A conv with a batch norm for each of its calls is not, and a batch norm of two convs.
    found = wired(lambda m, x: m.b(m.conv(m.a(m.conv(x)).relu())), "a", "b")
    assert "'conv' is called in 2 places" in found["a"]
    found = wired(lambda m, x: m.a(m.other(m.a(m.conv(x)).relu())), "a")
    assert "several layers: conv, other" in found["a"]
    # A batch norm without its conv once.
    wired(lambda m, x: m.a(m.a(m.conv(x)).relu()), "a")
    # A conv that another reader needs as it was.
    wired(lambda m, x: m.a(m.conv(x)) + m.conv(x), "a")


def test_a_module_under_two_names():
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = randomized(nn.Sequential(block, nn.ReLU(), block, nn.Sequential(block[1]))).double()
    x = torch.randn(2, 4, 5, 5, dtype=WIDE)
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert count(folded) == 1
    model = model[:3]
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert count(folded) == 0
    assert folded[0] is folded[2]


def test_tied_weights_stay_those_of_the_other_layer():
    model = Wired(lambda m, x: m.a(m.conv(x)) + m.other(x))
    model.other.weight = model.conv.weight
    model, x = randomized(model).double(), torch.randn(2, 4, 5, 5, dtype=WIDE)
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert count(folded) == 1  # b, that is not called
    assert torch.equal(folded.other.weight, model.other.weight)
    assert not torch.equal(folded.conv.weight, model.conv.weight)


def test_parameters_that_are_read_elsewhere():
    found = wired(lambda m, x: m.a(m.conv(x)) * m.conv.weight.sum(), "a")
    assert "parameters of 'conv' are read" in found["a"]
    found = wired(lambda m, x: m.a(m.conv(x)) * m.a.running_mean.sum(), "a")
    assert "its parameters are read" in found["a"]
    wired(lambda m, x: m.a(m.conv(x.to(m.conv.weight.dtype))), folded=1)
    wired(lambda m, x: nn.functional.conv2d(m.a(m.conv(x)), m.conv.weight), "a")


def test_dropout_that_drops_in_evaluation():
    dropout = nn.functional.dropout
    found = wired(lambda m, x: m.a(dropout(m.conv(x), 0.0)), "a")
    assert "its input comes from dropout()" in found["a"]
    wired(lambda m, x: m.a(dropout(m.conv(x), 0.5, m.training)), folded=1)


def test_padding_before():
    """The border of the output sees zeros, which no shift came to."""
    found = wired(lambda m, x: m.conv(m.a(x)), "a")
    assert "pads with zeros" in found["a"]
    for mode in ("reflect", "replicate", "circular"):
        conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
        wired(lambda m, x: m.conv(m.a(x)), conv=conv, folded=1)
    wired(lambda m, x: m.conv(m.a(x)), conv=nn.Conv2d(4, 4, 3, padding="valid"), folded=1)
    wired(lambda m, x: m.conv(m.a(x)), "a", conv=nn.Conv2d(4, 4, 3, padding="same"))
    wired(lambda m, x: m.conv(m.a(x)), conv=nn.Conv2d(4, 4, 1, padding="same"), folded=1)


def test_between():
    found = wired(lambda m, x: m.conv(m.a(x).relu()), "a", conv=nn.Conv2d(4, 4, 3))
    assert "its output goes to relu()" in found["a"]
    assert "its input comes from an argument of the model" in found["a"]
    found = wired(lambda m, x: m.conv(y := m.a(x)).mean() + y, "a", conv=nn.Conv2d(4, 4, 3))
    assert "its output has 2 readers" in found["a"]
    wired(lambda m, x: m.a(m.conv(x).permute(0, 1, 3, 2)), "a")


def test_activation_or_residual_before_another_layer():
    model = Wired(lambda m, x: m.conv(m.b(x)), nn.Conv2d(4, 4, 3))
    model.b.activation = "relu"
    x = torch.randn(2, 4, 6, 6, dtype=WIDE)
    model = randomized(model).double()
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert "applies an activation" in reasons(folded)["b"]
    wired(lambda m, x: m.conv(m.b(x, residual=x)), "b", conv=nn.Conv2d(4, 4, 3))
    wired(lambda m, x: m.a(m.b(x, residual=x)), "a", "b")


def test_layers_that_are_not_called():
    found = wired(lambda m, x: m.a(m.conv(x)), folded=1)
    assert found["b"] == "it is not called with the example inputs"
