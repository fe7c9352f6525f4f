"""What the playground trains, against the same networks written by hand."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("gradio")  # the package's import asks for it

from batchnorm.lab import training as lab_training
from batchnorm.lab.data import load
from batchnorm.playground.settings import EVERY, Settings
from batchnorm.playground.training import (
    ARMS,
    BINS,
    NORMALIZED,
    PLAIN,
    Histogram,
    train,
)

SMALL = {"depth": 2, "width": 16, "batch": 32, "steps": 12, "rate": 0.3, "activation": "tanh"}


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def by_hand(settings, data, normalized):
    """Losses and gradients of the weights before each step, in float64, by the article's formulas.

    The weights are drawn as the layers are, in float32.
    """
    draws = torch.Generator().manual_seed(settings.seed)
    x, y, *_ = (torch.tensor(part).flatten(1) if part.ndim > 1 else torch.tensor(part)
                for part in (data.x_train, data.y_train))  # fmt: skip
    sizes = [x.shape[1], *[settings.width] * settings.depth, data.classes]
    weights, biases, scales = [], [], []
    for fan_in, fan_out in itertools.pairwise(sizes):
        std = math.sqrt(2 / (fan_in + fan_out))
        drawn = torch.empty(fan_out, fan_in).normal_(std=std, generator=draws)
        weights.append(drawn.double().requires_grad_())
        biases.append(torch.zeros(fan_out, dtype=torch.float64, requires_grad=True))
        scales.append(torch.ones(fan_out, dtype=torch.float64, requires_grad=True))
    order = torch.Generator().manual_seed(lab_training.ORDER_OFFSET + settings.seed)
    rows = torch.randperm(len(x), generator=order)
    for number in range(settings.steps + 1):
        chosen = rows[number * settings.batch : (number + 1) * settings.batch]
        h = x[chosen].double()
        for layer in range(settings.depth):
            z = h @ weights[layer].T
            if normalized:
                z = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() * scales[layer]
            h = (z + biases[layer]).tanh()
        loss = cross_entropy(h @ weights[-1].T + biases[-1], y[chosen])
        every = [*weights, *biases, *(scales[:-1] if normalized else ())]
        gradients = torch.autograd.grad(loss, every)
        yield float(loss.detach()), [float(g.norm()) for g in gradients[: len(weights)]]
        with torch.no_grad():
            for parameter, gradient in zip(every, gradients, strict=True):
                parameter.sub_(gradient, alpha=settings.rate)


@pytest.mark.parametrize("arm", ARMS)
def test_losses_and_gradients_are_those_of_the_formulas(arm, digits):
    settings = Settings(**SMALL, seed=3)
    wanted = list(by_hand(settings, digits, arm == NORMALIZED))
    shots = list(train(settings, digits))
    assert [shot.step for shot in shots] == [0, 5, 10, 12]
    before = -1
    for shot in shots:
        look = shot.looks[arm]
        losses = [loss for loss, _ in wanted[before + 1 : shot.step + 1]]
        # float32 against float64, over a dozen steps that do not amplify.
        assert look.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert look.gradients == pytest.approx(wanted[shot.step][1], rel=1e-4)
        before = shot.step


def test_both_networks_begin_with_the_same_weights(digits):
    """The first layer sees the same; its activation is given it with normalization or without."""
    settings = Settings(**{**SMALL, "steps": EVERY})
    first = next(train(settings, digits)).looks
    draws = torch.Generator().manual_seed(0)
    std = math.sqrt(2 / (64 + 16))
    weights = torch.empty(16, 64).normal_(std=std, generator=draws)
    order = torch.Generator().manual_seed(lab_training.ORDER_OFFSET)
    rows = torch.randperm(len(digits.x_train), generator=order)[:32]
    z = torch.tensor(digits.x_train).flatten(1)[rows] @ weights.T
    normalized = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()
    for arm, values in ((PLAIN, z), (NORMALIZED, normalized)):
        found = first[arm].histograms[0]
        assert found.std == pytest.approx(float(values.std(correction=0)), rel=1e-5)
        bins = (values.clamp(-5, 5).flatten() + 5) / 10 * BINS
        wanted = torch.bincount(bins.floor().clamp(max=BINS - 1).long(), minlength=BINS)
        # A value on an edge may be rounded to either side.
        assert sum(abs(a - int(b)) for a, b in zip(found.counts, wanted, strict=True)) <= 2


def test_accuracy_is_that_of_evaluation(digits):
    """Training longer than the test looks at must not change what was seen before."""
    short, long = (list(train(Settings(**{**SMALL, "steps": steps}), digits)) for steps in (20, 40))
    assert [shot.looks for shot in long[:4]] == [shot.looks for shot in short[:4]]
    for arm in ARMS:
        assert short[0].looks[arm].accuracy < 0.3
        assert long[-1].looks[arm].accuracy > 0.6


def test_every_value_is_counted_once(digits):
    settings = Settings(**SMALL, init="1")  # leaves ±5
    for shot in train(settings, digits):
        for look in shot.looks.values():
            assert len(look.histograms) == settings.depth
            for histogram in look.histograms:
                assert sum(histogram.counts) == settings.batch * settings.width
    assert Histogram.of(torch.tensor([-9.0, -5.0, 0.1, 5.0, 1e30])).counts[:: BINS // 2] == (2, 1)


def test_it_stops_before_the_next_step(digits):
    asked = []

    def stopped():
        asked.append(True)
        return len(asked) > 8

    shots = list(train(Settings(), digits, stopped))
    assert (len(asked), [shot.step for shot in shots]) == (9, [0, 5])


def test_a_network_that_diverges_is_left_and_the_other_goes_on(digits):
    settings = Settings(activation="ReLU", init="He", rate=2.0, steps=30)
    shots = list(train(settings, digits))
    assert shots[-1].step == 30
    gone = next(shot.looks[PLAIN] for shot in shots if shot.looks[PLAIN].diverged is not None)
    assert 0 < gone.diverged < 10
    # What it was before is still to be seen, and stays.
    assert math.isfinite(gone.loss)
    assert all(map(math.isfinite, gone.gradients))
    assert shots[-1].looks[PLAIN] == gone
    assert shots[-1].looks[NORMALIZED].diverged is None
    assert shots[-1].looks[NORMALIZED].accuracy > 0.7
    assert math.isfinite(shots[-1].looks[NORMALIZED].loss)


@pytest.mark.filterwarnings("ignore::batchnorm.NonFiniteWarning")  # what the layer says of it
def test_nothing_is_left_to_train():
    """Both diverge when the data are not finite; the run ends by itself."""
    bad = load("digits")
    bad.x_train[:] = float("inf")
    (shot,) = train(Settings(activation="ReLU"), bad)
    assert {look.diverged for look in shot.looks.values()} == {0}
    assert shot.looks[PLAIN].histograms == ()
