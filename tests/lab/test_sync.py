import dataclasses
from itertools import islice

import pytest
import torch
from torch import nn

from batchnorm.errors import ArgumentError
from batchnorm.lab import networks, runner, training
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import sync as s
from batchnorm.lab.store import Store
from lab_rehearsal import rehearse

TINY = dataclasses.replace(s.PROFILES["quick"], seeds=1, worlds=(2,), steps=2)


@pytest.fixture(scope="module")
def rehearsed():
    return rehearse(s.EXPERIMENT, TINY)


def test_rehearsal(rehearsed):
    runs, findings = rehearsed
    (run,) = runs
    assert set(run.measured) == set(s.ARMS)
    for arm in (s.EVEN, s.UNEVEN):
        assert all(0 < d < 1e-13 for part in s.PARTS for d in run.measured[arm][part]), arm
    assert findings.table.rows[0][:2] == ("2", "synchronised")
    assert "2 processes with 16 + 16 rows" in findings.summary
    assert "with 20 + 12 rows" in findings.summary


class Averages(nn.BatchNorm2d):
    """Of a whole batch in one process: the statistics of its parts, averaged with no weights."""

    def forward(self, x):
        parts = x.split([20, 12])
        mean = sum(p.mean((0, 2, 3)) for p in parts) / 2
        square = sum((p * p).mean((0, 2, 3)) for p in parts) / 2
        var = square - mean**2
        # The plain layer counts its own part twice: for each of the two processes.
        counts = [2 * p[:, 0].numel() for p in parts]
        self.running = [(0.1 * mean, 0.9 + 0.1 * var * n / (n - 1)) for n in counts]
        shape = (1, -1, 1, 1)
        y = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        return y * self.weight.view(shape) + self.bias.view(shape)


def net(norm):
    made = networks.resnet(1, 10, norm, torch.Generator().manual_seed(0)).double()
    return made, torch.optim.SGD(made.parameters(), TINY.rate, momentum=0.9)


def distance(ours, theirs):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs))  # noqa: B905


def test_distances_are_those_of_the_same_trainings_written_in_one_process(rehearsed):
    """With torch's layers, no processes, and the mean loss of the whole batch."""
    ((run,), _) = rehearsed
    data = load("digits")
    x, y = torch.tensor(data.x_train)[:, None].double(), torch.tensor(data.y_train)
    whole, averages = net(nn.BatchNorm2d), net(Averages)
    halves = [net(nn.BatchNorm2d), net(nn.BatchNorm2d)]
    loss = nn.CrossEntropyLoss()

    def grads(model):
        return [p.grad.clone() for p in model.parameters()]

    def buffers(model):
        return [b.clone() for b in model.buffers() if b.is_floating_point()]

    for step, rows in enumerate(islice(training.batches(len(x), 32, 0), 2)):
        for model, optimizer in (whole, averages):
            optimizer.zero_grad()
            model.outputs = model(x[rows])
            loss(model.outputs, y[rows]).backward()
        outputs = []
        for (model, optimizer), part in zip(halves, rows.split(16), strict=True):
            optimizer.zero_grad()
            outputs.append(model(x[part]))
            loss(outputs[-1], y[part]).backward()
        for one, other in zip(halves[0][0].parameters(), halves[1][0].parameters(), strict=True):
            one.grad = other.grad = (one.grad + other.grad) / 2

        theirs = whole[0]
        own, plain = run.measured[s.OWN], run.measured[s.AVERAGED]
        expected = {
            s.OUTPUTS: distance([torch.cat(outputs)], [theirs.outputs]),
            s.GRADIENTS: distance(grads(halves[0][0]), grads(theirs)),
            s.STATISTICS: max(distance(buffers(m), buffers(theirs)) for m, _ in halves),
        }
        assert {part: own[part][step] for part in s.PARTS} == pytest.approx(expected, rel=1e-8)
        assert plain[s.OUTPUTS][step] == pytest.approx(
            distance([averages[0].outputs], [theirs.outputs]), rel=1e-8
        )
        assert plain[s.GRADIENTS][step] == pytest.approx(
            distance(grads(averages[0]), grads(theirs)), rel=1e-8
        )
        if step == 0:  # later ones need no second proof
            layers = [m for m in averages[0].modules() if isinstance(m, Averages)]
            expected = max(
                distance([t for m in layers for t in m.running[rank]], buffers(theirs))
                for rank in (0, 1)
            )
            assert plain[s.STATISTICS][0] == pytest.approx(expected, rel=1e-8)
        for _, optimizer in (whole, averages, *halves):
            optimizer.step()


