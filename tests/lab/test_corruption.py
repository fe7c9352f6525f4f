import copy
import dataclasses
import statistics

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from batchnorm import ArgumentError, BatchNorm, InputError
from batchnorm.lab import networks, training
from batchnorm.lab.corruptions import STRENGTHS, corrupt
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import corruption as c
from lab_rehearsal import rehearse

SETTINGS = dataclasses.replace(c.PROFILES["quick"], seeds=2, steps=60, every=4, tent_steps=2)
WHOLE = load("digits")
# 200 test rows and four that make no whole batch.
DIGITS = dataclasses.replace(WHOLE, x_test=WHOLE.x_test[:204], y_test=WHOLE.y_test[:204])
LOW, HIGH = DIGITS.x_train.min(), DIGITS.x_train.max()


def corrupted(x, kind, strength, seed=1, low=float(LOW), high=float(HIGH)):
    return corrupt(torch.tensor(x), kind, strength, low, high, training.generator(seed)).numpy()


def torchs(net, **options):
    """The same network with torch's own layers."""
    made = networks.resnet(1, 10, lambda n: nn.BatchNorm2d(n, **options), training.generator(0))
    made.load_state_dict(net.state_dict())
    return made


@pytest.fixture(scope="module")
def trained():
    """A network that a trial of SETTINGS would train, and test images; the runs and findings."""
    runs, findings = rehearse(c.EXPERIMENT, SETTINGS, DIGITS)
    x, y, x_test, y_test = training.tensors(DIGITS, images=True)
    net = networks.resnet(1, 10, BatchNorm, training.generator(0))
    training.fit(net, x, y, rate=SETTINGS.rate, steps=60, batch=32, seed=0)
    order = torch.randperm(len(x_test), generator=training.generator(c.STREAM_OFFSET))[:200]
    return net, x_test[order], y_test[order], runs, findings


def test_a_corruption_of_no_known_kind_is_told():
    with pytest.raises(
        ArgumentError, match="one of noise, contrast, brightness, blur; got 'blurr'"
    ):
        corrupted(DIGITS.x_test[:2][:, None], "blurr", 0.4)


def test_corruptions_are_those_written_down():
    x = DIGITS.x_test[:20][:, None]
    reach = HIGH - LOW
    noise = torch.randn(x.shape, generator=training.generator(1)).numpy()
    mean = x.mean((2, 3), keepdims=True)
    wanted = {
        "noise": lambda s: x + s * reach * noise,
        "contrast": lambda s: mean + s * (x - mean),
        "brightness": lambda s: x + s * reach,
        "blur": lambda s: gaussian_filter(x, (0, 0, s, s), mode="nearest", radius=(0, 0, 2, 2)),
    }
    assert set(wanted) == set(STRENGTHS)
    for kind, strengths in STRENGTHS.items():
        for strength in strengths:
            expected = np.clip(wanted[kind](strength), LOW, HIGH)
            np.testing.assert_allclose(corrupted(x, kind, strength), expected, atol=2e-6)
    assert corrupted(x, "noise", 0.38).max() == HIGH


def test_channels_are_blurred_apart_and_contrast_is_each_channels_own():
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 5)).astype(np.float32)
    for kind in ("blur", "contrast"):
        whole = corrupted(x, kind, 0.5, low=-9.0, high=9.0)
        for channel in range(3):
            alone = corrupted(x[:, channel : channel + 1], kind, 0.5, low=-9.0, high=9.0)
            np.testing.assert_allclose(whole[:, channel : channel + 1], alone, atol=1e-6)


@pytest.mark.parametrize("size", [100, 20, 3])
def test_each_batch_is_normalized_by_itself_as_by_torchs_layers(trained, size):
    net, x, y, _, _ = trained
    before = copy.deepcopy(net.state_dict())
    other = torchs(net).train()
    with torch.no_grad():
        right = [
            int((other(part).argmax(1) == labels).sum())
            for part, labels in zip(x.split(size), y.split(size), strict=True)
        ]
    assert c.by_batch(net, x, y, size) == pytest.approx(sum(right) / 200, abs=0.0051)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


def test_run_measures_the_trained_network_in_each_way(trained):
    """Against torch's layers: running statistics, a stream in random order and sorted, the lot."""
    net, x, y, runs, _ = trained
    found = runs[0].measured["accuracy"]

    def classify(model, images, labels, size):
        with torch.no_grad():
            parts = [model(part).argmax(1) for part in images.split(size)]
        return float((torch.cat(parts) == labels).double().mean())

    order = y.argsort(stable=True)
    for kind, images in (
        ("clean", x),
        ("contrast", torch.tensor(corrupted(x.numpy(), "contrast", 0.05))),
    ):
        precise = torchs(net, momentum=None)
        for layer in precise.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()
        precise.train()(images)
        expected = {
            c.TRAINED: classify(torchs(net).eval(), images, y, 200),
            "batches of 100": classify(torchs(net).train(), images, y, 100),
            "batches of 4": classify(torchs(net).train(), images, y, 4),
            "batches of 20, sorted": classify(torchs(net).train(), images[order], y[order], 20),
            c.RECALIBRATED: classify(precise.eval(), images, y, 200),
        }
        for arm, value in expected.items():
            # Rounding may turn an image of the 200.
            assert found[arm][kind][-1] == pytest.approx(value, abs=0.0051), (arm, kind)
    assert {len(values) for values in found[c.TRAINED].values()} == {1, 2}
    for size in (100, 20, 4):
        held = [len(set(part.tolist())) for part in y[order].split(size)]
        assert runs[0].measured["classes"][str(size)] == statistics.fmean(held)
    assert runs[0].measured["classes"]["4"] < 2 < runs[0].measured["classes"]["100"]
    assert all(len(found[c.TENT][kind]) == 1 for kind in STRENGTHS)


