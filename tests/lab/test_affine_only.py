import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import BatchNorm
from batchnorm.errors import InputError
from batchnorm.lab import networks, training
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import affine_only as a
from batchnorm.lab.tuning import EVALUATION, SWEEP
from lab_rehearsal import rehearse

TINY = dataclasses.replace(a.PROFILES["quick"], seeds=2, rates=(0.3, 3.0), steps=4)


def trial(kind, **fields):
    given = {"stage": EVALUATION, "seed": 3, "rate": 1.0, "blocks": 1, "steps": 4, "batch": 64}
    given |= fields
    return a.AffineTrial(arm=a.arm(given["blocks"], kind), **given)


def test_rehearsal():
    runs, findings = rehearse(a.EXPERIMENT, TINY)
    assert len(runs) == 4 * 2 + 4 * 2
    assert findings.table.columns[1] == "parameters"


def copies(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def parts(net):
    """Names of γ and β, of the head, and of the convolutions' weights."""
    affine = {
        f"{name}.{kind}"
        for name, module in net.named_modules()
        if isinstance(module, BatchNorm)
        for kind in ("weight", "bias")
    }
    names = [name for name, _ in net.named_parameters()]
    head = set(names[-2:])
    return affine, head, set(names) - affine - head


@pytest.mark.parametrize("kind", a.KINDS)
def test_what_is_trained_and_what_keeps_its_first_value(kind):
    data = load("digits")
    x, y, _, _ = training.tensors(data, images=True)
    net, trained = a.build(trial(kind), 1, 10)
    before = copies(net)
    training.fit(net, x, y, rate=1.0, steps=6, batch=64, seed=0)
    changed = {name: before[name] != now for name, now in net.named_parameters()}
    some = {name for name, where in changed.items() if where.any()}
    affine, head, convolutions = parts(net)
    expected = {
        a.ALL: affine | head | convolutions, a.AFFINE: affine, a.HEAD: head, a.RANDOM: convolutions
    }  # fmt: skip
    assert some == expected[kind]
    count = sum(int(where.sum()) for where in changed.values())
    whole = 16 * 9 + 2 * 16 * 144 + 32 * (144 + 288 + 16) + 64 * (288 + 576 + 32) + 650 + 672
    assert trained == {a.ALL: whole, a.AFFINE: 672, a.RANDOM: 672, a.HEAD: 650}[kind]
    assert 0.95 * trained <= count <= trained  # a dead unit's have no gradient
    if kind == a.RANDOM:
        most = [changed[name].flatten(1).sum(1) for name in convolutions]
        assert torch.cat(most).max() == 2
        assert len({tuple(row.flatten().tolist()) for row in changed[max(convolutions)]}) > 30
        other, _ = a.build(trial(kind, seed=4), 1, 10)
        first = copies(other)
        training.fit(other, x, y, rate=1.0, steps=1, batch=64, seed=0)
        last = [name for name in first if name in convolutions][-1]
        assert not torch.equal(first[last] != other.state_dict()[last], changed[last])


def test_the_sweep_sees_nothing_of_the_test_rows():
    data, swept = load("digits"), trial(a.AFFINE, stage=SWEEP)
    other = dataclasses.replace(data, x_test=data.x_test * 0)
    assert a.run(swept, data).measured == a.run(swept, other).measured
    t = trial(a.AFFINE)
    assert a.run(t, data).measured != a.run(t, other).measured


def test_all_arms_of_a_seed_begin_with_the_same():
    nets = [a.build(trial(kind), 1, 10)[0] for kind in a.KINDS]
    first = nets[0].state_dict()
    for net in nets[1:]:
        assert all(torch.equal(first[name], tensor) for name, tensor in net.state_dict().items())
    gammas = torch.cat([m.weight.detach() for m in nets[0].modules() if isinstance(m, BatchNorm)])
    assert 0 <= gammas.min() < 0.02
    assert 0.98 < gammas.max() < 1
    assert gammas.mean() == pytest.approx(0.5, abs=0.05)
    assert all(not m.bias.any() for m in nets[0].modules() if isinstance(m, BatchNorm))


@pytest.mark.parametrize("kind", [a.AFFINE, a.RANDOM])
def test_run_equals_the_same_training_written_with_torchs_own_parts(kind):
    """nn.BatchNorm2d, plain tensors for momentum, and weights put back instead of masked."""
    data, t = load("digits"), trial(kind, rate=0.5)
    found = a.run(t, data).measured
    ours, _ = a.build(t, 1, 10)
    net = networks.resnet(1, 10, nn.BatchNorm2d, torch.Generator().manual_seed(0))
    net.load_state_dict(ours.state_dict())
    affine, _, convolutions = parts(ours)
    before = copies(net)
    x, y = torch.tensor(data.x_train)[:, None], torch.tensor(data.y_train)
    masks = {name: torch.ones_like(before[name]) for name in affine}
    if kind == a.RANDOM:
        training.fit(ours, x, y, rate=1.0, steps=1, batch=64, seed=0)
        after = ours.state_dict()
        masks = {name: (before[name] != after[name]).float() for name in convolutions}
    moving = {name: torch.zeros_like(before[name]) for name in masks}
    for step, rows in zip(range(t.steps), training.batches(len(x), 64, t.seed), strict=False):
        net.zero_grad()
        nn.CrossEntropyLoss()(net(x[rows]), y[rows]).backward()
        rate = 0.5 * (1 + math.cos(math.pi * step / t.steps)) / 2
        for name, parameter in net.named_parameters():
            if name in masks:
                moving[name] = 0.9 * moving[name] + parameter.grad * masks[name]
                parameter.data -= rate * moving[name]
    gammas = np.concatenate(
        [m.weight.detach().numpy() for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    )
    net.eval()
    right = net(torch.tensor(data.x_test)[:, None]).argmax(1).numpy() == data.y_test
    # float32 rounding, grown over the steps: a row of 503, and one γ of 336.
    assert found["error"] == pytest.approx(1 - right.mean(), abs=0.0041)
    shares = [(abs(gammas) < threshold).mean() for threshold in a.THRESHOLDS]
    assert found["below"] == pytest.approx(shares, abs=0.0031)
    assert (found["below"] == found["below_before"]) == (kind == a.RANDOM)


def test_a_table_is_refused_with_words():
    data = load("digits")
    flat = dataclasses.replace(data, x_train=data.x_train.reshape(len(data.x_train), -1))
    with pytest.raises(InputError, match=r"expected images, .* got rows of shape \(64,\)"):
        a.run(trial(a.HEAD), flat)


MADE_UP = dataclasses.replace(TINY, seeds=8, rates=(0.1, 1.0, 10.0), blocks=(1, 3))


def made_up(errors, off, best=1.0):
    """Runs of every trial: `errors[blocks, kind]` and `off[kind]` are of each seed."""

    def measured(t):
        kind = next(k for k in a.KINDS if a.arm(t.blocks, k) == t.arm)
        error = errors[t.blocks, kind]
        below = [off[kind][t.seed % 8] if kind in off else 0.01] * len(a.THRESHOLDS)
        return {
            "error": abs(math.log10(t.rate / best)) if t.stage == SWEEP else error[t.seed],
            "trained": 1000 * t.blocks,
            "below_before": [0.02] * len(a.THRESHOLDS),
            "below": below,
        }

    runs = []
    while len(wanted := a.plan(MADE_UP, runs)) > len(runs):
        runs = [Run(t, measured(t), {}) for t in wanted]
    return runs


def levels(*shares):
    """A share for each kind, in both networks; seeds differ by a little, all kinds alike."""
    return {
        (blocks, kind): [share / blocks + 0.002 * seed for seed in range(8)]
        for kind, share in zip(a.KINDS, shares, strict=True)
        for blocks in (1, 3)
    }


def outcomes(found):
    return [found.verdict.outcome, *(other.verdict.outcome for other in found.also)]


def test_as_claimed():
    runs = made_up(levels(0.01, 0.09, 0.3, 0.18), {a.AFFINE: [0.3] * 8, a.ALL: [0.02] * 8})
    found = a.analyse(MADE_UP, runs)
    assert outcomes(found) == ["reproduced"] * 5
    assert found.verdict.mean == pytest.approx(21)
    assert found.also[0].verdict.mean == pytest.approx(9)
    assert found.also[1].verdict.mean == pytest.approx(28)
    assert found.also[2].verdict.mean == pytest.approx(7)
    assert found.also[3].verdict.mean == pytest.approx(6)
    assert "ResNet-8 got 9.7% of the test rows wrong; with 1,000 random weights" in found.summary
    assert "instead, 30.7%; with the head's 1,000 parameters, 18.7%; with every" in found.summary
    assert "Below 0.01 ended 30.0% of the |γ|" in found.summary
    assert "and 2.0% where all was; 2.0% began" in found.summary
    assert found.table.rows[5] == ("ResNet-20 (γ and β)", "3,000", "1", "3.7% (3.0%–4.4%)")
    assert found.caveats == ()


def test_the_other_way_round_and_on_the_edge_of_the_rates():
    errors = levels(0.01, 0.4, 0.3, 0.2)
    errors[3, a.AFFINE] = [0.6] * 8
    off = {a.AFFINE: [0.0] * 8, a.ALL: [0.02] * 8}
    found = a.analyse(MADE_UP, made_up(errors, off, best=10.0))
    assert outcomes(found) == ["contradicted"] * 5
    assert len(found.caveats) == 8
    assert "ResNet-20 (head) network, 10, is on the edge" in found.caveats[-1]


def test_no_difference():
    errors = {(b, k): [0.3, 0.2] * 4 for b in (1, 3) for k in a.KINDS}
    for blocks in (1, 3):
        errors[blocks, a.AFFINE] = [0.2, 0.3] * 4 if blocks == 1 else [0.3, 0.2] * 4
    errors[3, a.RANDOM] = [0.2, 0.3] * 4
    found = a.analyse(MADE_UP, made_up(errors, {a.AFFINE: [0.1, 0.2] * 4, a.ALL: [0.15] * 8}))
    assert outcomes(found) == ["unresolved"] * 5


def test_figures_show_the_runs_own_numbers():
    runs = made_up(levels(0.01, 0.09, 0.3, 0.18), {a.AFFINE: [0.3] * 8, a.ALL: [0.02] * 8})
    error, rates, gammas = a.figures(MADE_UP, runs)
    marks = [list(line.get_xdata()) for line in error.figure.axes[0].lines]
    assert marks[1] == pytest.approx([9 + 0.2 * seed for seed in range(8)])
    assert len(marks) == 8

    def lines(picture):
        return {line.get_label(): list(line.get_ydata()) for line in picture.figure.axes[0].lines}

    assert lines(rates)[a.HEAD] == [1.0, 0.0, 1.0]
    assert lines(gammas)["γ and β trained"][1] == 0.3
    assert lines(gammas)["at the start"][1] == 0.02
