import dataclasses
import itertools

import pytest
import torch
from torch import nn

from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import invariance as i
from batchnorm.lab.verdict import CONTRADICTED, REPRODUCED, UNRESOLVED
from lab_rehearsal import rehearse

TINY = dataclasses.replace(
    i.PROFILES["quick"], seeds=2, factors=(0.01, 10.0, 100.0), steps=5, width=20
)


def test_rehearsal():
    runs, findings = rehearse(i.EXPERIMENT, TINY)
    assert len(runs) == 2 * (3 * 2 + 4)
    assert [row[0] for row in findings.table.rows] == ["× 0.01", "× 10", "× 100"]
    # What the theory says of so short a training, too.
    assert findings.verdict.outcome == REPRODUCED
    assert [other.verdict.outcome for other in findings.also] == [REPRODUCED] * 3


def trial(arm, factor, **fields):
    given = {"stage": i.TRAINED, "seed": 3, "boost": 1.0, "rate": 0.1, "steps": 6}
    sizes = {"depth": 2, "width": 20, "batch": 60, "eps": 1e-3}
    return i.InvarianceTrial(arm=arm, factor=factor, **(given | sizes | fields))


def network(arm, factor):
    """The same network of torch's own layers, in float64."""
    draws = torch.Generator().manual_seed(3)
    layers = []
    for fan_in, fan_out in itertools.pairwise([64, 20, 20]):
        linear = nn.Linear(fan_in, fan_out, bias=arm == i.PLAIN)
        weight = torch.empty(fan_out, fan_in).normal_(std=(2 / fan_in) ** 0.5, generator=draws)
        linear.weight.data = factor * weight.double()
        layers += [linear, nn.BatchNorm1d(fan_out, eps=1e-3)] if arm != i.PLAIN else [linear]
        layers.append(nn.ReLU())
    head = nn.Linear(20, 10)
    head.weight.data = torch.empty(10, 20).normal_(std=20**-0.5, generator=draws)
    for layer in [*layers, head]:
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            layer.bias.data.zero_()
    return nn.Sequential(*layers, head).double()


@pytest.mark.parametrize("arm", i.ARMS)
def test_run_equals_the_same_written_with_torchs_own_layers(arm):
    data, t = load("digits"), trial(arm, 3.0, boost=9.0)
    x, y = torch.from_numpy(data.x_train).flatten(1).double(), torch.from_numpy(data.y_train)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2_000_000_003))
    before, net = network(arm, 1.0), network(arm, 3.0)

    def gradients(model, rows):
        model.zero_grad()
        outputs = model(x[rows])
        nn.CrossEntropyLoss()(outputs, y[rows]).backward()
        linears = [layer for layer in model if isinstance(layer, nn.Linear)][:-1]
        return outputs.detach(), linears

    (old, ones), (new, linears) = (gradients(model, order[:60]) for model in (before, net))
    found = i.run(t, data).measured
    assert found["outputs"] == pytest.approx(float(torch.dist(new, old) / old.norm()), rel=1e-6)
    for change, one, other in zip(found["gradients"], ones, linears, strict=True):
        g, scaled = one.weight.grad, 3 * other.weight.grad
        assert change == pytest.approx(float(torch.dist(scaled, g) / g.norm()), rel=1e-5)
    assert found["gradient_norm"] == pytest.approx(
        float(torch.cat([other.weight.grad.flatten() for other in linears]).norm()), rel=1e-6
    )

    losses, growth, walked = [], [], []
    hidden = [one.weight for one in linears]

    def squares():
        return sum(float((weight.detach() ** 2).sum()) for weight in hidden)

    start, total = squares(), 0.0
    for step in range(6):
        rows = order[60 * step :][:60]
        losses.append(nn.CrossEntropyLoss()(net(x[rows]), y[rows]).item())
        gradients(net, rows)
        total += sum(float(((0.9 * one.weight.grad) ** 2).sum()) for one in linears)
        with torch.no_grad():
            for p in net.parameters():
                p.sub_((0.9 if any(p is weight for weight in hidden) else 0.1) * p.grad)
        growth.append((squares() - start) / start)
        walked.append(total / start)
    assert found["losses"] == pytest.approx(losses, rel=1e-6)
    assert found["growth"] == pytest.approx(growth, rel=1e-5)
    assert found["squared_steps"] == pytest.approx(walked, rel=1e-5)


