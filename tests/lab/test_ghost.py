import dataclasses

import numpy as np
import pytest
import torch

import lab_by_hand
from batchnorm.errors import InputError
from batchnorm.lab.data import Dataset, load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import ghost as g
from batchnorm.lab.tuning import EVALUATION, SWEEP, select
from batchnorm.lab.verdict import CONTRADICTED, REPRODUCED, UNRESOLVED
from lab_rehearsal import planned, rehearse

TINY = dataclasses.replace(
    g.PROFILES["quick"], seeds=2, sizes=(64, 32), rates=(0.1, 0.3), steps=2, width=16, depth=2
)
SETTINGS = dataclasses.replace(g.PROFILES["quick"], seeds=3, rates=(0.01, 0.1, 1.0))


def test_rehearsal():
    runs, findings = rehearse(g.EXPERIMENT, TINY)
    assert len(runs) == 4 * (2 + 2)
    assert len(findings.also) == 2
    claims = [g.EXPERIMENT.claim, *(also.claim for also in findings.also)]
    assert not any(c.isdigit() for claim in claims for c in claim)  # the same in all profiles


def trial(name, **fields):
    given = {"rate": 0.1, "steps": 6, "batch": 640, "width": 32, "depth": 2, "seed": 7}
    return g.GhostTrial(stage=EVALUATION, arm=name, **(given | fields))


@pytest.mark.parametrize(
    ("name", "batch", "steps", "size"),
    [
        (g.WHOLE, 640, 6, 640),
        (g.arm(32), 640, 6, 32),
        (g.arm(6), 640, 6, 6),  # does not come out even
        (g.small(160), 160, 24, 160),
    ],
)
def test_run_equals_the_same_training_written_with_torchs_own_parts(name, batch, steps, size):
    """Groups one after the other by torch's batch_norm, its SGD and its cosine schedule."""
    data = load("digits")
    net = lab_by_hand.mlp([64, 32, 32, 10], lambda c: lab_by_hand.Groups(c, size), 7)
    x, y = torch.from_numpy(data.x_train).flatten(1), torch.from_numpy(data.y_train)
    lab_by_hand.train(net, x, y, rate=0.1, steps=steps, batch=batch, seed=7)
    found = g.run(trial(name), data).measured
    # float32 rounding, grown over 24 steps; one test image is 0.002.
    assert found["error"] == pytest.approx(lab_by_hand.error(net, data), abs=0.0041)
    fitted = dataclasses.replace(data, x_test=data.x_train, y_test=data.y_train)
    assert found["training_error"] == pytest.approx(lab_by_hand.error(net, fitted), abs=0.0041)


def test_the_sweep_sees_nothing_of_the_test_rows():
    data = load("digits")
    swept = dataclasses.replace(trial(g.arm(32)), stage=SWEEP)
    other = dataclasses.replace(data, x_test=data.x_test * 0)
    assert g.run(swept, data).measured == g.run(swept, other).measured
    assert g.run(trial(g.arm(32)), data).measured != g.run(trial(g.arm(32)), other).measured


def test_data_with_less_than_a_batch_is_refused_in_words():
    rows, classes = np.zeros((72, 5), np.float32), np.zeros(72, np.int64)
    data = Dataset("small.npz", "", "", 2, rows, classes, rows, classes)
    with pytest.raises(InputError, match=r"at least 640 training rows.*got 72"):
        g.run(trial(g.WHOLE), data)


FITTED = {g.WHOLE: 0.003, g.arm(8): 0.012}


def made(errors, settings=SETTINGS, best=0.1):
    """Made-up runs by the real plan; other rates are worse. A tuple has an error a seed."""

    def run(t, data):
        error = errors[t.arm]
        value = error[t.seed % 1000 % len(error)] if isinstance(error, tuple) else error
        fitted = FITTED.get(t.arm, 0.001) if t.stage == EVALUATION else 1.0
        return Run(t, {"error": value + (t.rate != best), "training_error": fitted}, {})

    return planned(dataclasses.replace(g.EXPERIMENT, run=run), settings, data=object())


