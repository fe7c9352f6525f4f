import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import BatchNorm
from batchnorm.lab import landscape, training
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import covariate_shift as c
from batchnorm.lab.tuning import EVALUATION, FIRST_TUNING_SEED, SWEEP
from lab_rehearsal import filed, rehearse

TINY = dataclasses.replace(
    c.PROFILES["quick"], seeds=2, rates=(0.03, 0.1, 10.0), steps=12, every=5, probe=40, depth=2,
    width=12,
)  # fmt: skip


def trial(arm, **fields):
    names = ("steps", "every", "level", "probe", "depth", "width", "batch")
    given = {name: getattr(TINY, name) for name in names}
    given |= {"stage": EVALUATION, "seed": 3, "rate": 0.1}
    return c.ShiftTrial(arm=arm, **(given | fields))


def test_rehearsal():
    runs, findings = rehearse(c.EXPERIMENT, TINY)
    assert any(not r.measured["learned"] for r in runs), "a rate of 10 is to be too much for one"
    assert any("judged did not learn" in line for line in findings.caveats) == any(
        not r.measured["learned"] for r in runs if r.trial.stage == EVALUATION
    )


def test_the_arms_of_a_seed_differ_in_normalization_and_noise_alone():
    nets = {arm: c.build(trial(arm), 64, 10) for arm in c.ARMS}
    for arm, net in nets.items():
        modules = list(net.modules())
        assert sum(isinstance(m, BatchNorm) for m in modules) == 2 * ("BatchNorm" in arm)
        assert sum(isinstance(m, landscape.Noise) for m in modules) == 2 * ("noise" in arm)
    linears = [[m for m in net if isinstance(m, nn.Linear)] for net in nets.values()]
    for layers in zip(*linears, strict=True):
        assert all(torch.equal(layers[0].weight, other.weight) for other in layers)
    x = torch.randn(30, 12)
    noises = [
        [m for m in nets[a].modules() if isinstance(m, landscape.Noise)]
        for a in (c.NOISY, c.NOISY_PLAIN)
    ]
    assert torch.equal(noises[0][0](x), noises[1][0](x))
    assert not torch.equal(noises[0][0](x), noises[0][1](x))


def received(net, x):
    """What the second and third dense layer receive, by hooks, in float64."""
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].double().numpy()))
        for layer in [m for m in net if isinstance(m, nn.Linear)][1:]
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return seen


def keeping(net, x):
    """Mean and variance of what each nn.BatchNorm1d receives, by hooks."""
    seen, norms = [], [m for m in net if isinstance(m, nn.BatchNorm1d)]
    hooks = [n.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for n in norms]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return [(z.mean(0), z.var(0, correction=0)) for z in seen]


def keep(net, held):
    """A copy in evaluation, with these as running statistics."""
    kept = copy.deepcopy(net).eval()
    norms = [m for m in kept if isinstance(m, nn.BatchNorm1d)]
    for norm, (mean, variance) in zip(norms, held, strict=True):
        norm.running_mean, norm.running_var = mean, variance
    return kept


def distance(a, b):
    squares = np.square(np.sort(a, axis=0) - np.sort(b, axis=0)).mean(0)
    return math.sqrt(squares.sum() / ((a.var(0) + b.var(0)).sum() / 2))


