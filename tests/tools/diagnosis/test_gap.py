"""The gap: distances of outputs, their error, and which layer is behind it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchnorm import InputError, Moments, diagnose
from batchnorm.tools.diagnosis.gap import (
    distance,
    exact_statistics,
    gap_of,
    leaves,
    loss_of,
    ratio,
    tensors,
)


def test_distance_is_in_units_of_the_examples_spread():
    a, b = torch.randn(16, 3, 2, dtype=torch.float64), torch.randn(16, 3, 2, dtype=torch.float64)
    x, y = a.numpy(), b.numpy()
    expected = ((x - y) ** 2).mean() / ((x - x.mean(0)) ** 2).mean()
    apart, spread = distance([a], [b])
    assert (apart, spread) == (pytest.approx(16 * expected, rel=1e-12), 16)
    # Several outputs count alike, however large they are.
    apart, spread = distance([a, 1e6 * a], [b, 1e6 * b])
    assert (apart, spread) == (pytest.approx(32 * expected, rel=1e-12), 32)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        # No examples to differ: the output itself is the measure.
        (torch.tensor(4.0), torch.tensor(3.0), (1 / 16, 1)),
        (torch.tensor([[3.0, 5.0]]), torch.tensor([[3.0, 6.0]]), (0.5 / 1, 1)),
        (torch.full((4, 2), 4.0), torch.full((4, 2), 3.0), (4 / 16, 4)),
        # They differ by rounding only.
        (4 + 1e-6 * torch.eye(4).double(), torch.full((4, 4), 3.0).double(), (4 / 16, 4)),
        (torch.zeros(4, 2), torch.zeros(4, 2), (0, 0)),
        # What training itself makes infinite says nothing.
        (torch.tensor([[1.0], [math.inf]]), torch.ones(2, 1), (0, 0)),
    ],
)
def test_distance_without_examples(one, other, expected):
    assert distance([one], [other]) == pytest.approx(expected, rel=1e-5)


def test_evaluation_that_is_not_finite_is_a_gap_that_is_not():
    assert math.isnan(ratio([distance([torch.randn(4, 2)], [torch.full((4, 2), math.nan)])]))
    assert math.isnan(ratio([]))


def test_shapes_must_agree():
    x = torch.randn(4, 2)
    for one, other in (([x], [x, x]), ([x], [x[:3]])):
        with pytest.raises(InputError, match=r"same shapes.*pass step="):
            distance(one, other)


def test_a_short_batch_counts_for_less():
    a, b = torch.randn(64, 3).double(), torch.randn(64, 3).double()
    c, d = torch.randn(2, 3).double(), 100 * torch.randn(2, 3).double()
    long, short = (
        (x - y).square().mean() / (x - x.mean(0)).square().mean() for x, y in ((a, b), (c, d))
    )
    expected = math.sqrt((64 * float(long) + 2 * float(short)) / 66)
    assert ratio([distance([a], [b]), distance([c], [d])]) == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.floats(1e-6, 100), min_size=2, max_size=8))
def test_the_error_is_the_jackknifes(shares):
    gap = gap_of([(share, 1.0) for share in shares], [(0.25, 1.0)] * 2)
    values = np.array(shares)
    n = len(values)
    without = np.array([math.sqrt(np.delete(values, k).mean()) for k in range(n)])
    assert gap.value == pytest.approx(math.sqrt(values.mean()), rel=1e-9)
    variance = (n - 1) / n * ((without - without.mean()) ** 2).sum()
    assert gap.error == pytest.approx(math.sqrt(variance), rel=1e-6, abs=1e-9)
    assert (gap.recalibrated, gap.batches) == (0.5, n)


def test_the_error_is_what_other_batches_would_differ_by():
    """Over many draws of batches, the gap's own spread is the error that each draw claims."""
    generator = np.random.default_rng(0)
    draws = [
        gap_of([(share, 1.0) for share in generator.gamma(4, 1, 16)], None) for _ in range(2000)
    ]
    claimed = math.sqrt(np.mean([gap.error**2 for gap in draws]))
    # 2000 draws know a standard deviation to 1/√4000, 1.6 %.
    assert claimed == pytest.approx(np.std([gap.value for gap in draws]), rel=0.06)