def errors(few, whole, *groups):
    """Errors of batches of 32, the whole batch, and groups of 160, 32 and 8."""
    names = [g.small(32), g.WHOLE, *map(g.arm, (160, 32, 8))]
    return dict(zip(names, (few, whole, *groups), strict=True))


def outcomes(findings):
    return [findings.verdict.outcome, *(also.verdict.outcome for also in findings.also)]


def test_plan_tunes_every_arm_and_pairs_the_seeds():
    runs = made(errors(0.1, 0.1, 0.1, 0.1, 0.1))
    assert len(runs) == 5 * (3 + 3)
    evaluation = select(runs, stage=EVALUATION)
    assert {r.trial.rate for r in evaluation} == {0.1}
    assert [r.trial.seed for r in evaluation] == [seed for seed in range(3) for _ in range(5)]
    assert not {r.trial.seed for r in evaluation} & {
        r.trial.seed for r in select(runs, stage=SWEEP)
    }
    assert {(r.trial.batch, r.trial.steps) for r in runs} == {(640, SETTINGS.steps)}


def test_groups_that_help():
    found = g.analyse(SETTINGS, made(errors(0.011, 0.04, 0.03, (0.02, 0.021, 0.022), 0.01)))
    assert outcomes(found) == [REPRODUCED] * 3
    assert found.verdict.differences == pytest.approx([2, 1.9, 1.8])
    assert found.also[0].verdict.mean == pytest.approx(2.9)
    slope, _ = np.polyfit(np.log2([8, 32, 160, 640]), [1, 2.1, 3, 4], 1)
    assert found.also[1].verdict.mean == pytest.approx(slope)
    assert "as a whole, 4.0% of the test rows came out wrong; in groups of 32, 2.1%." in (
        found.summary
    )
    assert "with batches of 32 for as many epochs, it was 1.1%" in found.summary
    assert f"each doubling added {slope:+.2f} points" in found.summary
    assert "The training error at the end was 0.1% to 1.2%, by arm." in found.summary
    assert found.table.columns[3] == "training error"
    assert found.table.rows[1] == ("whole batch", "0.1", "4.0% (4.0%–4.0%)", "0.3%")
    assert found.table.rows[3] == ("groups of 32", "0.1", "2.1% (2.0%–2.2%)", "0.1%")
    assert "in 1600 steps" in found.recipe[2]
    (few,) = found.caveats
    assert few.startswith("3 seeds are few")


def test_groups_that_hurt_and_groups_that_do_nothing():
    found = g.analyse(SETTINGS, made(errors(0.05, 0.01, 0.02, 0.03, 0.04)))
    assert outcomes(found) == [CONTRADICTED] * 3
    assert "-" in found.summary.partition("each doubling added")[2]
    found = g.analyse(SETTINGS, made(errors(0.02, 0.02, 0.02, 0.02, 0.02)))
    assert outcomes(found) == [UNRESOLVED] * 3


def test_the_claims_are_judged_apart():
    """The headline's groups help, the gap is open the other way, and there is no trend."""
    found = g.analyse(SETTINGS, made(errors(0.05, 0.02, 0.02, 0.01, (0.0, 0.03, 0.06))))
    assert outcomes(found) == [REPRODUCED, CONTRADICTED, UNRESOLVED]


def test_best_rates_on_the_edge_are_told():
    found = g.analyse(SETTINGS, made(errors(0.1, 0.1, 0.1, 0.1, 0.1), best=0.01))
    assert len([line for line in found.caveats if "is on the edge" in line]) == 5


def test_the_figure_has_the_whole_batch_on_the_right_and_small_batches_level():
    (picture,) = g.figures(SETTINGS, made(errors(0.011, 0.04, 0.03, (0.02, 0.021, 0.025), 0.01)))
    level, groups = picture.figure.axes[0].get_lines()
    assert level.get_label() == "batches of 32"
    assert list(level.get_ydata()) == [0.011] * 4
    assert list(groups.get_xdata()) == [8, 32, 160, 640]
    assert list(groups.get_ydata()) == [0.01, 0.021, 0.03, 0.04]
    assert "median of 3 seeds" in picture.see
