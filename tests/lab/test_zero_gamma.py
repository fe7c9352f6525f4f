import copy
import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from batchnorm.lab import networks, training, tuning
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import zero_gamma as e
from batchnorm.lab.tuning import EVALUATION, SWEEP, select
from lab_rehearsal import rehearse

TINY = dataclasses.replace(
    e.PROFILES["quick"], seeds=2, starts=(1.0, 0.1, 0.0), rates=(0.03, 0.1), steps=12, blocks=3
)
SETTINGS = dataclasses.replace(
    e.PROFILES["quick"], rates=(0.01, 0.1, 1.0), steps=30, tuning_seeds=1
)
ARMS = [e.ONE, e.ZERO, e.MATCHED]


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


def by_hand(last, x=None, blocks=3):
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
    net = nn.Sequential(stem, nn.BatchNorm1d(24), nn.ReLU(), *body, head).double()
    if x is not None:  # the first outputs are to be as large as from zero
        sizes = [copy.deepcopy(other)(x).pow(2).mean().sqrt() for other in (by_hand(0.0), net)]
        head.weight.data *= (sizes[0] / sizes[1]).detach()
    return net


@pytest.mark.parametrize(
    ("arm", "start"), [(e.ONE, 1.0), (e.arm(0.1), 0.1), (e.ZERO, 0.0), (e.MATCHED, 1.0)]
)
def test_run_equals_the_same_training_written_with_torch_s_own_parts(arm, start):
    data = load("digits")
    found = e.run(trial(arm), data).measured
    x, y, x_test, y_test = training.tensors(data)
    x, x_test = x.double(), x_test.double()
    with torch.random.fork_rng():
        net = by_hand(start, x if arm == e.MATCHED else None)
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
    assert len(runs) == 4 * (2 * 2 + 2) + 2 * 2
    assert [j.ours for j in findings.also] == [False, True, True, True, True]


def test_the_sweep_sees_nothing_of_the_test_rows():
    data, t = load("digits"), trial(e.ZERO)
    swept = e.run(dataclasses.replace(t, stage=SWEEP), data).measured
    seen = tuning.data_for(dataclasses.replace(t, stage=SWEEP), data)
    again = e.run(t, seen).measured
    assert swept["error"] == again["error"] != e.run(t, data).measured["error"]


def test_a_run_that_diverges_is_a_result_and_no_warning():
    found = e.run(trial(e.ONE, rate=1e9), load("digits")).measured
    assert found["early"] is None
    assert found["error"] > 0.5


def test_plan_tries_every_rate_with_the_evaluation_s_seeds():
    sweep = e.plan(SETTINGS, [])
    assert {t.stage for t in sweep} == {SWEEP}
    assert len(sweep) == 3 * 3
    best = {e.ONE: 0.01, e.ZERO: 0.1, e.MATCHED: 1.0}
    runs = [Run(t, {"error": 0.1 + (t.rate != best[t.arm])}, {}) for t in sweep]
    found = e.plan(SETTINGS, runs)[len(sweep) :]
    assert {t.arm: t.rate for t in found if t.stage == EVALUATION} == best
    tried = [(t.arm, t.rate, t.seed) for t in found]
    assert len(tried) == len(set(tried)), "a network is trained twice"
    both = set(itertools.product((e.ONE, e.ZERO), SETTINGS.rates, range(4)))
    assert set(tried) == both | {(e.MATCHED, 1.0, seed) for seed in range(4)}


def made_up(one, zero, matched=None, seeds=4):
    """Runs with (error at 0.01, 0.1, 1; early) of the arms, whose best is 0.1.

    The seeds differ a little.
    """
    runs = []
    for arm, (*errors, early) in zip(ARMS, (one, zero, matched or one), strict=True):
        for rate, error in zip(SETTINGS.rates, errors, strict=True):
            runs.append(Run(trial(arm, stage=SWEEP, seed=9, rate=rate), {"error": 0.123}, {}))
            stage = EVALUATION if rate == 0.1 else e.RATES
            for seed in range(seeds if stage == EVALUATION or arm != e.MATCHED else 0):
                measured = {"error": error + (-1) ** seed / 1000, "early": early}
                runs.append(Run(trial(arm, stage=stage, seed=seed, rate=rate), measured, {}))
    return runs