def test_tent_lessens_the_entropy_by_gamma_and_beta_alone(trained):
    net, x, _, runs, _ = trained
    before = copy.deepcopy(net.state_dict())
    learnt = c.tent(net, x[:150], steps=3, rate=0.01, size=100)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())

    other = torchs(net).train()
    ours = [p for m in other.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    optimizer = torch.optim.Adam(ours, 0.01)
    for rows in (slice(0, 100), slice(100, 150), slice(0, 100)):
        optimizer.zero_grad()
        torch.distributions.Categorical(logits=other(x[rows])).entropy().mean().backward()
        optimizer.step()
    for (name, a), b in zip(learnt.named_parameters(), other.parameters(), strict=True):
        # Adam divides by the gradient's size, so rounding grows where that is small.
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0, msg=name)
        moved = not torch.equal(a, before[name])
        assert moved == any(b is p for p in ours), name
    for name, buffer in learnt.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_rows_of_numbers_are_no_images():
    rows = dataclasses.replace(DIGITS, x_train=DIGITS.x_train.reshape(len(DIGITS.x_train), -1))
    with pytest.raises(InputError, match=r"expected images, .*; got rows of shape \(64,\)"):
        c.run(c.plan(SETTINGS, [])[0], rows)


def test_plan_asks_for_one_network_a_seed():
    trials = c.plan(dataclasses.replace(SETTINGS, seeds=5), [])
    assert [t.seed for t in trials] == [0, 1, 2, 3, 4]
    assert {(t.steps, t.every, t.tent_steps) for t in trials} == {(60, 4, 2)}


def made_up(values, seeds=8):
    """Runs with `values[arm]`: accuracy when clean, corrupted, and at the strongest."""
    runs = []
    for trial in c.plan(dataclasses.replace(SETTINGS, seeds=seeds), []):
        accuracy = {}
        for arm, (clean, mean, last) in values.items():
            # Seeds differ a little, all arms of a seed alike.
            shift = 0.002 * trial.seed
            row = [2 * mean - last + shift, last + shift]
            accuracy[arm] = dict.fromkeys(STRENGTHS, row) | {c.CLEAN: [clean + shift]}
        classes = {"100": 2 + trial.seed, "20": 1.5, "4": 1}
        runs.append(Run(trial, {"accuracy": accuracy, "classes": classes}, {}))
    return runs


def values(**changes):
    """As the claims have it."""
    arms = {
        c.TRAINED: (0.98, 0.6, 0.4),
        c.RECALIBRATED: (0.98, 0.9, 0.8),
        c.TENT: (0.5, 0.88, 0.88),
        **{c.batches_of(size): (0.978, 0.9, 0.8) for size in c.SIZES},
        **{c.in_order(size): (0.7, 0.5, 0.4) for size in c.SIZES},
    }
    return arms | changes


def outcomes(runs):
    found = c.analyse(dataclasses.replace(SETTINGS, seeds=len(runs)), runs)
    return [found.verdict.outcome, *(other.verdict.outcome for other in found.also)]


def test_each_claim_can_come_out_each_way():
    yes, no, open_ = "reproduced", "contradicted", "unresolved"
    assert outcomes(made_up(values())) == [yes] * 6
    against = values(
        **{
            "batches of 100": (0.9, 0.4, 0.3),
            "batches of 4": (0.98, 0.5, 0.3),
            "batches of 100, sorted": (0.98, 0.7, 0.6),
            "TENT": (0.0, 0.2, 0.2),
        }
    )
    assert outcomes(made_up(against)) == [no] * 6
    equal = dict.fromkeys(values(), (0.98, 0.7, 0.7))
    # Nothing lost is what the claim on clean images says.
    assert outcomes(made_up(equal)) == [open_, open_, yes, open_, open_, open_]
    at_the_bound = values(**{"batches of 100": (0.97, 0.9, 0.8)})
    jitter = made_up(at_the_bound)
    for index, run in enumerate(jitter):
        run.measured["accuracy"]["batches of 100"][c.CLEAN][0] += (-1) ** index * 0.002
    assert outcomes(jitter)[2] == open_


