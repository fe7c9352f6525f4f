import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.errors import InputError
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import residual as r
from batchnorm.lab.verdict import CONTRADICTED, REPRODUCED, UNRESOLVED
from lab_rehearsal import rehearse

TINY = dataclasses.replace(
    r.PROFILES["quick"], seeds=2, depth=10, width=24, batch=32, shown=(1, 8, 10, 99)
)


def test_rehearsal():
    runs, findings = rehearse(r.EXPERIMENT, TINY)
    assert len(runs) == 2 * 3
    assert [row[0] for row in findings.table.rows] == ["1", "8", "10"]  # there is no block 99


def trial(arm, **fields):
    given = {"stage": "networks", "seed": 3, "depth": 4, "width": 30, "batch": 40}
    return r.ResidualTrial(arm=arm, **(given | fields))


@pytest.mark.parametrize("arm", r.ARMS)
def test_run_equals_the_blocks_written_with_torchs_own_layers(arm):
    data, t = load("digits"), trial(arm)
    draws = torch.Generator().manual_seed(3)
    x = torch.from_numpy(data.x_train).flatten(1)
    h = x[torch.randperm(len(x), generator=draws)[:40]].double()

    def weight(fan_in):
        return torch.empty(30, fan_in).normal_(std=(2 / fan_in) ** 0.5, generator=draws).double()

    def norm(values):
        return nn.BatchNorm1d(30).double()(values).detach()

    h = norm(h @ weight(64).T)
    shares, sums = [], []
    for _ in range(4):
        inner = norm(h) if arm == r.FIRST else h
        branch = inner.clamp(min=0) @ weight(30).T
        branch = norm(branch) if arm == r.LAST else branch
        h = h + branch
        over_batch = [np.var(values.numpy(), axis=0).mean() for values in (branch, h)]
        shares.append(over_batch[0] / over_batch[1])
        sums.append(over_batch[1] * 40 / 39)
    found = r.run(t, data).measured
    assert found["shares"] == pytest.approx(shares, rel=1e-9)
    assert found["sums"] == pytest.approx(sums, rel=1e-9)


def test_a_branch_that_normalization_begins_has_what_the_relu_leaves():
    """1/(l + π/(π - 1)) with normal inputs; the module says where it comes from."""
    shares = [
        r.run(trial(r.FIRST, seed=seed, width=300, batch=300, depth=12), load("digits")).measured
        for seed in range(3)
    ]
    mean = np.mean([m["shares"] for m in shares], axis=0)
    theory = [1 / (block + math.pi / (math.pi - 1)) for block in range(1, 13)]
    assert mean == pytest.approx(theory, rel=0.05)


def test_deep_plain_networks_do_not_overflow_and_few_rows_are_said_in_words():
    deepest = r.PROFILES["full"].depth
    found = r.run(trial(r.PLAIN, depth=deepest), load("digits")).measured
    assert math.isfinite(found["sums"][-1])
    assert found["sums"][-1] > torch.finfo(torch.float32).max
    with pytest.raises(InputError, match="at least 3000 training rows"):
        r.run(trial(r.PLAIN, batch=3000), load("digits"))


def test_plan_pairs_the_arms():
    plan = r.plan(r.PROFILES["quick"], [])
    assert len(plan) == 8 * 3
    assert [(t.seed, t.arm) for t in plan[:4]] == [*((0, arm) for arm in r.ARMS), (1, r.PLAIN)]
    assert {t.depth for t in plan} == {128}
    assert all(s.depth == max(s.shown) for s in r.PROFILES.values())


SETTINGS = dataclasses.replace(TINY, seeds=8)


def made_up(plain=0.5, off=1.03, last=0.99, at=None):
    """Shares that are `off` times the theory's; `at`: in that block only, and as it should else."""
    runs = []
    for t in r.plan(SETTINGS, []):
        factor = {r.FIRST: off, r.LAST: last, r.PLAIN: plain / 0.5}[t.arm] + 1e-4 * t.seed
        shares = [
            r.predicted(t.arm, block) * (factor if at in (None, block) else 1.0)
            for block in range(1, 11)
        ]
        runs.append(Run(t, {"shares": shares, "sums": [1.0] * 10}, {}))
    return runs


def outcomes(**fields):
    found = r.analyse(SETTINGS, made_up(**fields))
    return [found.verdict.outcome, *(other.verdict.outcome for other in found.also)]


def test_every_claim_can_be_reproduced_contradicted_and_unresolved():
    assert outcomes() == [REPRODUCED] * 4
    # Block 10 of a normalized branch should have 1/11, so six times that is more than a half.
    assert outcomes(off=6.0, last=0.85, plain=0.4) == [CONTRADICTED] * 4
    edge = 0.9 - 3.5e-4  # half of the seeds on either side of the tolerance
    assert outcomes(off=edge, last=edge, plain=edge / 2)[:3] == [UNRESOLVED] * 3
    # A plain share grows by 5e-5 a seed here, a normalized one by 1e-4/11: they cross midway.
    assert outcomes(plain=1 / 11 - 3.5 * (5e-5 - 1e-4 / 11), off=1.0)[3] == UNRESOLVED


def test_the_worst_block_counts_and_the_first_ones_do_not():
    assert outcomes(off=1.2, at=9)[0] == CONTRADICTED
    assert outcomes(off=1.2, at=7)[0] == REPRODUCED
    assert r.worst([5.0] * 7 + [1 / 9, 0.1, 0.8 / 11], r.LAST) == pytest.approx(0.2)


def test_analysis_speaks_in_the_runs_own_numbers():
    found = r.analyse(SETTINGS, made_up(off=1.05, last=0.95, plain=0.47))
    first, last, plain = (1.05035 / 11, 0.95035 / 11, 0.47 + 0.5 * 3.5e-4)
    assert f"BatchNorm begins had {first:.4f} of the sum's variance" in found.summary
    assert "the theory says 0.0909" in found.summary
    assert f"BatchNorm ends had {last:.4f}" in found.summary
    assert f"without normalization {plain:.2f}" in found.summary
    assert found.table.columns == ("block", "1/(block + 1)", *r.ARMS)
    assert found.table.rows[-1][:2] == ("10", "0.0909")
    assert found.table.rows[-1][3] == f"{first:.4f}"
    assert found.caveats == ()
    few = dataclasses.replace(SETTINGS, seeds=2)
    runs = [run for run in made_up() if run.trial.seed < 2]
    assert "2 seeds are few" in r.analyse(few, runs).caveats[0]
