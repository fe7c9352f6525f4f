import dataclasses
import math

import pytest
import torch
from torch import nn

import lab_by_hand
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import rates as r
from batchnorm.lab.verdict import CONTRADICTED, REPRODUCED, UNRESOLVED
from lab_rehearsal import filed, rehearse

TINY = dataclasses.replace(
    r.PROFILES["quick"], seeds=2, rates=(0.03, 0.1, 0.3), steps=20, depth=2, width=16
)
SETTINGS = dataclasses.replace(r.PROFILES["quick"], seeds=3, rates=(0.1, 1.0, 10.0))


def test_rehearsal():
    runs, findings = rehearse(r.EXPERIMENT, TINY)
    assert len(runs) == 2 * 3 * 2
    assert [also.ours for also in findings.also] == [False, False, True]


def trial(arm, **fields):
    given = {"rate": 0.1, "steps": 25, "depth": 3, "width": 20, "batch": 60, "seed": 7}
    return r.RatesTrial(stage="rates", arm=arm, **(given | fields))


@pytest.mark.parametrize("arm", r.ARMS)
def test_run_equals_the_same_training_written_with_torchs_own_parts(arm):
    data, t = load("digits"), trial(arm)
    norm = nn.BatchNorm1d if arm == r.NORMALIZED else lambda channels: None
    net = lab_by_hand.mlp([64, 20, 20, 20, 10], norm, 7)
    x, y = torch.from_numpy(data.x_train).flatten(1), torch.from_numpy(data.y_train)
    losses = lab_by_hand.train(
        net, x, y, rate=0.1, steps=25, batch=60, seed=7, momentum=0, decay=False
    )
    found = r.run(t, data).measured
    # float32 rounding, grown over 25 steps; one test image is 0.002.
    assert found["loss"] == pytest.approx((losses[-1] + losses[-2]) / 2, rel=1e-3)
    assert found["accuracy"] == pytest.approx(1 - lab_by_hand.error(net, data), abs=0.0041)


def test_a_network_that_diverges_is_at_chance_and_has_no_loss():
    data = load("digits")
    found = filed(r.run(trial(r.PLAIN, rate=1e6), data)).measured
    assert found["loss"] is None
    assert found["accuracy"] == pytest.approx((data.y_test == 0).mean())


def test_plan_has_every_rate_of_both_arms_with_every_seed():
    wanted = r.plan(r.PROFILES["quick"], [])
    assert len(wanted) == 7 * 2 * 4
    assert {(t.arm, t.rate, t.seed) for t in wanted} == {
        (arm, rate, seed)
        for arm in r.ARMS
        for rate in r.PROFILES["quick"].rates
        for seed in range(4)
    }


def made(plain, normalized, settings=SETTINGS):
    """Made-up runs: for each arm the accuracies by rate, a tuple a seed or the same for all."""
    tables = {r.PLAIN: plain, r.NORMALIZED: normalized}
    runs = []
    for t in r.plan(settings, []):
        given = tables[t.arm][t.rate]
        accuracy = given[t.seed] if isinstance(given, tuple) else given
        runs.append(Run(t, {"accuracy": accuracy, "loss": 2 - accuracy}, {}))
    return runs


def outcomes(findings):
    return [findings.verdict.outcome, *(also.verdict.outcome for also in findings.also)]


LOW = {0.1: 0.95, 1.0: 0.5, 10.0: 0.1}
HIGH = {0.1: 0.3, 1.0: 0.98, 10.0: 0.1}


def test_a_rate_ten_times_larger_is_a_decade():
    found = r.analyse(SETTINGS, made(LOW, HIGH))
    assert found.verdict.differences == pytest.approx([1, 1, 1])
    best, shared, small = (also.verdict.mean for also in found.also)
    assert best == pytest.approx(98 - 95)
    assert shared == pytest.approx(95 - 30)  # for the claim: the normalized one is the worse
    assert small == pytest.approx(30 - 95)
    assert outcomes(found) == [REPRODUCED] * 3 + [CONTRADICTED]
    assert found.table.rows == (
        ("plain", "0.1", "0.1", "95.0%", "95.0%"),
        ("BatchNorm", "1", "1", "98.0%", "30.0%"),
    )
    assert "was 0.1 without and 1 with BatchNorm" in found.summary
    assert "to 95.0%, the normalized one to 98.0% (at the plain one's best rate, to 30.0%)" in (
        found.summary
    )
    assert (
        "At 0.1, the smallest rate, 200 steps brought the plain network to 95.0%" in found.summary
    )
    assert [line for line in found.caveats if "plain network, 0.1, is on the edge" in line]