@pytest.mark.parametrize("kind", STRENGTHS)
def test_a_kind_that_goes_the_other_way_does_not_hide_in_the_mean(kind):
    """Against `kind` alone, batches of 4 do worse and sorted ones better; other kinds outweigh."""
    runs = made_up(values())
    for run in runs:
        accuracy = run.measured["accuracy"]
        accuracy["batches of 4"][kind] = [v - 0.05 for v in accuracy[c.TRAINED][kind]]
        accuracy["batches of 100, sorted"][kind] = [v + 0.05 for v in accuracy[c.TRAINED][kind]]
    found = c.analyse(dataclasses.replace(SETTINGS, seeds=8), runs)
    enough, _, order, hard, _ = [judged.verdict for judged in found.also]
    assert enough.outcome == "contradicted"
    assert enough.differences == pytest.approx([-5] * 8)
    assert order.outcome == "reproduced"
    assert order.differences == pytest.approx([(3 * 40 + 25) / 4] * 8)
    counts = kind in ("noise", "blur")
    assert hard.outcome == ("contradicted" if counts else "reproduced")
    assert hard.differences == pytest.approx([-5 if counts else 10] * 8)


def test_only_what_the_sources_claim_counts_as_theirs():
    found = c.analyse(dataclasses.replace(SETTINGS, seeds=8), made_up(values()))
    theirs = [judged.claim for judged in found.also if not judged.ours]
    assert len(theirs) == 2
    assert "worse than in random order" in theirs[0]
    assert "TENT" in theirs[1]


def test_analysis_speaks_in_the_runs_own_numbers(trained):
    runs = made_up(values(), seeds=2)
    for run in runs:
        run.measured["accuracy"]["batches of 100"]["blur"] = [0.61, 0.61]
    settings = dataclasses.replace(SETTINGS, seeds=2)
    found = c.analyse(settings, runs)
    # Seeds differ by 0.002; of 4 corruptions one has 0.61 in the place of 0.9.
    text = found.summary
    assert "networks got 60.1% right with the statistics of training and 82.8% with" in text
    assert "points was: noise +30.0, contrast +30.0, brightness +30.0, blur +0.9." in text
    assert "batches of 4 it was: noise +30.0, contrast +30.0, brightness +30.0, blur +30.0." in text
    assert "class: noise -10.0, contrast -10.0, brightness -10.0, blur -10.0." in text
    assert "training gave 98.1%, batches of 100 97.9%, sorted 70.1%." in text
    assert "TENT had 88.1%, the same batches without it 75.3%" in text
    assert "hold 2.5, 1.5, 1.0 classes on average" in found.recipe[2]
    rows = {row[0]: row[1:] for row in found.table.rows}
    assert rows["as trained"] == ("98.1±0.1", *["60.1±0.1"] * 4)
    assert rows["batches of 100"] == ("97.9±0.1", *["90.1±0.1"] * 3, "61.0±0.0")
    assert found.table.columns[1:] == ("clean", "noise", "contrast", "brightness", "blur")
    one = c.analyse(dataclasses.replace(SETTINGS, seeds=1), made_up(values(), seeds=1))
    assert one.table.rows[0][1] == "98.0"
    assert set(rows) == set(values()) - {c.TENT}
    assert found.caveats[0].startswith("2 seeds are few")
    assert c.analyse(SETTINGS, made_up(values())).caveats == ()
    assert "0.08, 0.38" in found.recipe[1]  # every fourth strength

    _, _, _, real, findings = trained
    mean = statistics.fmean(
        v for r in real for kind in STRENGTHS for v in r.measured["accuracy"][c.TRAINED][kind]
    )
    assert f"networks got {mean:.1%} right" in findings.summary


def test_figures_show_the_runs_own_numbers():
    settings = dataclasses.replace(SETTINGS, seeds=3)
    runs = made_up(values(), seeds=3)
    for run in runs:
        run.measured["accuracy"]["batches of 4"]["blur"] = [0.202, 0.202]
    pictures = {p.name: p for p in c.figures(settings, runs)}
    panels = pictures["strength"].figure.axes
    assert [axes.get_title() for axes in panels] == list(STRENGTHS)
    for axes in panels:
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert list(lines["as trained"].get_xdata()) == [0, 1, 5]
        assert list(lines["as trained"].get_ydata()) == pytest.approx([0.982, 0.802, 0.402])
        assert list(lines["batches of 100, sorted"].get_ydata()) == pytest.approx(
            [0.702, 0.602, 0.402]
        )
    panels = pictures["batches"].figure.axes
    assert [axes.get_title() for axes in panels] == list(STRENGTHS)
    for axes, kind in zip(panels, STRENGTHS, strict=True):
        lines = {line.get_label(): line for line in axes.get_lines()}
        small = 0.202 if kind == "blur" else 0.902
        assert list(lines["random order"].get_xdata()) == [4, 20, 100]
        assert list(lines["random order"].get_ydata()) == pytest.approx([small, 0.902, 0.902])
        assert list(lines["sorted by class"].get_ydata()) == pytest.approx([0.502] * 3)
        assert list(lines["as trained"].get_ydata()) == pytest.approx([0.602] * 3)
    assert "median of 3 seeds" in pictures["batches"].see
