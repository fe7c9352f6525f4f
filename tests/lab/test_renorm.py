import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm, Renorm
from batchnorm.lab import networks, training, tuning
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import renorm as e
from batchnorm.lab.tuning import EVALUATION, FIRST_TUNING_SEED, SWEEP
from lab_rehearsal import rehearse

TINY = dataclasses.replace(
    e.PROFILES["quick"], seeds=2, sizes=(4, 8), rates=(0.03, 0.1), steps=12, width=16, depth=2
)
LARGE = "BatchNorm over 32"
SMALL, OURS, SORTED, OURS_SORTED = (
    "BatchNorm over 4", "renorm over 4", "BatchNorm over 4, sorted", "renorm over 4, sorted"
)  # fmt: skip


def trial(arm, **fields):
    given = {"stage": EVALUATION, "seed": 6, "rate": 0.1, "steps": 20, "width": 24, "depth": 2}
    return e.RenormTrial(arm=arm, batch=32, **(given | fields))


class ByHand(nn.Module):
    """Renormalization in float64, group by group, from the paper's formulas."""

    def __init__(self, channels, size, steps, renorm):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels).double())
        self.bias = nn.Parameter(torch.zeros(channels).double())
        self.mean, self.var = torch.zeros(channels).double(), torch.ones(channels).double()
        self.size, self.steps, self.renorm, self.step, self.still = size, steps, renorm, 0, False

    def forward(self, x):
        if not self.training:
            return (x - self.mean) / (self.var + 1e-5).sqrt() * self.weight + self.bias
        parts = []
        for group in x.split(self.size):
            mean, var = group.mean(0), group.var(0, unbiased=False)
            y = (group - mean) / (var + 1e-5).sqrt()
            if self.renorm:
                first, d_last, r_last = 0.1 * self.steps, 0.5 * self.steps, 0.75 * self.steps
                r_max = 1 + 2 * min(max((self.step - first) / (r_last - first), 0), 1)
                d_max = 5 * min(max((self.step - first) / (d_last - first), 0), 1)
                sigma = (self.var + 1e-5).sqrt()
                r = ((var + 1e-5).sqrt() / sigma).clamp(1 / r_max, r_max).detach()
                y = y * r + ((mean - self.mean) / sigma).clamp(-d_max, d_max).detach()
            parts.append(y)
        if not self.still:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
            self.var = 0.9 * self.var + 0.1 * x.var(0).detach()
            self.step += 1
        return torch.cat(parts) * self.weight + self.bias


@pytest.mark.parametrize("arm", [LARGE, SMALL, OURS, OURS_SORTED])
def test_run_equals_the_paper_s_formulas_in_float64(arm):
    data, t = load("digits"), trial(arm)
    found = e.run(t, data).measured
    x, y, x_test, y_test = training.tensors(data)
    x, x_test = x.double(), x_test.double()
    size = 32 if arm == LARGE else 4
    net = networks.mlp(
        [64, 24, 24, 10],
        lambda channels: ByHand(channels, size, 20, arm.startswith("renorm")),
        training.generator(6),
    ).double()
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)
    for step, part in enumerate(itertools.islice(training.batches(len(x), 32, 6), 20)):
        rows = part
        if arm.endswith("sorted"):
            rows = torch.tensor(sorted(part.tolist(), key=lambda row: int(y[row])))
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 20))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    net.eval()
    error = float((net(x_test).argmax(1) != y_test).double().mean())
    net.train()
    for layer in net:
        layer.still = True
    rest = len(x_test) % size
    assert rest, "the rest of the test rows is left out"
    wrong, order = 0, torch.randperm(len(x_test), generator=training.generator(6))[:-rest]
    for part in order.split(32):
        rows = part
        if arm.endswith("sorted"):
            rows = torch.tensor(sorted(part.tolist(), key=lambda row: int(y_test[row])))
        wrong += int((net(x_test[rows]).argmax(1) != y_test[rows]).sum())
    # Rounding may turn one image, which is 0.002.
    assert found["error"] == pytest.approx(error, abs=0.0021)
    assert found["as_trained"] == pytest.approx(wrong / len(order), abs=0.0021)
    assert 0.02 < error < 0.6, "a comparison that says something"


def test_the_tiny_profile_runs_from_plan_to_figures():
    runs, findings = rehearse(e.EXPERIMENT, TINY)
    assert len({r.trial.arm for r in runs}) == 9
    assert len(runs) == 9 * (2 + 2)
    assert len(findings.also) == 3
    assert not any(judged.ours for judged in findings.also)
    # All arms of a seed see the same rows, so an arm of the same name but for the order differs.
    of_seed = {r.trial.arm: r.measured for r in runs if r.trial.seed == 0}
    assert of_seed[SMALL] != of_seed[SORTED]


def test_evaluation_after_training_in_groups_leaves_the_network_alone():
    net = networks.mlp([64, 8, 10], e._norm(trial(OURS)), training.generator(0))
    _, _, x_test, y_test = training.tensors(load("digits"))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.eval()
    e._as_trained(net, x_test[:30], y_test[:30], trial(OURS))  # 30 is 7 groups and a half
    assert not net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert 0 <= e._as_trained(net, x_test[:30], y_test[:30], trial(LARGE)) <= 1


