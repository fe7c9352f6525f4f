"""What the page says of its examples is so, with two seeds."""

import itertools
from dataclasses import replace

import pytest

pytest.importorskip("gradio")  # the package's import asks for it

from batchnorm.lab.data import load
from batchnorm.playground.presets import PRESETS
from batchnorm.playground.training import NORMALIZED, PLAIN, train

SEEDS = range(2)


def runs(name):
    """The first and the last look at each network, and all snapshots, for each seed."""
    for seed in SEEDS:
        shots = list(train(replace(PRESETS[name], seed=seed), load("digits")))
        yield [(shots[0].looks[arm], shots[-1].looks[arm]) for arm in (PLAIN, NORMALIZED)], shots


@pytest.mark.slow
def test_sigmoid():
    for ((start, plain), (_, normalized)), shots in runs("sigmoid"):
        assert plain.accuracy < 0.15
        for look in (start, plain):
            assert all(a < b for a, b in itertools.pairwise(look.gradients))
            assert look.gradients[0] < look.gradients[-1] / 300
        assert max(normalized.gradients) < 4 * min(normalized.gradients)
        assert any(shot.looks[NORMALIZED].accuracy > 0.9 for shot in shots if shot.step <= 100)


@pytest.mark.slow
def test_small():
    for ((start, plain), (_, normalized)), _ in runs("small"):
        spreads = [histogram.std for histogram in start.histograms]
        assert all(b < a / 10 for a, b in itertools.pairwise(spreads))
        assert plain.histograms[-1].std < plain.histograms[0].std / 100
        assert all(0.7 < histogram.std < 1.5 for histogram in normalized.histograms)
        assert plain.accuracy < 0.15
        assert normalized.accuracy > 0.9


@pytest.mark.slow
def test_fast():
    for ((_, plain), (_, normalized)), _ in runs("fast"):
        assert plain.diverged is not None
        assert plain.diverged < 10
        assert normalized.diverged is None
        assert normalized.accuracy > 0.9


@pytest.mark.slow
def test_shallow():
    for ((_, plain), (_, normalized)), _ in runs("shallow"):
        assert min(plain.accuracy, normalized.accuracy) > 0.95
        assert abs(plain.accuracy - normalized.accuracy) < 0.02


@pytest.mark.slow
def test_deep():
    for ((_, plain), (start, normalized)), _ in runs("deep"):
        norms = start.gradients[:-1]  # the head's has another shape
        assert norms[0] > 10 * norms[-1]
        assert all(a > b for a, b in zip(norms, norms[2:], strict=False))
        assert plain.accuracy > normalized.accuracy + 0.1


@pytest.mark.slow
def test_tiny():
    for ((_, plain), (start, normalized)), _ in runs("tiny"):
        # ±1 before γ and β, which do nothing yet; a unit whose two values are equal has 0.
        (first, *_) = start.histograms
        assert sum(first.counts[i] for i in (20, 29, 30, 19)) > 0.9 * sum(first.counts)
        assert plain.accuracy > normalized.accuracy + 0.3


def test_there_is_a_test_for_each():
    assert all(f"test_{name}" in globals() for name in PRESETS)
