import dataclasses
import statistics

import numpy as np
import pytest
import torch
from torch import nn

import lab_by_hand
from batchnorm import BatchNorm
from batchnorm.errors import InputError
from batchnorm.lab import networks, training
from batchnorm.lab.data import Dataset, load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import small_batches as s
from batchnorm.lab.tuning import EVALUATION, SWEEP, select
from batchnorm.lab.verdict import CONTRADICTED, REPRODUCED, UNRESOLVED
from lab_rehearsal import planned, rehearse

TINY = dataclasses.replace(
    s.PROFILES["quick"], seeds=2, sizes=(32, 4), rates=(0.03, 0.1), steps=3, width=32, depth=2
)
SETTINGS = dataclasses.replace(s.PROFILES["quick"], seeds=3, rates=(0.01, 0.1, 1.0))


def test_rehearsal():
    runs, findings = rehearse(s.EXPERIMENT, TINY)
    assert len(runs) == 6 * (2 + 2)
    assert len(findings.also) == 3
    claims = [s.EXPERIMENT.claim, *(also.claim for also in findings.also)]
    assert not any(c.isdigit() for claim in claims for c in claim)  # the same in all profiles
    assert not any(also.ours for also in findings.also)


def trial(name, **fields):
    given = {"rate": 0.1, "steps": 8, "batch": 32, "width": 32, "depth": 2, "seed": 7}
    return s.SmallBatchTrial(stage=EVALUATION, arm=name, **(given | fields))


@pytest.mark.parametrize("network", s.NETWORKS)
@pytest.mark.parametrize("size", [32, 4, None])
def test_run_equals_the_same_training_written_with_torchs_own_parts(network, size):
    """Groups one after the other by torch's batch_norm, its SGD and its cosine schedule."""
    data = load("digits")

    def norm(channels):
        groups = max(1, channels // 16)
        return (
            nn.GroupNorm(groups, channels) if size is None else lab_by_hand.Groups(channels, size)
        )

    images = network == s.CNN
    if images:
        net = networks.resnet(1, 10, norm, training.generator(7))
    else:
        net = lab_by_hand.mlp([64, 32, 32, 10], norm, 7)
    x, y = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train)
    x = x[:, None] if images else x.flatten(1)
    lab_by_hand.train(net, x, y, rate=0.1, steps=8, batch=32, seed=7)
    found = s.run(trial(s.arm(network, size)), data).measured
    # float32 rounding, grown over 8 steps; one test image is 0.002.
    assert found["error"] == pytest.approx(lab_by_hand.error(net, data, images=images), abs=0.0041)
    fitted = dataclasses.replace(data, x_test=data.x_train, y_test=data.y_train)
    fitted = lab_by_hand.error(net, fitted, images=images)
    assert found["training_error"] == pytest.approx(fitted, abs=0.0041)


def test_the_sweep_sees_nothing_of_the_test_rows():
    data, name = load("digits"), s.arm(s.MLP, 4)
    swept = dataclasses.replace(trial(name), stage=SWEEP)
    other = dataclasses.replace(data, x_test=data.x_test * 0)
    assert s.run(swept, data).measured == s.run(swept, other).measured
    assert s.run(trial(name), data).measured != s.run(trial(name), other).measured


def test_arms_differ_in_their_normalization_alone():
    made = {size: s.norm(s.arm(s.MLP, size), 32)(48) for size in (32, 4, None)}
    assert isinstance(made[32], BatchNorm)
    assert (made[32].virtual_batch_size, made[4].virtual_batch_size) == (None, 4)
    assert isinstance(made[None], nn.GroupNorm)
    assert made[None].num_groups == 3
    assert s.norm(s.arm(s.CNN, None), 32)(8).num_groups == 1


@pytest.mark.parametrize("network", s.NETWORKS)
def test_rows_that_are_no_images_are_refused_in_words(network):
    rows, classes = np.zeros((80, 5), np.float32), np.zeros(80, np.int64)
    data = Dataset("wine.npz", "", "", 2, rows, classes, rows, classes)
    with pytest.raises(InputError, match=r"wine.npz: expected images.*got rows of shape \(5,\)"):
        s.run(trial(s.arm(network, 4)), data)


def test_colour_images_are_taken_as_they_are():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((64, 3, 4, 6)).astype(np.float32), np.arange(64) % 2
    data = Dataset("colour", "", "", 2, x, y, x, y)
    for network in s.NETWORKS:
        assert 0 <= s.run(trial(s.arm(network, 4), steps=2), data).measured["error"] <= 1


def made(errors, settings=SETTINGS, best=0.1, fitted=None):
    """Made-up runs by the real plan; other rates are worse, and seeds differ by a thousandth."""

    def run(t, data):
        error = errors[t.arm] + (t.rate != best) + t.seed % 1000 / 1000
        return Run(t, {"error": error, "training_error": (fitted or {}).get(t.arm, 0.0)}, {})

    return planned(dataclasses.replace(s.EXPERIMENT, run=run), settings, data=object())