def made_up(errors, as_trained=None, rate=0.1, seeds=4):
    """Runs in which each arm has that error on average; the seeds differ a little."""
    return [
        Run(
            trial(arm, seed=seed, rate=rate),
            {
                "error": error + (-1) ** seed / 1000,
                "as_trained": (as_trained or {}).get(arm, error),
            },
            {},
        )
        for arm, error in errors.items()
        for seed in range(seeds)
    ]


GOOD = {LARGE: 0.02, SMALL: 0.1, OURS: 0.025, SORTED: 0.3, OURS_SORTED: 0.027}
WORSE = {LARGE: 0.02, SMALL: 0.1, OURS: 0.15, SORTED: 0.3, OURS_SORTED: 0.4}
SAME = {LARGE: 0.02, SMALL: 0.1, OURS: 0.1, SORTED: 0.3, OURS_SORTED: 0.3}
SETTINGS = dataclasses.replace(e.PROFILES["quick"], rates=(0.03, 0.1, 0.3))


@pytest.mark.parametrize(
    ("errors", "expected"),
    [(GOOD, "reproduced"), (WORSE, "contradicted"), (SAME, "unresolved")],
)
def test_verdicts_follow_the_runs(errors, expected):
    found = e.analyse(SETTINGS, made_up(errors))
    judged = [found.verdict, *(j.verdict for j in found.also)]
    assert [verdict.outcome for verdict in judged] == [expected] * 2
    gains = [100 * (errors[a] - errors[b]) for a, b in ((SMALL, OURS), (SORTED, OURS_SORTED))]
    assert [verdict.mean for verdict in judged] == pytest.approx(gains)


def test_claims_are_the_same_sentences_in_both_profiles_but_for_more_sizes():
    quick, full = (
        e.analyse(e.PROFILES[name], made_up(errors)).also
        for name, errors in (
            ("quick", GOOD),
            ("full", dict.fromkeys(e._arms(e.PROFILES["full"]), 0.1)),
        )
    )
    assert {j.claim for j in quick} < {j.claim for j in full}


def test_the_sweep_sees_nothing_of_the_test_rows():
    data, t = load("digits"), trial(OURS, steps=5)
    seen = tuning.data_for(dataclasses.replace(t, stage=SWEEP), data)
    swept = e.run(dataclasses.replace(t, stage=SWEEP), data).measured
    assert swept == e.run(t, seen).measured != e.run(t, data).measured


def test_any_network_agrees_with_its_evaluation_where_nothing_is_clipped():
    """So that the two agree is no finding: here the network was never trained with it."""
    _, _, x_test, y_test = training.tensors(load("digits"))
    wide = Renorm(1e6, 1e6, r_steps=(0, 0), d_steps=(0, 0))
    net = networks.mlp(
        [64, 24, 10],
        lambda channels: BatchNorm(channels, virtual_batch_size=4, renorm=wide),
        training.generator(0),
    )
    whole = len(x_test) - len(x_test) % 4
    order = torch.randperm(len(x_test), generator=training.generator(6))[:whole]
    error = 1 - training.accuracy(net, x_test[order], y_test[order])
    # Rounding may turn one image, which is 0.002.
    assert e._as_trained(net, x_test, y_test, trial(SMALL)) == pytest.approx(error, abs=0.0021)
    for layer in net.modules():
        if isinstance(layer, BatchNorm):
            layer.renorm = None
    assert abs(e._as_trained(net, x_test, y_test, trial(SMALL)) - error) > 0.01


def test_the_words_have_the_runs_own_numbers():
    found = e.analyse(SETTINGS, made_up(GOOD, {OURS: 0.077}, rate=0.3))
    for said in (
        "10.0% of the test rows came out wrong instead of 2.0%; with renormalization, 2.5%: it "
        "repaired 94% of the harm.",
        "sorted by class: 30.0%, and 2.7% with renormalization, which repaired 98% of the harm.",
    ):
        assert said in found.summary
    assert found.table.rows[2][0] == OURS
    assert found.table.rows[2][-1] == "7.7%"
    assert sum("0.3, is on the edge" in caveat for caveat in found.caveats) == 5
    assert found.caveats[-1].startswith("4 seeds are few")
    assert e.analyse(SETTINGS, made_up(GOOD, seeds=8)).caveats == ()


def test_plan_tunes_each_arm_by_its_own_error():
    best = {LARGE: 0.1, SMALL: 0.03, OURS: 0.3, SORTED: 0.03, OURS_SORTED: 0.1}
    sweep = e.plan(SETTINGS, [])
    assert len(sweep) == 5 * 3
    assert {t.stage for t in sweep} == {SWEEP}
    runs = [Run(t, {"error": 0.1 + (t.rate != best[t.arm])}, {}) for t in sweep]
    evaluation = e.plan(SETTINGS, runs)[len(sweep) :]
    assert {t.arm: t.rate for t in evaluation} == best
    assert sorted(t.seed for t in evaluation) == sorted([0, 1, 2, 3] * 5)
    assert all(t.seed >= FIRST_TUNING_SEED for t in sweep)
