import dataclasses
import itertools
import re

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from batchnorm import BatchNorm
from batchnorm.lab import training
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import cost as c
from lab_rehearsal import rehearse

STACK, RESNET = (c.STACK, 4), (c.RESNET, 1)
SETTINGS = dataclasses.replace(
    c.PROFILES["quick"], seeds=2, networks=(STACK, RESNET), batch=16, rounds=2, depth=3
)
ALL = (c.PLAIN, c.CHECKPOINTED, c.TORCHS, c.OURS, c.FUSED, c.RECOMPUTED)


def test_rehearsal():
    runs, findings = rehearse(c.EXPERIMENT, SETTINGS)
    assert [(r.trial.network, r.trial.seed) for r in runs] == [
        (c.STACK, 0), (c.RESNET, 0), (c.STACK, 1), (c.RESNET, 1)
    ]  # fmt: skip
    for r in runs:
        trained = {*ALL} if r.trial.network == c.STACK else {c.PLAIN, c.TORCHS, c.OURS}
        assert set(r.measured["kept"]) == set(r.timing["step"]) == trained
        assert set(r.timing["inference"]) == (trained | {c.FOLDED}) - {c.RECOMPUTED, c.CHECKPOINTED}
        assert r.timing["step"][c.PLAIN] == r.timing["inference"][c.PLAIN] == 1
    assert runs[0].measured == runs[2].measured  # there is no chance in bytes
    assert findings.verdict.outcome == "reproduced"
    assert findings.verdict.standard_error == 0
    kept = runs[0].measured["kept"][c.OURS] / 2**20
    assert findings.table.rows[3][:3] == ("conv, 4", c.OURS, f"{kept:.2f}")


def test_bytes_kept_are_the_tensors_that_the_derivatives_need():
    rows, channels, width, depth, classes, pixels = 16, 1, 4, 3, 10, 64
    trial = c.plan(SETTINGS, [])[0]
    x, y = torch.randn(rows, channels, 8, 8), torch.arange(rows) % classes
    image, feature = rows * channels * pixels * 4, rows * width * pixels * 4
    # The head's input, the loss's logarithms, classes and sum of weights.
    head = rows * width * 4 + rows * classes * 4 + rows * 8 + 4
    # Convolutions need what comes in, ReLU what goes out: the next one's input.
    plain = image + depth * feature + head
    # The normalization needs what comes in, and a mean and a deviation a channel.
    torchs = plain + depth * (feature + 2 * width * 4)
    kept = {}
    for arm in ALL:
        net = c.build(trial, arm, channels, classes)
        kept[arm] = training.saved_bytes(net, lambda net=net: cross_entropy(net(x), y))
    assert kept[c.PLAIN] == plain
    # A checkpoint keeps what goes into ReLU in the place of what comes out.
    assert kept[c.CHECKPOINTED] == plain
    assert kept[c.TORCHS] == torchs
    # Ours may keep a few more numbers a channel.
    assert torchs <= kept[c.OURS] <= torchs + depth * width * 64
    # Nobody comes after the last ReLU that needs its output; the fused one knows without.
    assert kept[c.FUSED] == kept[c.OURS] - feature
    # What is between two convolutions is not there; the last normalization keeps its input.
    assert plain <= kept[c.RECOMPUTED] <= plain + depth * width * 64


def test_bytes_of_views_and_of_the_networks_own_are_counted_once_or_not():
    net = nn.Linear(8, 4)
    x = torch.randn(5, 8)
    assert training.saved_bytes(net, lambda: net(x)) == 5 * 8 * 4
    # relu keeps what it gives, which the product needs as well: one tensor, kept by two.
    assert training.saved_bytes(net, lambda: net(x).relu().square()) == 5 * 8 * 4 + 5 * 4 * 4


@pytest.mark.parametrize("network", [STACK, RESNET])
def test_all_forms_have_the_same_weights_and_the_normalized_ones_are_one_function(network):
    trial = next(t for t in c.plan(SETTINGS, []) if (t.network, t.size) == network)
    x, y = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    outputs, gradients, plain = {}, {}, (c.PLAIN, c.CHECKPOINTED)
    weights = {}
    for arm in c.arms_of(network[0]):
        net = c.build(trial, arm, 1, 10)
        layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        weights[arm] = [layer.weight for layer in layers]
        assert all((m.bias is None) == (arm not in plain) for m in layers[:-1])
        outputs[arm] = net(x)
        cross_entropy(outputs[arm], y).backward()
        gradients[arm] = [layer.weight.grad for layer in layers]
        kinds = {type(m) for m in net.modules()}
        assert (BatchNorm in kinds) == (arm not in (*plain, c.TORCHS))
        assert (nn.BatchNorm2d in kinds) == (arm == c.TORCHS)
        assert (c.Recomputed in kinds) == (arm in (c.RECOMPUTED, c.CHECKPOINTED))
    first = c.TORCHS
    assert not torch.allclose(outputs[c.PLAIN], outputs[first], atol=1e-2)
    for arm, output in outputs.items():
        assert all(map(torch.equal, weights[arm], weights[first]))
        same = c.PLAIN if arm in plain else first
        torch.testing.assert_close(output, outputs[same], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradients[arm], gradients[same], atol=1e-5, rtol=1e-3)