GOOD, BAD = (0.05, 0.03, 0.04, 10), (0.25, 0.1, 0.6, None)


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
    assert outcomes == [expected] * 5


@pytest.mark.parametrize(
    ("arm", "changed", "decided"),
    [
        (e.ONE, {1: 0.1}, [0]),
        (e.MATCHED, {3: None}, [1]),
        (e.MATCHED, {1: 0.1}, [2]),
        (e.ONE, {2: 0.6}, [3]),
        (e.ONE, {0: 0.06}, [4]),
        (e.ONE, {3: None}, []),
    ],
)
def test_each_claim_has_numbers_of_its_own(arm, changed, decided):
    arms = {name: list(GOOD) for name in ARMS}
    for place, value in changed.items():
        arms[arm][place] = value
    found = e.analyse(SETTINGS, made_up(*arms.values()))
    verdicts = [found.verdict, *(j.verdict for j in found.also)]
    outcomes = ["reproduced" if i in decided else "unresolved" for i in range(5)]
    assert [verdict.outcome for verdict in verdicts] == outcomes


def test_the_largest_rate_is_counted_in_decades_and_a_failure_as_the_next_smaller():
    runs = made_up((0.9, 0.9, 0.9, None), (0.1, 0.1, 0.9, 10))
    found = e.analyse(SETTINGS, runs)
    # From 0.001, as no rate was borne, to 0.1.
    assert found.also[2].verdict.mean == pytest.approx(2)
    assert "The largest rate at which it learned was 0.1 instead of none." in found.summary
    assert any("γ = 1, 4 of 4 seeds learned at no rate" in said for said in found.caveats)
    found = e.analyse(SETTINGS, made_up(GOOD, (0.9, 0.9, 0.2 - 0.001, 10)))
    assert found.also[2].verdict.mean == pytest.approx(0)
    assert sum("its limit lies higher" in said for said in found.caveats) == 2


def test_claims_are_the_same_sentences_whatever_the_runs_and_rates():
    one, other = (
        e.analyse(dataclasses.replace(SETTINGS, steps=steps), made_up(*made)).also
        for steps, made in ((30, (GOOD, BAD)), (50, (BAD, GOOD)))
    )
    assert [j.claim for j in one] == [j.claim for j in other]
    assert not any(character.isdigit() for j in one[2:] for character in j.claim)


def test_the_words_have_the_runs_own_numbers():
    runs = made_up((0.202, 0.102, 0.602, None), (0.052, 0.032, 0.3, 10), (0, 0.072, 0, 20))
    found = e.analyse(SETTINGS, runs)
    for said in (
        "3.2% of the test rows wrong instead of 10.2%",
        "with a γ of 1 and first outputs made as small, 7.2%",
        "after 10 steps, theirs after 30 and 20.",
        "At 0.01, the smallest, 5.2% came out wrong instead of 20.2%",
    ):
        assert said in found.summary
    assert [row[0] for row in found.table.rows] == ARMS
    assert [row[3:] for row in found.table.rows] == [("30", "0.1"), ("10", "0.1"), ("20", "–")]
    assert found.caveats == (found.verdict.caveats()[0],)
    runs = made_up((0.091, 0.102, 0.602, None), (0.052, 0.032, 0.3, 10))
    said = e.analyse(SETTINGS, runs).caveats[0]
    assert said.startswith("For γ = 1 the sweep did not find the best rate")
    assert said.endswith("at 0.01, 9.1% came out wrong.")


def test_figures_show_the_errors_by_rate_and_the_losses_of_the_evaluation():
    runs = made_up(BAD, GOOD)
    for r in select(runs, stage=EVALUATION):
        r.measured.update(losses=[float(r.trial.seed + 1)] * 26, level=1.15)
    loss, rates = e.figures(SETTINGS, runs)
    lines = {line.get_label(): line for line in loss.figure.axes[0].get_lines()}
    assert list(lines[e.ZERO].get_ydata()) == [2.5] * 26
    assert list(lines[e.ZERO].get_xdata())[::25] == [5, 30]
    shown = {line.get_label(): line for line in rates.figure.axes[0].get_lines()}
    assert list(shown[e.ONE].get_ydata()) == pytest.approx([0.25, 0.1, 0.6])
