"""BN3xx: few values, batches that differ, dead channels, what is not finite."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import BatchNorm, diagnose
from batchnorm.tools.diagnosis.inputs import check_inputs
from batchnorm.tools.diagnosis.watch import Watch


def judged(layer, batches, activated=False, calls=1):
    watch = Watch([layer])
    with watch.hooks():
        for batch in batches:
            watch.next_batch()
            for _ in range(calls):
                layer(batch)
    return check_inputs("norm", layer, watch.seen[layer], activated)


def codes(findings):
    return [finding.code for finding in findings]


# --- few values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 7, 8, 64])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm])
def test_few_rows(size, norm):
    found = judged(norm(5), torch.randn(9, size, 5), calls=2)
    if size >= 8:
        assert found == []
        return
    (finding,) = found
    assert (finding.code, finding.severity, finding.layer) == ("BN301", "warning", "norm")
    expected = {"values": size, "effective": size, "noise": size**-0.5, "processes": 1}
    assert finding.evidence == pytest.approx(expected)
    assert f"a call has {size} values per channel, worth {size} independent" in finding.message


@pytest.mark.parametrize("size", [2, 6, 40])
def test_pixels_that_are_alike(size):
    """Each sample has a level of its own, of half of the variance: 64 pixels are worth 1.97."""
    level = torch.randn(400, size, 5, 1, 1)
    x = (level + torch.randn(400, size, 5, 8, 8)) * 3 + 7
    found = judged(nn.BatchNorm2d(5), x)
    worth = size * 2 / (1 + 1 / 64)
    if worth > 8:
        assert found == []
        return
    (finding,) = found
    assert finding.code == "BN301"
    assert finding.evidence["values"] == 64 * size
    # 400 batches of two samples know a variance to √(2 / 400), 7 %.
    assert finding.evidence["effective"] == pytest.approx(worth, rel=0.1)
    # And so is the mean of a batch, in σ.
    off = float((x.mean((1, 3, 4)).std(0) / x.std((0, 1, 3, 4))).mean())
    assert finding.evidence["noise"] == pytest.approx(off, rel=0.1)


def test_independent_pixels_are_worth_all():
    assert judged(nn.BatchNorm2d(5), torch.randn(20, 1, 5, 8, 8)) == []


@pytest.mark.parametrize(("size", "few"), [(4, True), (7, True), (8, False), (100, False)])
def test_groups_have_fewer(size, few):
    found = judged(BatchNorm(5, virtual_batch_size=size), torch.randn(9, 32, 5))
    assert codes(found) == (["BN301"] if few else [])
    if few:
        assert found[0].evidence["effective"] == pytest.approx(size)


# --- batches that differ -------------------------------------------------------------------------


def shifted(between, size=32, number=12, channels=8, **options):
    """Batches with levels of their own, of this variance beside the samples' 1."""
    levels = math.sqrt(between) * torch.randn(number, 1, channels)
    return torch.randn(number, size, channels) + levels


def test_batches_that_are_not_alike():
    (finding,) = judged(nn.BatchNorm1d(8), shifted(0.5, number=400))
    assert (finding.code, finding.severity) == ("BN302", "warning")
    # Variance of the means: 0.5 + 1/32, which is 17 times what chance makes.
    assert finding.evidence["times"] == pytest.approx(17, rel=0.15)
    assert finding.evidence["between_share"] == pytest.approx(1 / 3, rel=0.1)
    assert finding.evidence["batches"] == 400


def test_what_chance_may_do():
    """The 99.9 % quantile of χ²/n within 2 %, of tables: 16.27 / 3, 29.59 / 10, 149.45 / 100."""
    from batchnorm.tools.diagnosis.inputs import _by_chance

    for freedom, quantile in ((3, 16.27), (10, 29.59), (100, 149.45)):
        assert _by_chance(freedom) == pytest.approx(quantile / freedom, rel=0.02)