def test_what_remains_is_epsilons_doing():
    """Between a network and a much scaled one lies ε / (2σ²) a layer: ten times the ε, the same."""
    data = load("digits")
    small, large = (
        i.run(trial(i.NORMALIZED, 1000.0, steps=0, eps=eps), data).measured["outputs"]
        for eps in (1e-6, 1e-5)
    )
    assert large / small == pytest.approx(10, rel=1e-3)


def test_plan_has_what_is_compared_for_every_seed():
    plan = i.plan(i.PROFILES["quick"], [])
    assert len(plan) == 8 * (6 * 2 + 4)
    scaled = [t for t in plan if t.stage == i.SCALED]
    assert {t.steps for t in scaled} == {0}
    assert {t.eps for t in scaled} == {1e-5}
    trained = [t for t in plan if t.stage == i.TRAINED and t.seed == 0]
    assert [(t.arm, t.factor, t.boost) for t in trained] == [
        (i.PLAIN, 1.0, 1.0),
        (i.NORMALIZED, 1.0, 1.0),
        (i.NORMALIZED, 10.0, 1.0),
        (i.NORMALIZED, 10.0, 100.0),
    ]
    assert {t.steps for t in trained} == {200}


SETTINGS = dataclasses.replace(TINY, seeds=8, steps=2)


def made_up(outputs=1e-5, gradients=2e-5, drift=1e-9, ratio=1.0):
    runs = []
    for t in i.plan(SETTINGS, []):
        factor = 1 + 1e-4 * t.seed
        known = t.arm == i.NORMALIZED
        # Below 1, where the invariance ends, and the first layer are not what counts.
        measured = {
            "outputs": (outputs * factor if t.factor == 100 else 1e-7) if known else 900.0,
            "gradients": [0.0, gradients * factor if t.factor == 10 else 1e-7],
            "gradient_norm": 2 / t.factor,
        }
        if t.factor == 0.01 and known:
            measured |= {"outputs": 0.25, "gradients": [0.5, 0.5]}
        if t.steps:
            step = 0.6 if t.boost == 1 and t.factor == 10 else drift * factor * (t.factor == 10)
            measured["losses"] = [2.0, 1.0 + 2 * step]
            measured["squared_steps"] = [0.1, 0.2]
            measured["growth"] = [9.0, 0.2 * ratio * factor if ratio != 1 else 0.2]
        runs.append(Run(t, measured, {}))
    return runs


def outcomes(**fields):
    found = i.analyse(SETTINGS, made_up(**fields))
    return [found.verdict.outcome, *(other.verdict.outcome for other in found.also)]


def test_every_claim_can_be_reproduced_contradicted_and_unresolved():
    assert outcomes() == [REPRODUCED] * 4
    assert outcomes(outputs=0.01, gradients=0.01, drift=0.01, ratio=1.01) == [CONTRADICTED] * 4
    assert outcomes(ratio=-1.0)[3] == CONTRADICTED
    edge = 1e-3 * (1 - 3.5e-4)  # half of the seeds on either side of the tolerance
    assert outcomes(outputs=edge, gradients=edge, drift=edge)[:3] == [UNRESOLVED] * 3


def test_analysis_speaks_in_the_runs_own_numbers():
    found = i.analyse(SETTINGS, made_up(outputs=3e-5, gradients=4e-5, drift=5e-6))
    assert "weights up to 100 times as large" in found.summary
    assert "BatchNorm changed by 3e-05 of themselves at most" in found.summary
    assert "the plain one by 9e+02 at least" in found.summary
    assert "gradient changed by 4e-05 at most" in found.summary
    assert "with 100 times the learning rate, weights 10 times as large" in found.summary
    assert "in 2 steps, to 5e-06 of the first one" in found.summary
    assert "they came to be 60% of it apart" in found.summary
    assert "× 0.01 the outputs changed by up to 25%" in found.caveats[0]
    assert "‖W‖² grew by 20.00%" in found.not_shown[0]
    assert found.table.rows[1] == ("× 10", "9.0e+02", "1.0e-07", "0.2", "2")