@pytest.mark.slow
def test_a_worker_of_the_runner_may_start_processes_and_gets_the_same_bits(tmp_path):
    data, found = load("digits"), []
    for jobs in (1, 2):
        store = Store(tmp_path / str(jobs), s.EXPERIMENT, data.fingerprint)
        (run,) = runner.execute(s.EXPERIMENT, TINY, data, store, jobs=jobs)
        found.append(run.measured)
    assert found[0] == found[1]


def test_shares_are_of_the_batch():
    for processes, batch in ((2, 32), (4, 32), (2, 8)):
        for arm in s.ARMS:
            rows = s.shares(arm, processes, batch)
            assert sum(rows) == batch
            assert min(rows) > 0
            assert (len(set(rows)) == 1) == (arm in (s.EVEN, s.OWN))
    with pytest.raises(ArgumentError, match="multiple of 32"):
        s.shares(s.EVEN, 4, 24)


def test_apart_is_relative_to_each_tensors_own_scale():
    theirs = [torch.tensor([100.0, -200.0]), torch.tensor([0.01, 0.02])]
    ours = [torch.tensor([101.0, -200.0]), torch.tensor([0.01, 0.021])]
    assert s.apart(ours, theirs) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="zip"):
        s.apart(ours[:1], theirs)


def test_plan_has_every_number_of_processes_with_every_seed():
    trials = s.plan(dataclasses.replace(TINY, seeds=3, worlds=(2, 4)), [])
    assert [(t.seed, t.processes) for t in trials] == [(i, w) for i in range(3) for w in (2, 4)]


MADE_UP = dataclasses.replace(TINY, seeds=8, worlds=(2, 4))


def made_up(distances):
    """Runs whose arm `a` is `distances[a]` apart, a number a seed; in one part, at one step."""
    runs = []
    for t in s.plan(MADE_UP, []):
        measured = {}
        for index, arm in enumerate(s.ARMS):
            measured[arm] = {part: [1e-16, 1e-16] for part in s.PARTS}
            measured[arm][s.PARTS[(index + t.seed) % 3]][t.seed % 2] = distances[arm][t.seed]
        runs.append(Run(t, measured, {}))
    return runs


TRUE = {s.EVEN: [1e-14] * 8, s.UNEVEN: [0.0] * 8, s.AVERAGED: [0.5] * 8, s.OWN: [0.25] * 8}


def test_equal_and_different_as_claimed():
    found = s.analyse(MADE_UP, made_up(TRUE))
    judged = [found.verdict, *(other.verdict for other in found.also)]
    assert [v.outcome for v in judged] == ["reproduced"] * 6
    assert found.verdict.mean == pytest.approx(8)  # decades from 1e-6
    assert judged[2].mean == pytest.approx(5.69897)
    assert "never further than 1e-14 from one process with all 32" in found.summary
    assert "as far as 0.5 there; processes that each had their own, 0.2" in found.summary
    assert found.table.rows[3] == ("2", s.OWN, "2e-01", "2e-01", "2e-01")
    assert len(found.table.rows) == 8
    assert "4 synchronised processes equal one big batch, too (11 + 9 + 7 + 5 rows)." in [
        other.claim for other in found.also
    ]


@pytest.mark.parametrize(
    ("seeds_against", "outcome"), [(8, "contradicted"), (4, "unresolved"), (1, "reproduced")]
)
def test_the_other_way_round(seeds_against, outcome):
    against = {s.EVEN: 1e-3, s.UNEVEN: 1e-3, s.AVERAGED: 1e-12, s.OWN: 1e-12}
    mixed = {
        arm: [against[arm]] * seeds_against
        + [value or 1e-15 for value in TRUE[arm]][seeds_against:]
        for arm in s.ARMS
    }
    found = s.analyse(MADE_UP, made_up(mixed))
    judged = [found.verdict, *(other.verdict for other in found.also)]
    assert [v.outcome for v in judged] == [outcome] * 6


def test_figures_show_the_largest_of_the_parts_by_step():
    figures = s.figures(MADE_UP, made_up(TRUE))
    assert [p.name for p in figures] == ["distance-2", "distance-4"]
    lines = {line.get_label(): list(line.get_ydata()) for line in figures[0].figure.axes[0].lines}
    # Half of the seeds have it at either step, and the median lies between.
    assert lines[s.AVERAGED] == pytest.approx([0.25, 0.25])
