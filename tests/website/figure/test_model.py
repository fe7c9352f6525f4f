"""The figure's numbers against the layer itself, and its random numbers against the normal law."""

import copy
import math
from itertools import pairwise
from statistics import NormalDist, correlation, fmean, pvariance

import pytest
import torch

from batchnorm import BatchNorm
from figure_page import START, run

pytestmark = pytest.mark.slow  # a browser starts

SETTINGS = [
    {},
    {"size": 2},
    {"size": 2, "momentum": 1, "offset": -6, "gamma": -1.5, "beta": 2},
    {"size": 4, "momentum": 0.01, "spread": 0.5, "seed": 8},
    {"size": 256, "momentum": 0.5, "offset": 0, "spread": 3, "gamma": 0.3, "beta": -3},
    {"size": 8, "gamma": 0, "beta": 1},
]
UPDATES = (0, 1, 10, 100)


def batch(page, step, **settings):
    return page.evaluate(
        "([settings, step]) => BNFigure.model.batch(settings, step)", [START | settings, step]
    )


def column(values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_numbers_are_the_layers(page, settings):
    batches = page.evaluate(
        """settings => Array.from({ length: 101 },
            (_, step) => BNFigure.model.batch(settings, step))""",
        START | settings,
    )
    wanted = START | settings
    layer = BatchNorm(1, momentum=wanted["momentum"], dtype=torch.float64)
    torch.nn.init.constant_(layer.weight, wanted["gamma"])
    torch.nn.init.constant_(layer.bias, wanted["beta"])
    # Sums of at most 256 numbers below 20 in float64; of a pair that lies close, some digits fewer.
    close = {"rtol": 1e-10, "atol": 1e-12}
    for updates in range(101):
        if updates:
            layer.train()(column(batches[updates]))
        if updates not in UPDATES:
            continue
        for mode in ("train", "eval"):
            found = run(page, **settings, updates=updates, mode=mode)
            assert found["input"] == batches[0]
            shown = copy.deepcopy(layer).train(mode == "train")
            output = shown(column(batches[0])).detach()
            torch.testing.assert_close(column(found["output"]), output, **close)
            running = (found["running"]["mean"], found["running"]["variance"])
            truth = (layer.running_mean.item(), layer.running_var.item())
            assert running == pytest.approx(truth, rel=1e-10, abs=1e-12)
            assert (found["means"][updates], found["variances"][updates]) == running
            assert found["result"]["mean"] == pytest.approx(output.mean().item(), abs=1e-10)
            deviation = output.std(correction=0).item()
            assert found["result"]["deviation"] == pytest.approx(deviation, abs=1e-10)


def test_the_errors_are_those_of_the_running_statistics(page):
    found = run(page, offset=-3, spread=0.5, updates=20, momentum=0.05)
    assert found["left"] == pytest.approx(0.95**20)
    assert found["meanError"] == pytest.approx((found["means"][20] + 3) / 0.5)
    assert found["varianceRatio"] == pytest.approx(found["variances"][20] / 0.25)
    deviation = math.sqrt(found["variances"][20])
    assert found["running"]["deviation"] == pytest.approx(deviation)


def test_each_step_is_the_batch_of_its_update(page):
    steps = run(page, size=16)["steps"]
    assert len(steps) == 100
    for step in (1, 50, 100):
        values = column(batch(page, step, size=16))
        assert steps[step - 1]["mean"] == pytest.approx(values.mean().item())
        assert steps[step - 1]["variance"] == pytest.approx(values.var().item())


def test_a_slider_moves_only_what_it_is_for(page):
    """The same draws serve all settings: a smaller batch begins a larger one."""
    whole = batch(page, 3, size=256)
    assert len(set(whole)) == 256
    assert batch(page, 3, size=8) == whole[:8]
    assert batch(page, 3, size=256, momentum=1, updates=90, mode="eval", gamma=2) == whole
    moved = batch(page, 3, size=256, offset=-1, spread=1)
    assert [2 * (value + 1) + 5 for value in moved] == pytest.approx(whole)
    assert not set(whole) & set(batch(page, 4, size=256))
    assert not set(whole) & set(batch(page, 3, size=256, seed=8))


@pytest.mark.parametrize("seed", [1, 7, 8, 2**31])
def test_the_draws_are_normal(page, seed):
    count = 25_856  # all that a figure draws
    draws = page.evaluate("([s, n]) => BNFigure.model.normals(s, n)", [seed, count])
    assert draws == page.evaluate("([s, n]) => BNFigure.model.normals(s, n)", [seed, count])
    # Each bound is passed by chance less than once in a thousand times.
    assert abs(fmean(draws)) < 3.3 / math.sqrt(count)
    assert abs(pvariance(draws) - 1) < 3.3 * math.sqrt(2 / count)
    assert abs(correlation(draws[1:], draws[:-1])) < 3.3 / math.sqrt(count)
    assert abs(correlation(draws[::2], draws[1::2])) < 3.3 / math.sqrt(count / 2)
    normal = NormalDist()
    ranked = [normal.cdf(value) for value in sorted(draws)]
    distance = max(abs(place - (rank + 0.5) / count) for rank, place in enumerate(ranked))
    assert distance < 1.95 / math.sqrt(count)  # Kolmogorov and Smirnov's


def test_seeds_give_draws_of_their_own(page):
    draws = [
        page.evaluate("seed => BNFigure.model.normals(seed, 10000)", seed) for seed in (7, 8, 9)
    ]
    for one, other in pairwise(draws):
        assert abs(correlation(one, other)) < 3.3 / 100
        assert not set(one) & set(other)


@pytest.mark.parametrize("width", [0.125, 0.5, 2])
def test_bars_have_an_area_of_one_and_hold_what_is_near_them(page, width):
    values = batch(page, 0, size=256)
    bars = page.evaluate(
        "([values, width]) => [...BNFigure.model.histogram(values, width)]", [values, width]
    )
    assert sum(share * width for _, share in bars) == pytest.approx(1)
    for place, share in bars:
        inside = sum((place - 0.5) * width <= value < (place + 0.5) * width for value in values)
        assert share == pytest.approx(inside / 256 / width)


def test_the_density_is_the_normal_one(page):
    for value, mean, deviation in [(0, 0, 1), (3, 5, 2), (-2, 1, 0.5)]:
        found = page.evaluate("given => BNFigure.model.density(...given)", [value, mean, deviation])
        assert found == pytest.approx(NormalDist(mean, deviation).pdf(value))


def test_bars_are_narrower_for_more_values_and_never_too_thin(page):
    widths = [
        page.evaluate("given => BNFigure.model.barWidth(...given)", given)
        for given in [(2, 256), (2, 64), (2, 2), (0, 64), (50, 2)]
    ]
    assert widths == [0.5, 1, 2, 0.125, 2]
