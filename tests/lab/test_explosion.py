import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.errors import InputError
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import explosion as e
from batchnorm.lab.verdict import CONTRADICTED, REPRODUCED, UNRESOLVED
from lab_rehearsal import rehearse

TINY = dataclasses.replace(
    e.PROFILES["quick"], seeds=2, batch=16, linear=(4, 6), width=32, widths=(24, 32), window=6
)


def test_rehearsal():
    runs, findings = rehearse(e.EXPERIMENT, TINY)
    assert len(runs) == 2 * (4 + 1)  # the last linear network has width 32 already
    assert [row[:3] for row in findings.table.rows] == [
        (e.PLAIN, "16", "32"),
        (e.RELU, "16", "32"),
        (e.LINEAR, "4", "32"),
        (e.LINEAR, "6", "32"),
        (e.LINEAR, "6", "24"),
    ]


def trial(network, **fields):
    given = {"stage": "networks", "seed": 3, "batch": 12, "width": 20, "depth": 5}
    return e.ExplosionTrial(network=network, **(given | fields))


@pytest.mark.parametrize("network", [e.PLAIN, e.RELU, e.LINEAR])
def test_run_equals_backward_through_torchs_own_layers(network):
    data, t = load("digits"), trial(network)
    draws = torch.Generator().manual_seed(3)
    x = torch.from_numpy(data.x_train).flatten(1)
    h = x[torch.randperm(len(x), generator=draws)[:12]].double()
    inputs = []
    for fan_in, fan_out in itertools.pairwise([64, *[20] * 5]):
        weight = torch.empty(fan_out, fan_in).normal_(std=(2 / fan_in) ** 0.5, generator=draws)
        h = h @ weight.double().T
        if network != e.PLAIN:
            h = nn.BatchNorm1d(fan_out).double()(h)
        h = h if network == e.LINEAR else h.relu()
        h = h.requires_grad_()
        h.retain_grad()
        inputs.append(h)
    h.backward(torch.randn(h.shape, generator=draws).double())
    expected = [float(i.grad.square().sum()) for i in inputs]
    found = e.run(t, data).measured["squared_norms"]
    assert found == pytest.approx(expected, rel=1e-3)  # float32 beside float64, five layers


def test_with_and_without_normalization_the_weights_are_the_same():
    """The cotangent is drawn after all weights, and is the last gradient: the same in both."""
    data = load("digits")
    plain, normalized = (e.run(trial(n), data).measured for n in (e.PLAIN, e.RELU))
    assert plain["squared_norms"][-1] == normalized["squared_norms"][-1]
    assert plain["squared_norms"][0] != normalized["squared_norms"][0]


def test_gradients_of_a_linear_network_equal_the_closed_form_of_the_theory():
    """At the fixed point of a wide network the rate is (B - 2)/(B - 3), here 3/2."""
    settings = dataclasses.replace(TINY, linear=(5,), width=600, window=40)
    runs = [
        e.run(t, load("digits"))
        for t in e.plan(dataclasses.replace(settings, widths=(600,), seeds=3), [])
        if t.network == e.LINEAR
    ]
    logs = [math.log(e.rate(r)) for r in runs]
    assert np.mean(logs) == pytest.approx(math.log(3 / 2), abs=0.05)


def test_too_little_data_is_said_in_words():
    data = load("digits")
    narrow = dataclasses.replace(data, x_train=data.x_train.reshape(len(data.x_train), -1)[:, :10])
    with pytest.raises(InputError, match=r"at least 11 features.*got 10"):
        e.run(trial(e.LINEAR), narrow)
    e.run(trial(e.RELU), narrow)
    with pytest.raises(InputError, match="at least 2000 training rows"):
        e.run(trial(e.RELU, batch=2000), data)