def test_ratios_are_medians_over_rounds_of_calls_that_take_turns(monkeypatch):
    now, log = [0.0], []
    durations = {
        # The first value of each is the round that does not count.
        "a": itertools.chain([50.0] * 2, [1.0] * 2, [2.0] * 2, [4.0] * 2),
        "b": itertools.chain([1.0] * 2, [3.0] * 2, [4.0] * 2, [400.0] * 2),
    }

    def call(name):
        log.append(name)
        now[0] += next(durations[name])

    monkeypatch.setattr(c, "CLOCK", lambda: now[0])
    calls = {name: lambda name=name: call(name) for name in "ab"}
    assert c.ratios(calls, 3, 2, seed=1) == {"a": 1.0, "b": 3.0}  # of 3, 2 and 100
    rounds = ["".join(log[i : i + 4]) for i in range(0, 16, 4)]
    assert set(rounds) == {"aabb", "bbaa"}
    again = {name: lambda: None for name in "ab"}
    monkeypatch.setattr(c, "CLOCK", itertools.count(1).__next__)
    assert c.ratios(again, 3, 2, seed=1) == {"a": 1.0, "b": 1.0}


def test_what_is_timed_is_each_form_as_it_is_named(monkeypatch):
    """How often each form's call goes through a normalization, training and in evaluation.

    And through the plain networks' ReLU, which checkpoints do as often as a normalization.
    """
    seen, relus = [], []

    def count(layer, _, __):
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            seen.append((layer.training, torch.is_grad_enabled()))
        if isinstance(layer, nn.ReLU):
            relus.append(layer)

    def counted(calls, rounds, repeats, seed):
        found = {}
        for name, call in calls.items():
            seen.clear()
            relus.clear()
            call()
            found[name] = [*seen] or len(relus)
        return found

    monkeypatch.setattr(c, "ratios", counted)
    hook = nn.modules.module.register_module_forward_hook(count)
    try:
        timing = c.run(c.plan(SETTINGS, [])[0], load("digits")).timing
    finally:
        hook.remove()
    training_, inference_ = [(True, True)] * 3, [(False, False)] * 3
    again = [(True, True)] * 5  # two of three lie between convolutions
    assert timing["step"] == dict.fromkeys(ALL, training_) | {
        c.PLAIN: 3, c.CHECKPOINTED: 5, c.RECOMPUTED: again
    }  # fmt: skip
    unfolded = dict.fromkeys((c.TORCHS, c.OURS, c.FUSED), inference_)
    assert timing["inference"] == unfolded | {c.PLAIN: 3, c.FOLDED: 3}


def made_up(kept, step, inference, seeds=8):
    """Runs in whose networks arms keep and take these multiples; seeds differ a little in time."""
    settings = dataclasses.replace(SETTINGS, seeds=seeds)
    runs = []
    for trial in c.plan(settings, []):
        shift = 1 + 0.001 * trial.seed
        arms = c.arms_of(trial.network)
        timing = {
            "step": {arm: step[arm] * shift for arm in arms},
            "inference": {
                arm: inference[arm] * shift
                for arm in (*arms, c.FOLDED)
                if arm not in (c.CHECKPOINTED, c.RECOMPUTED)
            },
        }
        for times in timing.values():
            times[c.PLAIN] = 1.0
        bytes_ = {arm: int(2**20 * kept[arm]) for arm in arms}
        runs.append(Run(trial, {"kept": bytes_}, timing))
    return settings, runs


def outcomes(settings, runs):
    found = c.analyse(settings, runs)
    return [found.verdict.outcome, *(other.verdict.outcome for other in found.also)]


def arms(plain, torchs, ours, fused, other, key, checkpointed=1.0):
    return {
        c.PLAIN: plain, c.TORCHS: torchs, c.OURS: ours, c.FUSED: fused, key: other,
        c.CHECKPOINTED: checkpointed,
    }  # fmt: skip


KEPT = arms(2.0, 4.0, 4.5, 3.0, 2.0, c.RECOMPUTED, 2.0)
STEP = arms(1.0, 1.3, 1.2, 1.1, 1.5, c.RECOMPUTED, 1.25)
INFERENCE = arms(1.0, 1.2, 1.15, 1.1, 1.0, c.FOLDED)