@pytest.mark.parametrize("arm", c.ARMS)
def test_run_equals_the_same_training_written_with_torchs_own_parts(arm):
    """Losses, and the shift at each look, with nn.BatchNorm1d, backward() and optim.SGD."""
    data, t = load("digits"), trial(arm)
    found = c.run(t, data).measured
    net = c.build(t, 64, 10)
    for index, layer in enumerate(net):
        if isinstance(layer, BatchNorm):
            net[index] = nn.BatchNorm1d(12)
    x, y, _, _ = training.tensors(data)
    optimizer = torch.optim.SGD(net.parameters(), t.rate)
    losses, shifts, helds = [], [], []
    for step, rows in zip(range(12), training.batches(len(x), 60, 3), strict=False):
        landscape.set_step(net, step)
        before = received(net, x[:40])
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
        loss.backward()
        off = []
        gradient = [q.grad for q in net.parameters()]
        slope = sum(float(g.double().square().sum()) for g in gradient)
        for length in (0.05, 0.1, 0.2, 0.4) if step == 0 else ():
            other = copy.deepcopy(net)
            with torch.no_grad():
                for p, g in zip(other.parameters(), gradient, strict=True):
                    p.sub_(length * g)
                there = nn.functional.cross_entropy(other(x[rows]), y[rows]).item()
            off.append(abs(there - loss.item() + length * slope) / (length * slope))
        if step == 0:
            assert found["departure"][0] == pytest.approx(max(off), rel=1e-3)
        held = keeping(net, x[:40])
        optimizer.step()
        losses.append(loss.item())
        landscape.set_step(net, step + 1)
        if step % 5 == 0:
            after = received(net, x[:40])
            shifts.append(np.median([distance(*z) for z in zip(before, after, strict=True)]))
            kept = received(keep(net, held), x[:40])
            helds.append(np.median([distance(*z) for z in zip(before, kept, strict=True)]))
    assert found["shift"] == pytest.approx(shifts, rel=1e-3)
    assert found["held"] == pytest.approx(helds, rel=1e-3)
    assert (found["held"] == found["shift"]) == ("BatchNorm" not in arm)
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    windows = [np.mean(losses[:5]), np.mean(losses[5:10]), np.mean(losses[10:])]
    assert found["losses"] == pytest.approx(windows, rel=1e-4)
    assert all(len(found[name]) == 3 for name in c.MEASURES)
    assert (found["counted"], found["learned"]) == (3, True)
    swept = c.run(dataclasses.replace(t, stage=SWEEP), data).measured
    assert swept == {"loss": found["loss"], "learned": True}, "a look changes nothing"


def test_what_overflows_is_large_and_what_is_missing_is_left_out():
    assert c._middle([math.inf, 1.0, math.nan]) == c.LARGEST
    assert c._middle([None, 2.0, 4.0]) == 3.0
    assert c._middle([None]) is None


def test_a_network_that_has_learned_is_no_longer_looked_at():
    data = load("digits")
    t = trial(c.NORMALIZED, rate=0.3, steps=60, level=1.0, width=40)
    found = c.run(t, data)
    means = found.measured["losses"]
    counted = found.measured["counted"]
    assert 1 < counted < len(means)
    assert means[counted - 1] < 1 <= means[counted - 2]
    assert c.value(found, "shift") == np.median(found.measured["shift"][:counted])
    assert c.value(found, "shift") != np.median(found.measured["shift"])


def swept(loss):
    return [
        Run(t, {"loss": loss[t.arm].get(t.rate), "learned": t.rate in loss[t.arm]}, {})
        for t in c.plan(TINY, [])
    ]


def test_plan_tunes_each_arm_and_takes_the_two_without_noise_to_every_rate():
    best = {c.PLAIN: 0.03, c.NORMALIZED: 0.1, c.NOISY_PLAIN: 0.03, c.NOISY: 10.0}
    sweep = c.plan(TINY, [])
    assert {t.stage for t in sweep} == {SWEEP}
    assert len(sweep) == 4 * 3
    assert all(t.seed >= FIRST_TUNING_SEED for t in sweep)
    # A rate at which a network does not learn is never its best.
    plan = c.plan(TINY, swept({arm: {0.1: 0.5, rate: 0.4} for arm, rate in best.items()}))
    assert plan[: len(sweep)] == sweep
    rest = plan[len(sweep) :]
    assert {(t.arm, t.rate) for t in rest if t.stage == EVALUATION} == set(best.items())
    pairs = {(t.arm, t.rate, t.seed) for t in rest}
    assert len(rest) == len(pairs) == 2 * (2 * 3 + 2)
    assert {p for p in pairs if p[0] in c.CLEAN} == {
        (arm, rate, seed) for arm in c.CLEAN for rate in TINY.rates for seed in (0, 1)
    }


OWN = {c.PLAIN: 0.1, c.NORMALIZED: 0.3, c.NOISY_PLAIN: 0.1, c.NOISY: 0.3}
MADE_UP = dataclasses.replace(TINY, seeds=8, rates=(0.03, 0.1, 0.3, 1.0), steps=20, every=10)


