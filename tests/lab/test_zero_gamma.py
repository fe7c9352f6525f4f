import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from batchnorm.lab import networks, training
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import zero_gamma as e
from batchnorm.lab.tuning import EVALUATION, SWEEP, select
from lab_rehearsal import rehearse

TINY = dataclasses.replace(
    e.PROFILES["quick"], seeds=2, starts=(1.0, 0.1, 0.0), rates=(0.03, 0.1), steps=12, blocks=3
)
SETTINGS = dataclasses.replace(e.PROFILES["quick"], rates=(0.01, 0.1, 1.0), steps=30)


def trial(arm, **fields):
    given = {"stage": EVALUATION, "seed": 6, "rate": 0.05, "steps": 15, "blocks": 3, "width": 24}
    return e.ZeroGammaTrial(arm=arm, batch=64, **(given | fields))


class Block(nn.Module):
    """The block with torch's own layers, for weights given in the order they are drawn."""

    def __init__(self, weights, last):
        super().__init__()
        self.a, self.b = (nn.Linear(24, 24, bias=False) for _ in range(2))
        self.a.weight.data, self.b.weight.data = next(weights), next(weights)
        self.n, self.m = nn.BatchNorm1d(24), nn.BatchNorm1d(24)
        nn.init.constant_(self.m.weight, last)

    def forward(self, x):
        return (x + self.m(self.b(self.n(self.a(x)).relu()))).relu()


def by_hand(last, blocks=3):
    """The network with torch's own layers, in float64; its weights are drawn here."""
    draws = torch.Generator().manual_seed(6)

    def weights():
        for fan_out, fan_in, gain in [(24, 64, 2), *[(24, 24, 2)] * 2 * blocks, (10, 24, 1)]:
            yield torch.empty(fan_out, fan_in).normal_(generator=draws) * (gain / fan_in) ** 0.5

    drawn = weights()
    stem, head = nn.Linear(64, 24, bias=False), nn.Linear(24, 10)
    stem.weight.data = next(drawn)
    body = [Block(drawn, last) for _ in range(blocks)]
    head.weight.data = next(drawn)
    nn.init.zeros_(head.bias)
    return nn.Sequential(stem, nn.BatchNorm1d(24), nn.ReLU(), *body, head).double()


@pytest.mark.parametrize("start", [1.0, 0.1, 0.0])
def test_run_equals_the_same_training_written_with_torch_s_own_parts(start):
    data = load("digits")
    found = e.run(trial(e.arm(start)), data).measured
    x, y, x_test, y_test = training.tensors(data)
    x, x_test = x.double(), x_test.double()
    with torch.random.fork_rng():
        net = by_hand(start)
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)
    losses = []
    for step, rows in enumerate(itertools.islice(training.batches(len(x), 64, 6), 15)):
        optimizer.param_groups[0]["lr"] = 0.025 * (1 + math.cos(math.pi * step / 15))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    means = torch.tensor(losses).unfold(0, 5, 1).mean(1).tolist()
    assert found["losses"] == pytest.approx(means, rel=1e-4)
    assert found["level"] == pytest.approx(1.151, abs=1e-3)
    first = [step for step, mean in zip(range(5, 16), means, strict=True) if mean <= 1.1513]
    assert found["early"] == (first[0] if first else None)
    net.eval()
    wrong = float((net(x_test).argmax(1) != y_test).double().mean())
    # Rounding may turn one image, which is 0.002.
    assert found["error"] == pytest.approx(wrong, abs=0.0021)
    assert 0.02 < wrong < 0.6, "a comparison that says something"


def test_at_zero_every_block_is_an_identity_at_first():
    draws = [training.generator(1) for _ in range(2)]
    deep = networks.residual_mlp((8, 16, 3), 5, draws[0], last=0.0)
    usual = networks.residual_mlp((8, 16, 3), 5, draws[1])
    x = torch.randn(20, 8, generator=training.generator(0))
    torch.testing.assert_close(deep(x), deep[-1](deep[1](deep[0](x))))
    pairs = zip(deep.named_parameters(), usual.named_parameters(), strict=True)
    differ = [name for (name, a), (_, b) in pairs if not torch.equal(a, b)]
    assert differ == [f"{i}.outer.weight" for i in range(2, 7)]


def test_the_tiny_profile_runs_from_plan_to_figures():
    runs, findings = rehearse(e.EXPERIMENT, TINY)
    assert len(runs) == 3 * (2 + 2 + 2 + 2)
    assert len(findings.also) == 4


def test_a_run_that_diverges_is_a_result_and_no_warning():
    found = e.run(trial(e.ONE, rate=1e9), load("digits")).measured
    assert found["early"] is None
    assert found["error"] > 0.5