def test_one_batch_has_no_error():
    gap = gap_of([(4.0, 1.0)], None)
    assert (gap.value, gap.recalibrated) == (2, None)
    assert math.isnan(gap.error)


def test_what_counts_as_an_output():
    x = torch.randn(3, 2, dtype=torch.float16, requires_grad=True)
    given = {"a": x, "b": [x.long(), (None, x + 1)], "c": torch.zeros(0), "d": "text"}
    assert [t.dtype for t in tensors(given)] == [torch.float16] * 2
    (a, b) = leaves(given)
    assert a.dtype == torch.float64
    assert not a.requires_grad
    assert not b.requires_grad
    assert torch.equal(a, x.detach().double())
    loss = loss_of({"a": x, "b": [x.detach()], "c": 2 * x})
    assert float(loss.detach()) == pytest.approx(
        5 * float(x.detach().float().square().mean()), rel=1e-3
    )
    with pytest.raises(InputError, match="outputs that need a gradient, got none"):
        loss_of(x.detach())


def test_exact_statistics_are_given_back_whatever_happens():
    layers = [nn.BatchNorm1d(2) for _ in range(3)]
    x = torch.randn(5, 2, dtype=torch.float64)
    populations = dict(zip(layers, (Moments.of(x), None, Moments.of(x[:1])), strict=True))
    before = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]
    layers[0].running_mean += 0  # the object, too, must stay
    with pytest.raises(OSError, match="within"), exact_statistics(populations):  # noqa: PT012
        mean, var = layers[0].running_mean.numpy(), layers[0].running_var.numpy()
        assert np.allclose(mean, x.numpy().mean(0), rtol=1e-6)
        assert np.allclose(var, x.numpy().var(0, ddof=1), rtol=1e-6)
        for layer in layers[1:]:  # there is nothing, or too little, to set them to
            assert layer.running_mean.tolist() == [0, 0]
            assert layer.running_var.tolist() == [1, 1]
        raise OSError("within")
    assert all(torch.equal(buffer, value) for buffer, value in before)


# --- attribution ---------------------------------------------------------------------------------


def blocks(wrong=None):
    """Three layers whose running statistics are the one batch's, but for one."""
    model = nn.Sequential()
    for _ in range(3):
        model.extend([nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8, momentum=1.0), nn.ReLU()])
    model = model.append(nn.Linear(8, 4)).double()
    x = torch.randn(512, 8, dtype=torch.float64)
    with torch.no_grad():
        model(x)
        for layer in model[1::3]:
            layer.running_var *= 511 / 512  # what training divides by
        if wrong is not None:
            model[wrong].running_mean += torch.randn(8)
            model[wrong].running_var *= torch.rand(8) + 1
    return model, [x, x]


@pytest.mark.parametrize("wrong", [1, 4, 7])
def test_a_single_wrong_layer_has_all_of_the_gap(wrong):
    model, batches = blocks(wrong)
    diagnosis = diagnose(model, batches, ignore=("BN201",))
    assert diagnosis.gap.value > 0.3
    assert diagnosis.gap.error == pytest.approx(0, abs=1e-12)  # the batches are the same
    assert diagnosis.gap.recalibrated == pytest.approx(0, abs=1e-2)
    for layer in diagnosis.layers:
        # Wherever it is: layers before it get what they always got, and so do those behind it once
        # it is right.
        assert layer.share == pytest.approx(float(layer.name == str(wrong)), abs=1e-9)
        if layer.name != str(wrong):
            assert layer.gap == pytest.approx(0, abs=1e-9)
            continue
        if wrong == 7:  # none behind it normalises again
            assert layer.gap == pytest.approx(diagnosis.gap.value, rel=1e-9)
        else:
            assert 0 < layer.gap < diagnosis.gap.value
    assert [(f.code, f.layer) for f in diagnosis.findings] == [("BN101", str(wrong))]