def errors(mlp, cnn):
    """Errors of both networks: over 32, 4 and 2 samples, and with GroupNorm."""
    return {
        s.arm(network, size): error
        for network, of in ((s.MLP, mlp), (s.CNN, cnn))
        for size, error in zip((32, 4, 2, None), of, strict=True)
    }


def outcomes(findings):
    return [findings.verdict.outcome, *(also.verdict.outcome for also in findings.also)]


def test_plan_tunes_every_arm_and_pairs_the_seeds():
    runs = made(errors((0.1, 0.2, 0.3, 0.1), (0.1, 0.1, 0.1, 0.1)))
    assert len(runs) == 8 * (3 + 3)
    evaluation = select(runs, stage=EVALUATION)
    assert {r.trial.rate for r in evaluation} == {0.1}
    assert [r.trial.seed for r in evaluation] == [seed for seed in range(3) for _ in range(8)]
    assert not {r.trial.seed for r in evaluation} & {
        r.trial.seed for r in select(runs, stage=SWEEP)
    }
    assert {r.trial.batch for r in runs} == {32}


def test_small_batches_that_hurt_and_groups_that_help():
    found = s.analyse(SETTINGS, made(errors((0.02, 0.07, 0.5, 0.03), (0.01, 0.02, 0.04, 0.015))))
    assert outcomes(found) == [REPRODUCED] * 4
    means = [found.verdict.mean, *(also.verdict.mean for also in found.also)]
    assert means == pytest.approx([5, 1, 4, 0.5])
    assert found.verdict.unit == "points fewer errors"
    # Seeds add 0, 1 and 2 thousandths: 0.1 points to every mean.
    assert "the MLP got 7.1% of the test rows wrong instead of 2.1%" in found.summary
    assert "the CNN 2.1% instead of 1.1%" in found.summary
    assert "it was 3.1% and 1.6%" in found.summary
    assert found.table.rows[1] == ("MLP, BatchNorm over 4", "0.1", "7.1% (7.0%–7.2%)")
    assert len(found.table.rows) == 8
    (few,) = found.caveats
    assert few.startswith("3 seeds are few")


def test_the_other_way_round_contradicts_and_no_difference_is_unresolved():
    found = s.analyse(SETTINGS, made(errors((0.07, 0.02, 0.02, 0.3), (0.04, 0.02, 0.01, 0.3))))
    assert outcomes(found) == [CONTRADICTED] * 4
    found = s.analyse(SETTINGS, made(errors((0.1,) * 4, (0.2,) * 4)))
    assert outcomes(found) == [UNRESOLVED] * 4


def test_the_two_networks_are_not_mixed_up():
    found = s.analyse(SETTINGS, made(errors((0.02, 0.07, 0.5, 0.03), (0.02, 0.02, 0.02, 0.03))))
    assert outcomes(found) == [REPRODUCED, UNRESOLVED, REPRODUCED, CONTRADICTED]


def test_a_network_that_fits_less_well_with_group_norm_may_only_be_slower():
    given = errors((0.1,) * 4, (0.2,) * 4)
    fitted = {s.arm(s.CNN, None): 0.04, s.arm(s.CNN, 4): 0.03, s.arm(s.MLP, 4): 0.01}
    lines = s.analyse(SETTINGS, made(given, fitted=fitted)).caveats
    (slower,) = [line for line in lines if "only be slower" in line]
    assert slower.startswith("After 100 steps the CNN with GroupNorm still got 4.0% of the")
    assert "with BatchNorm over 4 3.0%" in slower


def test_best_rates_on_the_edge_are_told():
    found = s.analyse(SETTINGS, made(errors((0.1,) * 4, (0.2,) * 4), best=1.0))
    assert len([line for line in found.caveats if "is on the edge" in line]) == 8


def test_the_figure_has_both_networks_and_both_kinds():
    given = errors((0.02, 0.07, 0.5, 0.03), (0.01, 0.02, 0.04, 0.015))
    (picture,) = s.figures(SETTINGS, made(given))
    drawn = {
        (axes.get_title(loc="left") or axes.get_title(), line.get_label()): line
        for axes in picture.figure.axes
        for line in axes.get_lines()
    }
    assert set(drawn) == {(n, k) for n in s.NETWORKS for k in (s.NORMALIZED, s.GROUPED)}
    assert list(drawn[s.CNN, s.NORMALIZED].get_xdata()) == [2, 4, 32]
    for network, sizes in ((s.MLP, (2, 4, 32)), (s.CNN, (2, 4, 32))):
        middle = [
            statistics.median(given[s.arm(network, n)] + k / 1000 for k in range(3)) for n in sizes
        ]
        assert list(drawn[network, s.NORMALIZED].get_ydata()) == pytest.approx(middle)
        level = given[s.arm(network, None)] + 0.001
        assert list(drawn[network, s.GROUPED].get_ydata()) == pytest.approx([level] * 3)
    assert "median of 3 seeds" in picture.see
