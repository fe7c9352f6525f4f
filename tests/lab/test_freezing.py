"""Small groups, evaluated by their own, by running, by population and by frozen statistics."""

import dataclasses

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm, freeze
from batchnorm.lab import networks, training
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import freezing as e
from batchnorm.lab.tuning import EVALUATION, SWEEP
from lab_rehearsal import planned, rehearse

TINY = dataclasses.replace(
    e.PROFILES["quick"], seeds=2, sizes=(4, 64), rates=(0.1,), steps=8, width=16, depth=2
)


def trial(name, **fields):
    given = {"stage": EVALUATION, "seed": 3, "rate": 0.3, "steps": 20, "tail": 0.75, "batch": 64}
    return e.FreezingTrial(arm=name, **(given | fields), width=16, depth=2)


def test_rehearsal():
    runs, _ = rehearse(e.EXPERIMENT, TINY)
    assert len(runs) == 4 * (1 + 2)


class Groups(nn.Module):
    """Batch normalization of groups in order, written out; `fixed` are statistics for good."""

    def __init__(self, channels, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.size, self.fixed, self.seen = size, None, None

    def forward(self, x):
        self.seen = x.detach()
        if self.fixed is not None:
            mean, var = self.fixed
        else:
            groups = x.view(-1, self.size, x.shape[1])
            mean = groups.mean(1).repeat_interleave(self.size, 0)
            var = groups.var(1, unbiased=False).repeat_interleave(self.size, 0)
        return (x - mean) / (var + 1e-5).sqrt() * self.weight + self.bias


def fix(net, x):
    """Statistics of all rows, layer after layer."""
    layers = [layer for layer in net if isinstance(layer, Groups)]
    for layer in layers:
        layer.size = len(x)
    for layer in layers:
        with torch.no_grad():
            net(x)
        layer.fixed = layer.seen.mean(0), layer.seen.var(0)


def written_out(t, size, freezes, x, y):
    net = networks.mlp(
        [x.shape[1], 16, 16, 10], lambda c: Groups(c, size), training.generator(t.seed)
    )
    optimizer = torch.optim.SGD(net.parameters(), t.rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, t.steps)
    for step, rows in zip(range(t.steps), training.batches(len(x), 64, t.seed), strict=False):
        if freezes and step == 5:
            fix(net, x)
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(net(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    return net


def wrong(net, x, y):
    with torch.no_grad():
        return (net(x).argmax(1) != y).double().mean().item()


@pytest.mark.parametrize("freezes", [False, True])
@pytest.mark.parametrize("size", [4, 64])
def test_run_equals_the_same_training_written_out(size, freezes):
    data = load("digits")
    t = trial(e.arm(size, e.FROZEN if freezes else e.RUNNING))
    found = e.run(t, data).measured
    x, y, x_test, y_test = training.tensors(data)
    net = written_out(t, size, freezes, x, y)
    # float32 rounding, grown over 20 steps; one test row is 0.002.
    near = {"abs": 0.0061}
    if freezes:
        assert set(found) == {e.FROZEN}
        assert found[e.FROZEN] == pytest.approx(wrong(net, x_test, y_test), **near)
        return
    order = torch.randperm(
        len(x_test), generator=torch.Generator().manual_seed(e.TEST_ORDER_OFFSET + 3)
    )
    order = order[: len(order) - len(order) % size]
    assert found[e.OWN] == pytest.approx(wrong(net, x_test[order], y_test[order]), **near)
    fix(net, x)
    assert found[e.POPULATION] == pytest.approx(wrong(net, x_test, y_test), **near)
    assert set(found) == {e.OWN, e.RUNNING, e.POPULATION}


def test_scale_and_shift_go_on_learning(monkeypatch):
    seen = []

    def spied(net, **options):
        seen.append((net, {n: p.detach().clone() for n, p in net.named_parameters()}))
        freeze(net, **options)

    monkeypatch.setattr(e, "freeze", spied)
    e.run(trial(e.arm(4, e.FROZEN)), load("digits"))
    ((net, before),) = seen
    assert not [n for n, p in net.named_parameters() if torch.equal(p, before[n])]


def test_own_error_leaves_out_what_fills_no_batch_and_the_network_alone():
    net = nn.Sequential(BatchNorm(2))
    # Normalized by themselves, two rows are told by their order; over all, by their sign.
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [9.0, 8.0]])
    y = torch.tensor([1, 0, 1])
    assert e.own_error(net, x, y, 2) == 0.0
    assert int(net[0].num_batches_tracked) == 0


SETTINGS = dataclasses.replace(
    e.PROFILES["quick"], seeds=8, tuning_seeds=1, sizes=(4, 64), rates=(0.1, 0.3, 1.0)
)
LEVEL = {e.OWN: 0.2, e.RUNNING: 0.2, e.POPULATION: 0.2, e.FROZEN: 0.2}


def made_up(small, large=LEVEL):
    """Runs with these errors; the middle rate is the best of each arm."""

    def run(t, _):
        level = small if t.arm.endswith("-4") else large
        ways = [e.FROZEN] if t.arm.startswith(e.FROZEN) else e.WAYS[:3]
        worse = 0.0 if t.rate == 0.3 else 0.3
        # Seeds differ, and the ways' differences do by a little.
        return Run(
            t,
            {w: level[w] * (1 + t.seed % 8 / 100) + 0.01 * (t.seed % 8) + worse for w in ways},
            {},
        )

    experiment = dataclasses.replace(e.EXPERIMENT, run=run)
    return planned(experiment, SETTINGS)


def test_plan_tunes_each_size_and_each_end_by_how_it_is_used():
    runs = made_up(LEVEL)
    assert len(runs) == 4 * 3 + 4 * 8
    assert {r.trial.rate for r in runs if r.trial.stage == EVALUATION} == {0.3}
    assert len([r for r in runs if r.trial.stage == SWEEP]) == 12
    # A way that is not how the network is used has no say.
    odd = [
        dataclasses.replace(r, measured=r.measured | {e.OWN: r.trial.rate, e.POPULATION: 0.0})
        if e.OWN in r.measured
        else r
        for r in runs
    ]
    assert e.plan(SETTINGS, odd) == [r.trial for r in runs]


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [
        ({}, {}, "uuuuu"),
        ({e.FROZEN: 0.1}, {}, "rruuu"),
        ({e.FROZEN: 0.3}, {}, "ccuuu"),
        ({e.POPULATION: 0.1}, {}, "ucrru"),
        ({e.POPULATION: 0.3}, {}, "urccu"),
        ({e.OWN: 0.3}, {}, "uuuru"),
        ({}, {e.FROZEN: 0.1}, "uuuur"),
        ({}, {e.FROZEN: 0.3}, "uuuuc"),
    ],
)
def test_each_claim_is_judged_by_its_own_runs(small, large, expected):
    found = e.analyse(SETTINGS, made_up(LEVEL | small, LEVEL | large))
    outcomes = [found.verdict.outcome, *(other.verdict.outcome for other in found.also)]
    assert "".join(outcome[0] for outcome in outcomes) == expected


def test_numbers_are_those_of_the_runs():
    found = e.analyse(
        SETTINGS,
        made_up({e.OWN: 0.4, e.RUNNING: 0.3, e.POPULATION: 0.2, e.FROZEN: 0.1}),
    )
    # The mean over seeds 0…7 is level · 1.035 + 0.035.
    for words in ("44.9%", "34.5%", "24.2%", "13.9%"):
        assert words in found.summary, words
    assert found.table.rows[0] == ("4 (0.3; 0.3)", "44.9%", "34.5%", "24.2%", "13.9%")
    assert found.caveats == ()
    won = {p.name: p for p in e.figures(SETTINGS, made_up(LEVEL | {e.FROZEN: 0.1}))}["won"]
    line = won.figure.axes[0].get_lines()[0]
    assert line.get_label() == e.FROZEN
    assert list(line.get_ydata()) == pytest.approx([0.1 * 1.035, 0])


def test_a_rate_on_the_edge_is_told():
    settings = dataclasses.replace(SETTINGS, rates=(0.3, 1.0))
    found = e.analyse(settings, made_up(LEVEL))
    assert any("frozen group-of-4 network, 0.3, is on the edge" in line for line in found.caveats)