def test_plan_leaves_the_margins_room_and_pairs_the_networks():
    plan = e.plan(e.PROFILES["quick"], [])
    assert len(plan) == 8 * (4 + 3)
    depths = {(t.network, t.batch): t.depth for t in plan}
    assert depths[e.RELU, 128] == depths[e.PLAIN, 128] == 10 + 64 + 1 + 10
    assert depths[e.LINEAR, 8] == 16 + 64 + 1 + 16
    assert depths[e.LINEAR, 32] == 64 + 64 + 1 + 64
    assert [t.width for t in plan if t.seed == 0 and t.batch == 32] == [512, 128, 256, 1024]
    for settings in e.PROFILES.values():
        # Otherwise no growth at all would count as the predicted one.
        assert all(e.predicted(e.LINEAR, b) * (1 - e.TOLERANCE) > 1 for b in settings.linear)
        assert settings.width in settings.widths


SETTINGS = dataclasses.replace(TINY, seeds=8, linear=(8, 32), width=512, widths=(128, 512))


def made_up(relu=1.46, plain=1.0, linear=1.19, narrow=1.02, wide=1.03):
    """Runs whose growth between the margins is that, wilder outside, and differs a bit by seed."""
    growth = {(e.RELU, 16, 512): relu, (e.PLAIN, 16, 512): plain, (e.LINEAR, 8, 512): linear}
    growth |= {(e.LINEAR, 32, 128): narrow, (e.LINEAR, 32, 512): wide}
    runs = []
    for t in e.plan(SETTINGS, []):
        margin = e.margin(t.network, t.batch)
        inner = t.depth - 2 * margin - 1
        rate = growth[t.network, t.batch, t.width] + 1e-4 * t.seed
        logs = [math.log(1.7)] * margin + [math.log(rate)] * inner + [math.log(1.7)] * margin
        norms = np.exp(np.cumsum([0, *logs]))[::-1]
        runs.append(Run(t, {"squared_norms": norms.tolist()}, {}))
    return runs


def test_rate_is_the_growth_between_the_margins():
    found = {(r.trial.network, r.trial.batch, r.trial.width): e.rate(r) for r in made_up()[:5]}
    assert found == pytest.approx(
        {
            (e.PLAIN, 16, 512): 1.0,
            (e.RELU, 16, 512): 1.46,
            (e.LINEAR, 8, 512): 1.19,
            (e.LINEAR, 32, 512): 1.03,
            (e.LINEAR, 32, 128): 1.02,
        }
    )


def outcomes(**growth):
    found = e.analyse(SETTINGS, made_up(**growth))
    return [found.verdict.outcome, *(other.verdict.outcome for other in found.also)]


def test_every_claim_can_be_reproduced_contradicted_and_unresolved():
    assert outcomes() == [REPRODUCED] * 5
    # 2.5% from π/(π − 1), no more than without normalization, 2.5% from 6/5, and the wide network
    # further from 30/29 than the narrow one.
    assert outcomes(relu=1.43, plain=1.43 + 1e-3, linear=1.17, narrow=1.03, wide=1.02) == [
        CONTRADICTED,
        CONTRADICTED,
        CONTRADICTED,
        REPRODUCED,
        CONTRADICTED,
    ]
    assert outcomes(wide=1.012)[3] == CONTRADICTED
    edge = 1.2 * 0.98 - 3.5e-4  # half of the seeds on either side of the tolerance
    assert outcomes(linear=edge)[2] == UNRESOLVED
    assert outcomes(plain=1.46)[1] == UNRESOLVED


def test_analysis_speaks_in_the_runs_own_numbers():
    found = e.analyse(SETTINGS, made_up())
    assert "grew by a factor of 1.460 a layer" in found.summary
    assert "the theory says 1.467" in found.summary
    mean = 1.46 + 1e-4 * 3.5
    assert f"Through 6 layers that is a factor of {mean**6:.0e}" in found.summary
    assert "no normalization it grew by 1.000 a layer" in found.summary
    assert found.table.rows[2] == (e.LINEAR, "8", "512", "1.200", "1.190 (1.190–1.191)")
    (coarse,) = found.caveats  # of batches of 32 only, and eight seeds are enough
    share = (1.03 + 3.5e-4 - 1) / (1 / 29)
    assert "In batches of 32" in coarse
    assert f"measured is {share:.0%} of that growth" in coarse
    assert "width 512 is nearer to it than that of 128" in found.also[-1].claim