@pytest.mark.parametrize("number", [3, 5, 16])
def test_random_batches_are_alike(number):
    for _ in range(100):
        assert judged(nn.BatchNorm1d(3), shifted(0.0, number=number, channels=3)) == []
    # Little is between batches of large ones, however significant.
    assert judged(nn.BatchNorm1d(8), shifted(0.02, size=2000, number=number)) == []


def test_two_batches_do_not_tell_and_three_do():
    assert judged(nn.BatchNorm1d(8), shifted(9.0, number=2)) == []
    assert codes(judged(nn.BatchNorm1d(8), shifted(90.0, number=3))) == ["BN302"]


def test_a_short_last_batch_is_no_other_kind():
    for _ in range(100):
        batches = [*torch.randn(4, 64, 1), torch.randn(2, 1)]
        assert judged(nn.BatchNorm1d(1), batches) == []


def test_samples_of_several_values_are_compared_by_their_means():
    # Pixels of a sample are alike: batches of 32 samples are no more different than that allows.
    x = torch.randn(12, 32, 4, 1, 1) + 0.1 * torch.randn(12, 32, 4, 6, 6)
    assert judged(nn.BatchNorm2d(4), x) == []


def test_sorted_data():
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8, momentum=None))
    x = torch.randn(640, 4).sort(0).values
    sorted_, shuffled = x.split(64), x[torch.randperm(640)].split(64)
    with torch.no_grad():
        for batch in shuffled:
            model(batch)
    assert diagnose(model, shuffled).findings == ()
    assert codes(diagnose(model, sorted_).findings) == ["BN302"]


NOT_ELSE = {"zero_weight": 0, "off": 0}

# --- dead channels -------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 5.0, 1e4])
def test_constant_channels(offset):
    x = torch.randn(4, 32, 10) + offset
    x[..., [1, 6]] = offset
    (finding,) = judged(nn.BatchNorm1d(10), x)
    assert (finding.code, finding.severity) == ("BN304", "warning")
    assert finding.evidence == {"channels": [1, 6], "number": 2, "constant": 2, **NOT_ELSE}
    assert "2 of 10 channels are dead: 2 get a constant" in finding.message


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm])
@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_channels_with_a_weight_of_zero(norm, shift):
    """Their output is β, whatever comes in and whether or not it passes a ReLU."""
    layer, x = norm(5).eval(), torch.randn(4, 128, 5)
    x[..., 3] = 2
    with torch.no_grad():
        layer.weight[[1, 3]] = 0
        layer.bias.fill_(9)  # the others pass
        layer.bias[1] = shift
    for activated in (False, True):
        (finding,) = judged(layer, x, activated=activated)
        assert finding.evidence == {
            "channels": [1, 3], "number": 2, "constant": 1, "zero_weight": 1, "off": 0,
        }  # fmt: skip
        assert "2 of 5 channels are dead: 1 get a constant, 1 have γ = 0" in finding.message
    with torch.no_grad():
        layer.weight.zero_()  # how residual branches start
    assert "zero_weight" not in str(judged(layer, x[..., [0, 1, 2, 4, 0]]))


def test_one_in_twenty_is_no_matter():
    x = torch.randn(4, 32, 20)
    x[..., 3] = 0
    assert judged(nn.BatchNorm1d(20), x) == []
    x[..., 4] = 0
    assert codes(judged(nn.BatchNorm1d(20), x)) == ["BN304"]


def test_little_variance_is_not_none():
    x = torch.randn(4, 32, 4)
    x[..., 0] *= 1e-6
    assert judged(nn.BatchNorm1d(4), x) == []


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm])
def test_channels_that_never_pass_the_relu(norm):
    layer, x = norm(4).eval(), torch.randn(5, 128, 4)
    with torch.no_grad():
        layer.bias[2] = -9
    assert judged(layer, x) == []  # no ReLU behind it
    (finding,) = judged(layer, x, activated=True)
    assert finding.evidence["channels"] == [2]
    assert [finding.evidence[way] for way in ("constant", "zero_weight", "off")] == [0, 0, 1]
    assert "1 never pass the ReLU" in finding.message
    assert judged(layer, x[:, :99], activated=True) == []  # too few values to say never
    with torch.no_grad():
        layer.bias[2] = -2  # one in forty passes
    assert judged(layer, x, activated=True) == []