def test_the_other_way_round_contradicts():
    found = r.analyse(SETTINGS, made(HIGH, LOW))
    assert found.verdict.differences == pytest.approx([-1, -1, -1])
    # At the plain network's best rate, larger than its own, the normalized one is worse here, too.
    assert outcomes(found) == [CONTRADICTED, CONTRADICTED, REPRODUCED, REPRODUCED]


def test_better_at_the_shared_rate_contradicts_that_the_gain_is_the_larger_rates():
    found = r.analyse(SETTINGS, made(LOW, {0.1: 0.97, 1.0: 0.98, 10.0: 0.1}))
    assert outcomes(found) == [REPRODUCED, REPRODUCED, CONTRADICTED, REPRODUCED]


def test_claims_are_one_sentence_in_all_profiles():
    def claims(settings):
        return [also.claim for also in r.analyse(settings, made(LOW, HIGH, settings)).also]

    fewer = dataclasses.replace(SETTINGS, rates=SETTINGS.rates[1:], steps=7)
    assert claims(SETTINGS) == claims(fewer)


def test_no_difference_is_unresolved():
    assert outcomes(r.analyse(SETTINGS, made(LOW, LOW))) == [UNRESOLVED] * 4


def test_no_seed_has_a_say_in_the_rate_that_it_is_judged_at():
    """Each seed is bad at the very rate that is best for the others, which is its own by rule."""
    low, high = 0.4, 0.95
    normalized = {0.1: (low, high, high), 1.0: (high, low, high), 10.0: (high, high, low)}
    plain = {0.1: (high, high, low), 1.0: (low, high, high), 10.0: (high, low, high)}
    runs = made(plain, normalized)
    assert r.best_for_others(r.by_rate(SETTINGS, runs, r.NORMALIZED)) == [0.1, 1.0, 10.0]
    assert r.best_for_others(r.by_rate(SETTINGS, runs, r.PLAIN)) == [1.0, 10.0, 0.1]
    found = r.analyse(SETTINGS, runs)
    best, shared, _ = (also.verdict.differences for also in found.also)
    assert best == pytest.approx([0, 0, 0])
    assert shared == pytest.approx([100 * (low - high)] * 3)
    assert outcomes(found)[1:3] == [UNRESOLVED, CONTRADICTED]
    assert found.table.rows[1][2:4] == ("1 (0.1–10)", "40.0%")


def test_the_largest_rate_may_lie_above_one_that_failed():
    holes = {0.1: 0.95, 1.0: 0.2, 10.0: 0.9}
    found = r.analyse(SETTINGS, made(LOW, holes))
    assert [line for line in found.caveats if "BatchNorm network still learned at 10" in line]
    assert not [line for line in found.caveats if "plain network still learned" in line]


def test_a_seed_that_never_learned_counts_as_one_step_of_the_grid_below():
    plain = {0.1: (0.95, 0.2, 0.95), 1.0: 0.5, 10.0: 0.1}
    found = r.analyse(SETTINGS, made(plain, HIGH))
    assert found.verdict.differences == pytest.approx([1, 2, 1])
    assert found.table.rows[0][1] == "0.1 (none–0.1)"
    assert [c for c in found.caveats if "With 1 of 3 seeds the plain network got to 90% at no" in c]
    assert [c for c in found.caveats if "counted as 0.01, below" in c]


def test_figures_draw_medians_and_leave_out_what_diverged():
    runs = made({0.1: (0.7, 0.9, 0.95), 1.0: 0.5, 10.0: 0.1}, HIGH)
    for run in runs:
        if run.trial.arm == r.PLAIN and run.trial.rate == 10:
            run.measured["loss"] = None
    accuracy, loss = r.figures(SETTINGS, runs)
    lines = [
        {line.get_label(): list(line.get_ydata()) for line in p.figure.axes[0].get_lines()}
        for p in (accuracy, loss)
    ]
    assert lines[0][r.PLAIN] == [0.9, 0.5, 0.1]
    assert lines[0][r.NORMALIZED] == [0.3, 0.98, 0.1]
    assert lines[1][r.PLAIN][:2] == pytest.approx([1.1, 1.5])
    assert math.isnan(lines[1][r.PLAIN][2])
    assert "At 0.1 the loss ended at 1.1 (plain) and 1.7 (BatchNorm)" in loss.see
    assert "median of 3 seeds" in accuracy.see


def test_one_seed_has_no_verdict_and_no_band():
    settings = dataclasses.replace(SETTINGS, seeds=1)
    found = r.analyse(settings, made(LOW, HIGH, settings))
    assert outcomes(found) == [UNRESOLVED] * 4
    assert "lower median of 1 seed," in found.summary
    assert "One seed." in r.figures(settings, made(LOW, HIGH, settings))[0].see
