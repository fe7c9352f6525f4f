"""BN10x: running statistics against the data's, chance, and each code."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchnorm import BatchNorm, Moments
from batchnorm.tools.diagnosis import statistics
from batchnorm.tools.diagnosis.statistics import (
    chance_of,
    check_buffers,
    check_drift,
    drift_of,
    initial_share,
    never_updated,
)


def layer_with(mean, var, updates=1000, **options):
    layer = nn.BatchNorm1d(len(mean), **options)
    layer.running_mean = torch.as_tensor(mean, dtype=torch.float64)
    layer.running_var = torch.as_tensor(var, dtype=torch.float64)
    layer.num_batches_tracked.fill_(updates)
    return layer


def moments(batches):
    return [Moments.of(torch.as_tensor(x)) for x in batches]


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 5), st.floats(1e-8, 1))
def test_drift_against_numpy(seed, number, channels, eps):
    generator = np.random.default_rng(seed)
    batches = [
        generator.normal(3, 2, (int(generator.integers(2, 9)), channels)) for _ in range(number)
    ]
    mean, var = generator.normal(3, 2, channels), generator.gamma(2, 2, channels)
    drift = drift_of(layer_with(mean, var, eps=eps), moments(batches), 5.0)
    everything = np.concatenate(batches)
    own = everything.var(0, ddof=1) + eps
    far = (mean - everything.mean(0)) / np.sqrt(own)
    wider = np.log((var + eps) / own)
    assert drift.mean == pytest.approx(np.sqrt((far**2).mean()), rel=1e-9)
    assert drift.var == pytest.approx(np.sqrt((wider**2).mean()), rel=1e-9)
    size = np.abs(far) / 0.5 + np.abs(wider) / 0.7
    assert list(drift.worst) == list(np.argsort(-size)[:3])
    assert drift.score == pytest.approx(max(drift.mean / 0.5, drift.var / 0.7))


def test_nothing_to_compare():
    x = moments([torch.randn(8, 2)])
    assert drift_of(nn.BatchNorm1d(2, track_running_stats=False), x, 8.0) is None
    assert drift_of(nn.BatchNorm1d(2), [], 8.0) is None
    assert drift_of(layer_with([math.nan] * 2, [1, 1]), x, 8.0) is None
    # One channel that cannot be compared leaves the others.
    y = torch.randn(8, 2)
    whole = drift_of(layer_with([math.nan, 0.5], [1.0, 2.0]), moments([y]), 8.0)
    rest = drift_of(layer_with([0.5], [2.0]), moments([y[:, 1:]]), 8.0)
    assert (whole.mean, whole.var) == (rest.mean, rest.var)


def test_a_channel_without_variance_counts_as_little_as_in_the_output():
    x = torch.randn(64, 2, dtype=torch.float64)
    x[:, 1] = 5 + 1e-9 * x[:, 1]
    own = torch.cat([x, x]).var(0)
    drift = drift_of(layer_with([0.0, 5.0], [float(own[0]), 1e-7]), moments([x, x]), 64.0)
    # ln(1e-7 / 1e-18) is 25; what evaluation divides by is 1 % larger: 0.01 / √2 over both.
    assert drift.var == pytest.approx(0.00995 / math.sqrt(2), rel=0.01)


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_chance_against_simulation(momentum):
    """Running statistics of batches of the same kind as those seen are as far off as claimed."""
    updates, seen, size, channels = 60, 6, 12, 4000
    generator = np.random.default_rng(1)
    layer = nn.BatchNorm1d(channels, momentum=momentum, dtype=torch.float64)
    for _ in range(updates):
        layer(torch.as_tensor(generator.normal(1, 2, (size, channels))))
    batches = moments([generator.normal(1, 2, (size, channels)) for _ in range(seen)])
    drift = drift_of(layer, batches, 1.0)
    assert drift.mean == pytest.approx(drift.mean_by_chance, rel=0.1)
    # Of ln of a variance of 12 values, skewed, more roughly.
    assert drift.var == pytest.approx(drift.var_by_chance, rel=0.35)
    assert not drift.exceeds(0, 0)


@pytest.mark.parametrize("number", [1, 5])
def test_chance_of_batches(number):
    generator = np.random.default_rng(2)
    batches = generator.normal(7, 3, (number, 50, 3000))
    mean, log_var = chance_of(moments(list(batches)), 50.0, 0.0)
    true_mean = np.mean((batches.mean((0, 1)) - 7) ** 2) / 9
    true_var = np.mean(np.log(batches.var(1).mean(0) / 9) ** 2)
    # Variances of a few values are known to √(2/n) themselves; 3000 channels make that little.
    assert mean == pytest.approx(true_mean, rel=0.15)
    assert log_var == pytest.approx(true_var, rel=0.3)


def test_chance_is_not_exceeded_by_one_small_batch():
    layer = layer_with([0.0] * 50, [1.0] * 50)
    x = torch.randn(4, 50, dtype=torch.float64)
    drift = drift_of(layer, moments([x]), 4.0)
    assert drift.mean > 0.3  # far, but no wonder
    assert check_drift("norm", layer, drift, None, None) == []
    # One value says next to nothing, and none is not taken for a divisor.
    assert chance_of(moments([x]), 0.0, 0.0) == chance_of(moments([x]), 1.0, 0.0)


@pytest.mark.parametrize("values", [2, 5, 50])
def test_chance_of_one_batch_against_simulation(values):
    x = np.random.default_rng(3).normal(7, 3, (values, 200_000))
    mean, log_var = chance_of(moments([x[:, :1]]), float(values), 0.0)
    assert mean == pytest.approx((((x.mean(0) - 7) / 3) ** 2).mean(), rel=0.02)
    assert log_var == pytest.approx((np.log(x.var(0, ddof=1) / 9) ** 2).mean(), rel=0.02)


# --- each code -----------------------------------------------------------------------------------


def judged(layer, x, gap=None, exact=None, number=8):
    return check_drift(
        "norm", layer, drift_of(layer, moments(list(x.split(len(x) // number))), 16.0), gap, exact
    )


@pytest.fixture
def x():
    return torch.randn(800, 6, dtype=torch.float64) * 3 + 2


def test_statistics_of_the_data_are_fine(x):
    assert judged(layer_with(x.mean(0), x.var(0)), x) == []
    assert check_drift("norm", layer_with([0.0], [1.0]), None, None, None) == []


def test_stale_ones_are_not(x):
    layer = layer_with(x.mean(0) + 2 * x.std(0), 4 * x.var(0))
    for gap, severity in ((0.05, "warning"), (0.3, "error"), (math.nan, "error"), (None, "error")):
        (finding,) = judged(layer, x, gap)
        assert (finding.code, finding.severity, finding.layer) == ("BN101", severity, "norm")
    assert "mean off by 2 σ, variance by a factor of 4" in finding.message
    evidence = finding.evidence
    assert evidence["mean_drift"] == pytest.approx(2, rel=1e-3)
    assert evidence["var_drift"] == pytest.approx(math.log(4), rel=1e-3)
    assert 0 < evidence["mean_drift_by_chance"] < 0.3
    assert 0 < evidence["var_drift_by_chance"] < 0.3
    assert evidence["updates"] == 1000
    assert "recalibrate(model, batches)" in finding.remedy


@pytest.mark.parametrize("far", ["mean", "var"])
def test_either_of_both_is_enough(x, far):
    mean, var = x.mean(0), x.var(0)
    layer = layer_with(mean + 1 * x.std(0), var) if far == "mean" else layer_with(mean, var * 3)
    assert [finding.code for finding in judged(layer, x)] == ["BN101"]
    # And one channel of six is, if it is far enough.
    mean[3] += 9
    assert judged(layer_with(mean, var), x)[0].evidence["worst_channels"][0] == 3


def test_a_little_drift_that_does_much(x):
    layer = layer_with(x.mean(0) + 0.3 * x.std(0), x.var(0))
    assert judged(layer, x, gap=0.4, exact=0.0) == []  # not so much
    assert judged(layer, x, gap=2.0, exact=1.9) == []  # exact ones would not help
    assert judged(layer, x, gap=2.0) == []
    assert judged(layer_with(x.mean(0), x.var(0)), x, gap=2.0, exact=0.1) == []  # no drift at all
    (finding,) = judged(layer, x, gap=2.0, exact=0.1)
    assert (finding.code, finding.severity) == ("BN101", "error")
    assert "with exact ones this layer alone would move the output by 0.1, not 2" in finding.message


def test_never_updated(x):
    (finding,) = judged(nn.BatchNorm1d(6), x)
    assert (finding.code, finding.severity) == ("BN105", "error")
    new = nn.BatchNorm1d(6)
    assert never_updated(new)
    assert never_updated(layer_with([0.0], [1.0], momentum=0.0))
    # A state dict may have brought the counter alone; or it is data of that kind.
    (finding,) = judged(layer_with([0.0] * 6, [1.0] * 6), x)
    assert finding.code == "BN105"
    assert judged(layer_with([0.0] * 6, [1.0] * 6), (x - x.mean(0)) / x.std(0)) == []
    for attribute in ("running_mean", "running_var"):
        loaded = nn.BatchNorm1d(6)
        getattr(loaded, attribute)[2] = 0.5
        assert not never_updated(loaded)
    new.num_batches_tracked = None  # an old checkpoint
    assert never_updated(new)


@pytest.mark.parametrize("momentum", [0.1, 0.01])
def test_too_few_updates(x, momentum):
    layer = nn.BatchNorm1d(6, momentum=momentum, dtype=torch.float64)
    updates = 0
    while (1 - momentum) ** updates > 0.04:
        found = [finding.code for finding in judged(layer, x)]
        left = (1 - momentum) ** updates
        assert initial_share(layer) == pytest.approx(left)
        assert found == (["BN105"] if not updates else ["BN102"] if left > 0.05 else [])
        layer(x)
        updates += 1
    assert judged(layer, x) == []


def test_too_few_updates_in_numbers(x):
    layer = nn.BatchNorm1d(6, dtype=torch.float64)
    for _ in range(5):
        layer(x)
    (finding,) = judged(layer, x)
    assert finding.message.startswith("after 5 updates with momentum 0.1, 59% of the running")
    assert finding.evidence["initial_share"] == pytest.approx(0.9**5)
    assert finding.evidence["initial_share_seen"] == pytest.approx(0.9**5, rel=0.01)
    assert finding.evidence["updates"] == 5


@pytest.mark.parametrize("updates", [0, 5])
def test_a_counter_that_does_not_know_where_the_statistics_came_from(x, updates):
    """Of a checkpoint of another framework, which kept none."""
    assert judged(layer_with(x.mean(0), x.var(0), updates=updates), x) == []
    assert [f.code for f in judged(layer_with(x.mean(0) + 9, x.var(0), updates=5), x)] == ["BN101"]


def test_initial_values_that_are_the_datas_are_no_loss():
    x = torch.randn(800, 6, dtype=torch.float64) * 1.01 + 0.02
    layer = nn.BatchNorm1d(6, dtype=torch.float64)
    layer(x)
    assert drift_of(layer, moments([x, x]), 800.0).initial_share is None
    assert judged(layer, x) == []


def test_plain_averages_hold_nothing_of_the_initial_values(x):
    layer = nn.BatchNorm1d(6, momentum=None, dtype=torch.float64)
    layer(x)
    assert initial_share(layer) is None
    assert judged(layer, x) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer = nn.BatchNorm1d(4).to(dtype)
    (finding,) = check_buffers("norm", layer)
    assert (finding.code, finding.severity) == ("BN106", "warning")
    assert finding.evidence == {"dtype": str(dtype).removeprefix("torch.")}
    assert check_buffers("norm", BatchNorm(4).to(dtype)) == []  # keeps them in float32
    # What takes no steps has none that could be rounded away.
    assert check_buffers("norm", layer, still=True) == []
    # The remedy: float32 for the layer alone still takes what comes.
    unfrozen = nn.BatchNorm1d(4).to(dtype).float()
    assert unfrozen(torch.randn(8, 4, dtype=dtype)).dtype == dtype
    assert check_buffers("norm", unfrozen) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_not_finite(value, buffer):
    layer = nn.BatchNorm1d(30)
    getattr(layer, buffer)[[2, 5]] = value
    (finding,) = check_buffers("norm", layer)
    assert (finding.code, finding.severity) == ("BN103", "error")
    assert finding.evidence == {"channels": [2, 5], "number": 2}
    assert "2 of 30 channels are NaN or infinite" in finding.message


def test_no_variance():
    layer = nn.BatchNorm1d(30)
    layer.running_var[[1, 4]] = 0
    (finding,) = check_buffers("norm", layer)
    assert (finding.code, finding.severity) == ("BN104", "warning")
    assert finding.evidence == {"channels": [1, 4], "number": 2, "negative": 0}
    assert "is 0: evaluation multiplies by 1/√eps" in finding.message
    layer.running_var[4] = -1
    (finding,) = check_buffers("norm", layer)
    assert (finding.severity, finding.evidence["negative"]) == ("error", 1)
    assert "negative: evaluation gives NaN" in finding.message


def test_half_precision_does_not_hide_worse():
    layer = nn.BatchNorm1d(4).half()
    layer.running_mean[0] = torch.nan
    assert [finding.code for finding in check_buffers("norm", layer)] == ["BN106", "BN103"]
    layer.running_mean[0], layer.running_var[0] = 0, 0
    assert [finding.code for finding in check_buffers("norm", layer)] == ["BN106", "BN104"]
    assert check_buffers("norm", nn.BatchNorm1d(4, track_running_stats=False)) == []


def test_batches_held():
    held = statistics._batches_held
    assert held(layer_with([0.0], [1.0], updates=1000, momentum=0.1)) == pytest.approx(19)
    assert held(layer_with([0.0], [1.0], updates=7, momentum=0.1)) == 7
    assert held(layer_with([0.0], [1.0], updates=7, momentum=None)) == 7
    assert held(layer_with([0.0], [1.0], updates=0)) == 1
    uncounted = layer_with([0.0], [1.0])
    uncounted.num_batches_tracked = None
    assert held(uncounted) == 1