def test_plan_tries_the_ends_once_the_sweep_is_done():
    sweep = e.plan(SETTINGS, [])
    assert {t.stage for t in sweep} == {SWEEP}
    assert len(sweep) == 2 * 3

    def after(learns):
        """Each arm is at its best at 0.1 or 0.01, and has learned up to the rate given."""
        best = {e.ONE: 0.01, e.ZERO: 0.1}
        runs = [
            Run(t, {"error": 0.05 + 0.1 * (t.rate != best[t.arm]) + (t.rate > learns[t.arm])}, {})
            for t in sweep
        ]
        found = e.plan(SETTINGS, runs)[len(sweep) :]
        return {(t.stage, t.arm): t.rate for t in found}, found

    rates, found = after({e.ONE: 0.01, e.ZERO: 0.1})
    assert rates == {
        (EVALUATION, e.ONE): 0.01,
        (EVALUATION, e.ZERO): 0.1,
        (e.SMALLEST, e.ONE): 0.01,
        (e.SMALLEST, e.ZERO): 0.01,
        (e.LARGEST, e.ONE): 0.1,
        (e.LARGEST, e.ZERO): 0.1,
    }
    assert sorted(t.seed for t in found) == sorted([0, 1, 2, 3] * 6)
    assert after({e.ONE: 1.0, e.ZERO: 0.1})[0][e.LARGEST, e.ZERO] == 1.0
    assert after({e.ONE: 0, e.ZERO: 0})[0][e.LARGEST, e.ONE] == 0.01


def made_up(one, zero, seeds=4):
    """Runs with (error at best, smallest, largest; early) of both; the seeds differ a little."""
    runs = [
        Run(trial(arm, stage=SWEEP, seed=9, rate=rate), {"error": 0.1 + (rate == 1.0)}, {})
        for arm in (e.ONE, e.ZERO)
        for rate in SETTINGS.rates
    ]
    stages = (EVALUATION, 0.1), (e.SMALLEST, 0.01), (e.LARGEST, 0.1)
    for arm, (*errors, early) in ((e.ONE, one), (e.ZERO, zero)):
        for (stage, rate), error in zip(stages, errors, strict=True):
            for seed in range(seeds):
                measured = {"error": error + (-1) ** seed / 1000, "early": early}
                runs.append(Run(trial(arm, stage=stage, seed=seed, rate=rate), measured, {}))
    return runs


GOOD, BAD = (0.03, 0.05, 0.04, 10), (0.1, 0.2, 0.6, None)


@pytest.mark.parametrize(
    ("one", "zero", "expected"),
    [
        (BAD, GOOD, "reproduced"),
        (GOOD, BAD, "contradicted"),
        (GOOD, GOOD, "unresolved"),
        (BAD, BAD, "unresolved"),
    ],
)
def test_verdicts_follow_the_runs(one, zero, expected):
    found = e.analyse(SETTINGS, made_up(one, zero))
    outcomes = [v.outcome for v in (found.verdict, *(j.verdict for j in found.also))]
    assert outcomes == [expected] * 4


@pytest.mark.parametrize("place", range(4))
def test_each_claim_has_numbers_of_its_own(place):
    mixed = list(GOOD)
    mixed[place] = BAD[place]
    found = e.analyse(SETTINGS, made_up(mixed, GOOD))
    order = [found.verdict, found.also[2].verdict, found.also[1].verdict, found.also[0].verdict]
    expected = ["unresolved"] * 4
    expected[place] = "reproduced"
    assert [verdict.outcome for verdict in order] == expected


def test_the_words_have_the_runs_own_numbers():
    found = e.analyse(SETTINGS, made_up((0.102, 0.202, 0.602, None), (0.032, 0.052, 0.042, 10)))
    for said in (
        "3.2% of the test rows wrong instead of 10.2%",
        "after 10 steps instead of 30",
        "At 0.1 for both: 4.2% and 60.2%; at 0.01, 5.2% and 20.2%",
    ):
        assert said in found.summary
    assert found.table.rows[0][3:] == ("20.2%", "60.2%")
    assert found.caveats == (found.verdict.caveats()[0],)
    assert e.analyse(SETTINGS, made_up(GOOD, GOOD, seeds=8)).caveats == ()


def test_figures_show_the_sweep_and_the_losses_of_the_evaluation():
    runs = made_up(BAD, GOOD)
    for r in select(runs, stage=EVALUATION):
        r.measured.update(losses=[float(r.trial.seed + 1)] * 26, level=1.15)
    loss, rates = e.figures(SETTINGS, runs)
    lines = {line.get_label(): line for line in loss.figure.axes[0].get_lines()}
    assert list(lines[e.ZERO].get_ydata()) == [2.5] * 26
    assert list(lines[e.ZERO].get_xdata())[::25] == [5, 30]
    shown = {line.get_label(): line for line in rates.figure.axes[0].get_lines()}
    assert list(shown[e.ONE].get_ydata()) == [0.1, 0.1, 1.1]