class Branches(nn.Module):
    """Layers beside each other: what one does, no other changes."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(8, momentum=1.0) for _ in range(3))
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        return self.head(torch.cat([norm(x) for norm in self.norms], 1))


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_single_wrong_branch_has_all_of_the_gap(wrong):
    model, x = Branches().double(), torch.randn(512, 8, dtype=torch.float64)
    with torch.no_grad():
        model(x)
        for norm in model.norms:
            norm.running_var *= 511 / 512
        model.norms[wrong].running_mean += torch.randn(8)
    diagnosis = diagnose(model, [x], ignore=("BN201",))
    for index, layer in enumerate(diagnosis.layers):
        share = float(index == wrong)
        assert layer.gap == pytest.approx(share * diagnosis.gap.value, abs=1e-9)
        assert layer.share == pytest.approx(share, abs=1e-9)


class Backwards(nn.Module):
    """Runs its layers from the last to the first."""

    def __init__(self, number):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(number))

    def forward(self, x):
        for norm in reversed(self.norms):
            x = (norm(x) @ self.mix).tanh()
        return x


@pytest.mark.parametrize("number", [5, 42])
def test_shares_are_what_goes_layer_after_layer_as_they_run(number):
    """Against switching by hand: torch's own layers, put in training from the input on."""
    model = Backwards(number).double()
    model.mix = torch.randn(8, 8, dtype=torch.float64) / 2
    with torch.no_grad():
        for norm in model.norms:
            norm.running_mean += 0.3 * torch.randn(8)
            norm.running_var *= torch.rand(8) + 0.5
    batches = [torch.randn(64, 8, dtype=torch.float64) for _ in range(3)]
    diagnosis = diagnose(model, batches)

    model.eval()
    for norm in model.norms:
        norm.momentum = 0.0  # so that nothing moves
    looked_at = batches[: 2 if number <= 40 else 1]

    def outputs():
        with torch.no_grad():
            return [model(x).numpy() for x in looked_at]

    running = [outputs()]
    for norm in reversed(model.norms):
        norm.train()
        running.append(outputs())
    trained = running[-1]
    left = [
        math.sqrt(
            sum(
                ((t - y) ** 2).mean() / ((t - t.mean(0)) ** 2).mean()
                for t, y in zip(trained, of, strict=True)
            )
            / len(trained)
        )
        for of in running
    ]
    expected = {f"norms.{number - 1 - k}": (left[k] - left[k + 1]) / left[0] for k in range(number)}
    shares = {layer.name: layer.share for layer in diagnosis.layers}
    assert shares == pytest.approx(expected, abs=1e-9)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-9)


def test_no_gap_no_share_of_it():
    model, batches = blocks()
    diagnosis = diagnose(model, batches, ignore=("BN201",))
    assert diagnosis.gap.value == pytest.approx(0, abs=1e-12)
    assert diagnosis.findings == ()
    # An exact zero cannot be shared out.
    frozen, _ = blocks()
    for layer in frozen[1::3]:
        layer.track_running_stats = False
        layer.running_mean = layer.running_var = None
    assert [layer.share for layer in diagnose(frozen, batches).layers] == [None] * 3


def test_a_small_error_that_does_much_is_found():
    """0.3 σ of each pixel, behind which all are averaged: the outputs' own spread is far less."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 1, bias=False), nn.BatchNorm2d(8, momentum=None), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    batches = [torch.randn(32, 1, 16, 16) for _ in range(8)]
    with torch.no_grad():
        for x in batches:
            model(x)
    assert diagnose(model, batches).findings == ()
    model[1].running_mean += 0.3 * model[1].running_var.sqrt()
    (finding,) = diagnose(model, batches).findings
    assert (finding.code, finding.layer, finding.severity) == ("BN101", "1", "error")
    assert finding.evidence["mean_drift"] == pytest.approx(0.3, rel=0.05)
    assert finding.evidence["gap"] > 1 > 0.5 > finding.evidence["gap_recalibrated"]


def test_rounding_is_no_gap_and_has_no_shares():
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))
    x = 3 * torch.randn(512, 8) + 2
    with torch.no_grad():
        for layer, given in ((model[0], x), (model[2], model[:2](x))):
            layer.running_mean.copy_(given.mean(0))
            layer.running_var.copy_(given.var(0, correction=0))
    diagnosis = diagnose(model, [x, x])
    assert 0 < diagnosis.gap.value < 1e-5
    assert [layer.share for layer in diagnosis.layers] == [None, None]
