"""Running averages against exact statistics of the same weights, epoch by epoch."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from batchnorm.lab import networks, training
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import lag as e
from lab_rehearsal import rehearse

TINY = dataclasses.replace(
    e.PROFILES["quick"], seeds=2, epochs=2, looks=2, early=(2, 2), rates=(1.0, 0.1), width=16
)


def trial(**fields):
    given = {"stage": "training", "seed": 3, "momentum": 0.1, "rate": 0.5, "epochs": 2, "looks": 2}
    return e.LagTrial(**(given | fields), batch=64, width=16, depth=2)


def test_rehearsal():
    runs, findings = rehearse(e.EXPERIMENT, TINY)
    assert len(runs) == 2 * 2 * 2
    # What is exact does not hang on the momentum, for the training does not.
    a, b = (r.measured for r in runs[:2])
    assert a["exact"] == b["exact"]
    assert a["running"] != b["running"]
    assert len(findings.also) == 3


def torchs_own(t, x, y):
    """The same training by torch's parts alone; yields the network at every look."""
    net = networks.mlp(
        [x.shape[1], 16, 16, 10],
        lambda channels: nn.BatchNorm1d(channels, momentum=t.momentum),
        training.generator(t.seed),
    )
    epoch = len(x) // t.batch
    steps = t.epochs * epoch
    optimizer = torch.optim.SGD(net.parameters(), t.rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, rows in zip(
        range(1, steps + 1), training.batches(len(x), t.batch, t.seed), strict=False
    ):
        net.train()
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(net(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
        if step * t.looks % epoch == 0:
            yield step / epoch, net


def test_run_measures_both_errors_of_the_same_weights():
    """Against nn.BatchNorm1d: its running averages, and one pass with a batch of all rows."""
    t, data = trial(), load("digits")
    found = e.run(t, data).measured
    x, y, x_test, y_test = training.tensors(data)
    running, exact, epochs = [], [], []
    for epoch, net in torchs_own(t, x, y):
        of = copy.deepcopy(net)
        for layer in of.modules():
            if isinstance(layer, nn.BatchNorm1d):
                layer.momentum = 1.0
        of.train()(x)
        for errors, network in ((running, net), (exact, of)):
            network.eval()
            with torch.no_grad():
                errors.append((network(x_test).argmax(1) != y_test).double().mean().item())
        epochs.append(epoch)
    assert found["epoch"] == pytest.approx(epochs)
    assert epochs == [0.5, 1.0, 1.5, 2.0]
    assert found["step"] == [10, 20, 30, 40]
    # float32 rounding, grown over 40 steps; one test row is 0.002.
    assert found["running"] == pytest.approx(running, abs=0.0041)
    assert found["exact"] == pytest.approx(exact, abs=0.0041)
    assert max(abs(a - b) for a, b in zip(running, exact, strict=True)) > 0.02


def test_more_looks_than_steps_are_one_each_step():
    data = load("digits")
    assert e.run(trial(epochs=1, looks=100), data).measured["step"] == list(range(1, 21))


SETTINGS = dataclasses.replace(
    e.PROFILES["quick"], seeds=8, epochs=3, looks=1, early=(2, 2), rates=(1.0, 0.1)
)


def made_up(added):
    """Runs with so much added to the error by running averages, by (momentum, rate) and epoch."""
    runs = []
    for t in e.plan(SETTINGS, []):
        exact = [0.30 + 0.001 * t.seed, 0.20 + 0.001 * t.seed, 0.10 + 0.001 * t.seed]
        more = added[t.momentum, t.rate]
        running = [a + b * (1 + t.seed / 100) for a, b in zip(exact, more, strict=True)]
        runs.append(
            Run(
                t,
                {
                    "epoch": [1.0, 2.0, 3.0],
                    "step": [20, 40, 60],
                    "running": running,
                    "exact": exact,
                },
                {},
            )
        )
    return runs


def outcomes(findings):
    return [findings.verdict.outcome, *(other.verdict.outcome for other in findings.also)]


@pytest.mark.parametrize(
    ("sign", "outcome"), [(1, "reproduced"), (-1, "contradicted"), (0, "unresolved")]
)
@pytest.mark.parametrize("which", range(4))
def test_each_claim_is_judged_by_its_own_runs(which, sign, outcome):
    """The main one, the other momentum, the other rate, the last epoch."""
    added = {(m, r): [0.5, 0.0, 0.0] for m in SETTINGS.momentums for r in SETTINGS.rates}
    key = [(0.1, 1.0), (0.01, 1.0), (0.1, 0.1), (0.1, 1.0)][which]
    added[key][2 if which == 3 else 1] = sign * 0.05
    found = outcomes(e.analyse(SETTINGS, made_up(added)))
    assert found[which] == outcome
    assert found[:which] + found[which + 1 :] == ["unresolved"] * 3


def test_numbers_are_those_of_the_runs():
    added = {(m, r): [0.5, 0.05, 0.01] for m in SETTINGS.momentums for r in SETTINGS.rates}
    added[0.01, 1.0] = [0.5, 0.25, 0.02]
    found = e.analyse(SETTINGS, made_up(added))
    # Means over seeds 0…7: exact 20.35% in epoch 2 and 10.35% in epoch 3.
    for words in ("25.5%", "20.4%", "46.2%", "11.4% against 10.4%", "12.4% against 10.4%"):
        assert words in found.summary, words
    assert found.verdict.mean == pytest.approx(5 * 1.035)
    assert found.table.rows[0] == ("1", "0.1", "2–2", "25.5%", "20.4%")
    assert found.table.rows[3] == ("1", "0.01", "3", "12.4%", "10.4%")
    assert f"{0.9**20:.1%} the zeros" in found.recipe[2]
    assert f"still {0.99**40:.1%} of what" in found.caveats[0]
    assert math.isclose(0.99**40, 0.669, abs_tol=1e-3)


def test_the_figure_of_what_is_added_begins_after_the_first_epoch():
    added = {(m, r): [0.5, 0.05, 0.01] for m in SETTINGS.momentums for r in SETTINGS.rates}
    runs = made_up(added)
    for run in runs:
        run.measured["epoch"] = [0.5, 1.0, 1.5]
    picture = {p.name: p for p in e.figures(SETTINGS, runs)}["added"]
    line = picture.figure.axes[0].get_lines()[0]
    assert list(line.get_xdata()) == [1.0, 1.5]
    assert line.get_ydata()[0] == pytest.approx(0.05 * 1.035)