def made(factor=lambda arm, rate, name: 1.0):
    """Evaluation runs of 8 seeds; each value is the seed's own, times a factor near the given."""
    runs = []
    for arm in c.ARMS:
        for rate in MADE_UP.rates if arm in c.CLEAN else (OWN[arm],):
            for seed in range(8):
                stage = EVALUATION if rate == OWN[arm] else c.EVERY_RATE

                def at(name, arm=arm, rate=rate, seed=seed):
                    # Any two groups of runs differ, to either side by turns.
                    group = 2 * c.ARMS.index(arm) ** 2 + 10 * rate
                    mine = 1 + 0.005 * (-1) ** seed * group
                    return 0.5 * (1 + 0.1 * seed) * mine * factor(arm, rate, name)

                measured = {name: [at(name), at(name)] for name in c.MEASURES}
                measured |= {"loss": at("loss"), "losses": [1.0, 0.5], "learned": True}
                t = trial(arm, stage=stage, seed=seed, rate=rate, steps=20, every=10)
                runs.append(filed(Run(t, measured | {"counted": 2}, {})))
    return runs


def outcomes(runs):
    found = c.analyse(MADE_UP, runs)
    return [found.verdict.outcome, *(other.verdict.outcome for other in found.also)]


# What each verdict, the main one first, is about: measure, control and treated at their rates.
PLAIN, SAME, BEST = (c.PLAIN, 0.1), (c.NORMALIZED, 0.1), (c.NORMALIZED, 0.3)
NOISY_PLAIN, NOISY = (c.NOISY_PLAIN, 0.1), (c.NOISY, 0.3)
ABOUT = [
    ("shift", PLAIN, BEST),
    ("relative", PLAIN, SAME),
    ("loss", PLAIN, NOISY),
    ("gradient", PLAIN, BEST),
    ("smoothness", PLAIN, BEST),
    ("shift", PLAIN, SAME),
    ("loss", NOISY_PLAIN, NOISY),
    ("departure", PLAIN, BEST),
]
HARM = 6


@pytest.mark.parametrize("number", range(len(ABOUT)))
def test_each_verdict_follows_its_own_measure_in_its_own_runs(number):
    measure, control, treated = ABOUT[number]

    def times(factor):
        def of(arm, rate, name):
            return factor if name == measure and (arm, rate) == treated else 1.0

        return outcomes(made(of))

    assert times(1.0) == ["unresolved"] * len(ABOUT)
    assert times(2.0)[number] == "contradicted"
    less = times(0.5)
    assert less[number] == "reproduced"
    for other, (name, *places) in enumerate(ABOUT):
        if name != measure or treated not in places:
            assert less[other] == "unresolved", (number, other)

    def control_too(arm, rate, name):
        return 0.5 if name == measure and (arm, rate) in (control, treated) else 1.0

    assert outcomes(made(control_too))[number] == "unresolved"


def test_harm_is_what_noise_adds_to_each_network():
    """Half the loss with noise is no harm withstood if the network has half of it without."""

    def of(arm, rate, name):
        return 0.5 if name == "loss" and arm in (c.NORMALIZED, c.NOISY) else 1.0

    assert outcomes(made(of))[HARM] == "unresolved"
    lower = outcomes(made(lambda a, r, n: 0.5 if n == "loss" and a == c.NORMALIZED else 1.0))
    assert lower[HARM] == "contradicted"


def test_claims_have_no_numbers_of_a_profile_and_ours_are_marked():
    """Nothing in them hangs on what was tuned: profiles are compared by the sentence."""
    runs = made()
    also = c.analyse(MADE_UP, runs).also
    assert [a.ours for a in also] == [False] * 4 + [True] * 3
    for r in runs:
        object.__setattr__(r.trial, "rate", r.trial.rate / 2)
    settings = dataclasses.replace(MADE_UP, rates=(0.015, 0.05, 0.15, 0.5))
    assert [a.claim for a in c.analyse(settings, runs).also] == [a.claim for a in also]