def test_each_claim_can_come_out_each_way():
    assert outcomes(*made_up(KEPT, STEP, INFERENCE)) == ["reproduced"] * 7
    less = arms(2.0, 1.0, 1.0, 1.0, 3.0, c.RECOMPUTED, 2.0)
    # Recomputed takes longer than fused, but no longer than the checkpoints do.
    faster = arms(1.0, 0.8, 0.8, 1.1, 1.3, c.RECOMPUTED, 1.4)
    slow = arms(1.0, 0.9, 0.9, 0.9, 1.2, c.FOLDED)
    assert outcomes(*made_up(less, faster, slow)) == ["contradicted"] * 7
    settings, runs = made_up(
        dict.fromkeys(KEPT, 2.0), dict.fromkeys(STEP, 1.0), dict.fromkeys(INFERENCE, 1.05)
    )
    for run in runs:
        wobble = 1 + 0.01 * (-1) ** run.trial.seed
        run.timing["step"] = dict.fromkeys(run.timing["step"], 1.0)
        if run.trial.network == c.STACK:
            run.timing["step"] |= {c.RECOMPUTED: 1.5, c.FUSED: 1.25, c.CHECKPOINTED: 1.25}
        run.timing["inference"] |= {c.OURS: wobble, c.FOLDED: 0.05 + wobble}
    no = "unresolved"
    assert outcomes(settings, runs) == [no, no, no, "reproduced", no, no, no]


def test_only_what_the_sources_claim_counts_as_theirs():
    found = c.analyse(*made_up(KEPT, STEP, INFERENCE))
    assert [judged.ours for judged in found.also] == [False, True, False, True, True, False]


def test_analysis_speaks_in_the_runs_own_numbers():
    settings, runs = made_up(KEPT, STEP, INFERENCE, seeds=3)
    for run in runs:
        if run.trial.network == c.RESNET:
            run.measured["kept"][c.OURS] = 2 * run.measured["kept"][c.PLAIN]
            run.timing["step"] |= {c.OURS: 1.6, c.TORCHS: 2.0}
    found = c.analyse(settings, runs)
    everywhere, stacks = found.summary.split("Over the stacks")
    # Means over the two networks: (2.25 + 2) / 2, (1.2 + 1.6) / 2, (1.3 + 2) / 2.
    numbers = [float(n) for n in re.findall(r"[0-9]+[.][0-9]+", everywhere)]
    assert numbers == [2.12, 1.4, 1.65, 1.15, 1.0]
    # What has forms in one of them only is compared within that.
    numbers = [float(n) for n in re.findall(r"[0-9]+[.][0-9]+", stacks)]
    assert numbers == [2.25, 1.5, 1.0, 1.2, 1.1, 1.5, 1.25]
    assert found.verdict.differences == pytest.approx([1.125] * 3)
    beyond = found.also[3].verdict
    assert "beyond that of the checkpoints" in found.also[3].claim
    assert beyond.differences == pytest.approx(
        [(1.5 - 1.1) * (1 + 0.001 * seed) - (1.25 * (1 + 0.001 * seed) - 1) for seed in range(3)]
    )
    assert found.table.rows[0] == ("conv, 4", "plain", "2.00", "1", "1")
    assert found.table.rows[1] == ("conv, 4", c.CHECKPOINTED, "2.00", "1.25 (1.25–1.25)", "–")
    assert found.table.rows[4] == (
        "conv, 4", "fused ReLU", "3.00", "1.10 (1.10–1.10)", "1.10 (1.10–1.10)"
    )  # fmt: skip
    assert found.table.rows[5][-1] == "–"
    assert found.table.rows[6][2:] == ("–", "–", "1.00 (1.00–1.00)")
    assert found.table.rows[8][3] == "2.00 (2.00–2.00)"
    assert [row[1] for row in found.table.rows[7:]] == [c.PLAIN, c.TORCHS, c.OURS, c.FOLDED]
    assert "no chance in it" in found.caveats[0]
    assert found.caveats[1].startswith("3 seeds are few")


def test_figures_show_each_form_of_each_network():
    settings, runs = made_up(KEPT, STEP, INFERENCE, seeds=3)
    pictures = {p.name: p.figure.axes[0] for p in c.figures(settings, runs)}
    names = [label.get_text() for label in pictures["step"].get_yticklabels()]
    assert names == [*(f"conv, 4: {arm}" for arm in ALL[1:]), "ResNet, 1: torch's",
                     "ResNet, 1: BatchNorm"]  # fmt: skip
    marks = [line for line in pictures["step"].get_lines() if line.get_linestyle() == "None"]
    assert list(marks[2].get_xdata()) == pytest.approx([1.2, 1.2012, 1.2024])
    dotted = [line for line in pictures["memory"].get_lines() if line.get_linestyle() == ":"]
    assert [list(line.get_xdata()) for line in dotted] == [[1, 1]]
    assert "conv, 4: folded" in [t.get_text() for t in pictures["inference"].get_yticklabels()]