def test_a_relu_of_its_own():
    layer, x = BatchNorm(4, activation="relu").eval(), torch.randn(5, 128, 4)
    assert judged(layer, x) == []
    with torch.no_grad():
        layer.bias[2] = -9
    assert judged(layer, x)[0].evidence["off"] == 1
    with torch.no_grad():
        layer.weight.zero_(), layer.bias.zero_()
    assert judged(layer, x) == []  # how residual branches start
    leaky = BatchNorm(4, activation="leaky_relu").eval()
    leaky.bias.data[2] = -9
    assert judged(leaky, x) == []


def test_residual_branches_that_start_at_zero_are_alive():
    """Added in place to what comes past them: the ReLU takes the sum."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4, momentum=None)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x):
            y = self.norm(self.linear(x))
            y += x
            return torch.relu_(y)

    model, batches = Block(), list(torch.randn(8, 100, 4))
    with torch.no_grad():
        for x in batches:
            model(x)
    assert diagnose(model, batches).findings == ()


# --- not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm])
@pytest.mark.filterwarnings("ignore::batchnorm.NonFiniteWarning")
def test_not_finite(value, norm):
    model = nn.Sequential(
        norm(4, momentum=None), nn.Linear(4, 4, bias=False), norm(4, momentum=None)
    )
    batches = list(torch.randn(8, 32, 4))
    with torch.no_grad():
        for x in batches:
            model(x)
    before = diagnose(model, batches[:3] + batches[4:])
    batches[3][5, 2] = value
    diagnosis = diagnose(model, batches)
    assert [(f.code, f.severity, f.layer) for f in diagnosis.findings] == [
        ("BN305", "error", "0"), ("BN305", "error", "2"),
    ]  # fmt: skip
    # The rest of the data says what it says without that batch.
    for with_, without in zip(diagnosis.layers, before.layers, strict=True):
        assert with_.mean_drift == pytest.approx(without.mean_drift, rel=1e-6)
        assert with_.var_drift == pytest.approx(without.var_drift, rel=1e-6)


def test_rows_that_are_alike_and_change_nothing_are_no_padding():
    """Documents without a word of the vocabulary, as in any bag of words."""
    words = (torch.rand(4, 512, 200) < 0.01).float() @ torch.randn(200, 32)
    empty = (words == 0).all(-1)
    assert 0.1 < float(empty.double().mean()) < 0.17
    assert judged(nn.BatchNorm1d(32), words) == []
    words[empty] = 3.0  # padding with something else is
    assert [f.code for f in judged(nn.BatchNorm1d(32), words)] == ["BN303"]


def test_padding_is_reported_with_what_it_does():
    x = torch.randn(4, 32, 3, 10)
    for batch in x:
        for row, length in zip(batch, torch.randint(4, 11, (32,)), strict=True):
            row[:, length:] = 2.0
    (finding,) = judged(nn.BatchNorm1d(3), x)
    assert (finding.code, finding.severity) == ("BN303", "warning")
    share = float(np.mean([(batch == 2.0).all(1).double().mean() for batch in x[:2]]))
    assert finding.evidence["share"] == pytest.approx(share, rel=0.1)
    # Mean of a mixture: share · 2 σ off; variance: 1 − share + 4 · share · (1 − share).
    assert finding.evidence["mean_shift"] == pytest.approx(2 * share, rel=0.2)
    assert finding.evidence["var_ratio"] == pytest.approx(
        1 - share + 4 * share * (1 - share), rel=0.2
    )
    # Too little of it to speak of.
    little = torch.randn(4, 64, 3, 40)
    little[:, :30, :, -1:], little[:, :20, :, -2:] = 2.0, 2.0
    assert judged(nn.BatchNorm1d(3), little) == []