def test_sentences_and_table_speak_in_the_runs_own_numbers():
    factors = {
        (PLAIN, "shift"): 20, (BEST, "shift"): 30, (SAME, "shift"): 35, (PLAIN, "relative"): 40,
        (SAME, "relative"): 50, (BEST, "held"): 60, (SAME, "held"): 65, (NOISY, "shift"): 70,
        (NOISY, "loss"): 80, (BEST, "departure"): 90, (PLAIN, "departure"): 95,
    }  # fmt: skip
    runs = made(lambda arm, rate, name: factors.get(((arm, rate), name), 1))
    found = c.analyse(MADE_UP, runs)
    for (arm, rate), name in factors:
        middle = np.median([c.value(r, name) for r in c._at(runs, arm, rate)])
        assert f"{middle:.2g}" in found.summary
    assert "each at its best rate (0.1 and 0.3)" in found.summary
    assert [row[:2] for row in found.table.rows] == [
        ("plain", "0.1"), ("BatchNorm", "0.1"), ("BatchNorm", "0.3"), ("BatchNorm + noise", "0.3"),
        ("plain + noise", "0.1"),
    ]  # fmt: skip
    shift, relative = (
        np.median([c.value(r, name) for r in c._at(runs, *PLAIN)]) for name in ("shift", "relative")
    )
    held = np.median([c.value(r, "held") for r in c._at(runs, *PLAIN)])
    assert found.table.rows[0][3:6] == (f"{shift:.2g}", f"{held:.2g}", f"{relative:.2g}")
    assert found.caveats == (
        "8 verdicts are read off the same runs: of so many, one that is narrow may be chance.",
    )


def test_the_summary_counts_the_rates_at_which_the_shift_of_2018_is_smaller():
    def of(arm, rate, name):
        return {0.03: 0.5, 1.0: 0.5}.get(rate, 2) if (arm, name) == (BEST[0], "relative") else 1

    runs = made(of)
    said = c.analyse(MADE_UP, runs).summary
    assert "the smaller one at 2 of the 4 rates at which both learned" in said
    for r in c._at(runs, c.PLAIN, 1.0):
        r.measured["learned"] = False
    said = c.analyse(MADE_UP, runs).summary
    assert "the smaller one at 1 of the 3 rates at which both learned" in said


def test_caveats_name_rates_at_the_edge_and_networks_that_did_not_learn():
    runs = made()
    runs[8].measured["learned"] = False
    assert (runs[8].trial.arm, runs[8].trial.rate) == PLAIN
    assert c.value(runs[8], "shift") is None
    assert c.value(runs[9], "shift") is not None
    settings = dataclasses.replace(MADE_UP, rates=(0.03, 0.1, 0.3))
    found = c.analyse(settings, [r for r in runs if r.trial.rate <= 0.3])
    edges = [line for line in found.caveats if "on the edge" in line]
    named = [line.split(" network")[0].split("the ")[-1] for line in edges]
    assert named == [c.NORMALIZED, c.NOISY]
    assert any(line.startswith("1 run judged did not learn") for line in found.caveats)


def test_curves_of_a_run_that_diverged_end_early_and_the_rings_are_at_the_best_rates():
    runs = made(lambda arm, rate, name: 3 if (arm, rate) == BEST else 1)
    for r in runs:
        if r.trial.arm == c.NOISY_PLAIN:
            r.measured["losses"] = [2.0, None]
            r.measured["shift"] = [0.25]
    pictures = {p.name: p.figure for p in c.figures(MADE_UP, runs)}
    lines = {line.get_label(): line for line in pictures["inputs"].axes[0].get_lines()}
    assert list(lines[c.NOISY_PLAIN].get_xdata()) == [1, 11]
    assert lines[c.NOISY_PLAIN].get_ydata()[0] == 0.25
    assert math.isnan(lines[c.NOISY_PLAIN].get_ydata()[1])
    panels = pictures["rates"].axes
    assert len(panels) == 3
    for axes, name in zip(panels, ("shift", "relative", "departure"), strict=True):
        rings = [line for line in axes.get_lines() if line.get_markersize() == 13]
        expected = {
            (rate, np.median([c.value(r, name) for r in c._at(runs, arm, rate)]))
            for arm, rate in (PLAIN, BEST)
        }
        assert {(r.get_xdata()[0], r.get_ydata()[0]) for r in rings} == expected
