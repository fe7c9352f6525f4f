import dataclasses

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import convergence as c
from batchnorm.lab.training import batches
from batchnorm.lab.tuning import EVALUATION, FIRST_TUNING_SEED, SWEEP
from lab_tiny import SETTINGS


def trial(arm, **fields):
    given = {"stage": EVALUATION, "seed": 3, "init": c.XAVIER, "rate": 1.0, "steps": 23, "every": 5}
    return c.ConvergenceTrial(arm=arm, batch=60, depth=3, width=100, **(given | fields))


@pytest.mark.parametrize("init", [c.XAVIER, "0.01"])
def test_both_arms_start_from_the_same_scaled_draws(init):
    plain, normalized = (c.build(trial(arm, init=init), 64, 10) for arm in c.ARMS)
    kinds = [type(layer) for layer in normalized]
    assert kinds == [nn.Linear, BatchNorm, nn.Sigmoid] * 3 + [nn.Linear]
    assert [type(layer) for layer in plain] == [nn.Linear, nn.Sigmoid] * 3 + [nn.Linear]
    draws = torch.Generator().manual_seed(3)
    linears = [
        [layer for layer in net if isinstance(layer, nn.Linear)] for net in (plain, normalized)
    ]
    for index, (a, b) in enumerate(zip(*linears, strict=True)):
        std = (2 / sum(a.weight.shape)) ** 0.5 if init == c.XAVIER else 0.01
        expected = torch.empty_like(a.weight).normal_(generator=draws) * std
        torch.testing.assert_close(a.weight, expected)
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.bias, torch.zeros_like(a.bias))
        assert (b.bias is None) == (index < 3)


@pytest.mark.parametrize("arm", c.ARMS)
def test_run_equals_the_same_training_written_with_torchs_own_parts(arm):
    """Every curve, against nn.BatchNorm1d, optim.SGD, backward() and a hook on the last sigmoid."""
    data, t = load("digits"), trial(arm)
    found = c.run(t, data).measured

    net = c.build(t, 64, 10)
    for index, layer in enumerate(net):
        if isinstance(layer, BatchNorm):
            net[index] = nn.BatchNorm1d(100)
    seen = {}
    last = [layer for layer in net if isinstance(layer, nn.Sigmoid)][-1]
    last.register_forward_hook(lambda _, inputs, __: seen.update(z=inputs[0].detach()))
    optimizer = torch.optim.SGD(net.parameters(), lr=t.rate)
    x, y = torch.from_numpy(data.x_train).flatten(1), torch.from_numpy(data.y_train)
    x_test, y_test = torch.from_numpy(data.x_test).flatten(1), torch.from_numpy(data.y_test)
    shares = torch.tensor([0.15, 0.5, 0.85])
    expected: dict[str, list] = {key: [] for key in found}
    for step, rows in zip(range(1, 24), batches(len(x), 60, t.seed), strict=False):
        net.train()
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(net(x[rows]), y[rows]).backward()
        optimizer.step()
        if step != 1 and step % 5:
            continue
        net.eval()
        with torch.no_grad():
            accuracy = (net(x_test).argmax(1) == y_test).double().mean().item()
        expected["step"].append(step)
        expected["accuracy"].append(accuracy)
        expected["all_units"].append(seen["z"].flatten().quantile(shares).tolist())
        expected["unit_0"].append(seen["z"][:, 0].quantile(shares).tolist())
        linears = [layer for layer in net if isinstance(layer, nn.Linear)]
        expected["gradient_norm"].append([layer.weight.grad.norm().item() for layer in linears])

    assert found["step"] == expected["step"] == [1, 5, 10, 15, 20]
    # float32 rounding, grown over 20 steps; one test image is 0.002.
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=0.0041)
    for name in ("all_units", "unit_0", "gradient_norm"):
        for row, wanted in zip(found[name], expected[name], strict=True):
            assert row == pytest.approx(wanted, rel=1e-3, abs=1e-4), name


def test_sweep_runs_are_not_probed_and_global_randomness_is_left_alone():
    before = torch.get_rng_state()
    found = c.run(trial(c.PLAIN, stage=SWEEP, steps=5), load("digits"))
    assert set(found.measured) == {"step", "accuracy"}
    assert torch.equal(torch.get_rng_state(), before)
    assert found.timing["step_ms"] > 0


def done(arm, rate, reaches, *, stage=EVALUATION, seed=0, init=c.XAVIER, final=0.95):
    """Return a made-up run that gets to 0.9 at step `reaches` of 10, 20, 30; never for None."""
    steps = [10, 20, 30]
    accuracy = [0.9 if reaches and step >= reaches else 0.89 for step in steps[:-1]]
    accuracy.append(final if reaches else min(final, 0.899))
    t = trial(arm, stage=stage, seed=seed, rate=rate, init=init, steps=30, every=10)
    return Run(t, {"step": steps, "accuracy": accuracy}, {"step_ms": 1.0})


@pytest.mark.parametrize("reaches", [10, 20, 30, None])
def test_steps_to_the_threshold_counts_the_first_arrival(reaches):
    run = done(c.PLAIN, 1.0, reaches, final=0.95 if reaches else 0.5)
    assert c.steps_to(0.9, run) == reaches


MADE_UP = dataclasses.replace(SETTINGS, rates=(0.1, 1.0, 10.0), steps=30, every=10, tuning_seeds=2)


def swept(table):
    """Finish the sweep with `table[arm][rate] = (steps of seed 0, steps of seed 1)`."""
    plan = c.plan(MADE_UP, [])
    return [
        done(
            t.arm,
            t.rate,
            table[t.arm][t.rate][t.seed - FIRST_TUNING_SEED],
            stage=SWEEP,
            seed=t.seed,
            final=0.99 if t.rate == 10 else 0.95,
        )
        for t in plan
    ]


def test_plan_tunes_each_arm_then_evaluates_it_on_other_seeds():
    table = {
        # Mean 20 at rate 1; at 0.1 a censored run counts as 30, and 10 with it makes 20 as well,
        # but rate 10 has the better final accuracy of those that tie.
        c.PLAIN: {0.1: (10, None), 1.0: (20, 20), 10.0: (10, 30)},
        c.NORMALIZED: {0.1: (30, 30), 1.0: (10, 10), 10.0: (10, 20)},
    }
    sweep = c.plan(MADE_UP, [])
    assert len(sweep) == 2 * 3 * 2
    assert {t.stage for t in sweep} == {SWEEP}
    assert c.plan(MADE_UP, swept(table)[:-1]) == sweep
    full = c.plan(MADE_UP, swept(table))
    assert full[: len(sweep)] == sweep
    evaluation = [(t.arm, t.rate, t.seed) for t in full[len(sweep) :]]
    assert sorted(evaluation) == [
        (c.NORMALIZED, 1.0, 0),
        (c.NORMALIZED, 1.0, 1),
        (c.PLAIN, 10.0, 0),
        (c.PLAIN, 10.0, 1),
    ]
    assert not {t.seed for t in sweep} & {t.seed for t in full[len(sweep) :]}


def test_analysis_speaks_in_the_runs_own_numbers():
    runs = [
        *(done(c.PLAIN, 10.0, reaches, seed=s) for s, reaches in enumerate([30, None])),
        *(done(c.NORMALIZED, 1.0, reaches, seed=s) for s, reaches in enumerate([10, 20])),
    ]
    found = c.analyse(MADE_UP, runs)
    assert found.verdict.differences == (20, 10)
    assert found.verdict.outcome == "reproduced"
    assert found.table.rows[0] == (
        "plain", "10", ">30 (30–>30)", "1 of 2", "92.5%", "1.00", ">0.030"
    )  # fmt: skip
    assert found.table.rows[1][2:4] == ("15 (10–20)", "2 of 2")
    assert found.table.rows[1][-1] == "0.015"
    assert "plain network took more than 30 steps, the one with BatchNorm 15 steps" in found.summary
    edge, censored, few = found.caveats
    assert "plain network, 10, is on the edge" in edge
    assert "1 of 2 runs of the plain network never got to 90%; counted as 30 steps" in censored
    assert few.startswith("2 seeds are few")
    assert "between equals the better mean final accuracy" in found.recipe[2]


def test_a_plain_network_that_is_faster_contradicts_the_claim():
    runs = [
        *(done(c.PLAIN, 1.0, 10, seed=s) for s in range(2)),
        *(done(c.NORMALIZED, 1.0, None, seed=s, final=0.5) for s in range(2)),
    ]
    found = c.analyse(MADE_UP, runs)
    assert found.verdict.outcome == "contradicted"
    assert "BatchNorm more than 30 steps" in found.summary
    assert found.table.rows[1][2] == ">30 (all)"
    assert found.table.rows[1][-1] == ">0.030"
    assert "None of the BatchNorm runs got there within 30 steps" in found.verdict.sentence
    assert [line for line in found.caveats if "edge" in line] == []


def test_one_seed_is_spoken_of_in_the_singular():
    settings = dataclasses.replace(MADE_UP, seeds=1, tuning_seeds=1)
    runs = [done(c.PLAIN, 1.0, None, final=0.5), done(c.NORMALIZED, 1.0, 10)]
    found = c.analyse(settings, runs)
    assert [row[2:4] for row in found.table.rows] == [(">30", "0 of 1"), ("10", "1 of 1")]
    words = " ".join([found.summary, *found.recipe, *found.caveats, found.verdict.sentence])
    for saying in ("10 steps: 1 seed, each", "1 seed for each;", "1 other seed.", "0 of 1"):
        assert saying in words.replace("1 of 1 run ", "0 of 1 ")
    assert "1 seeds" not in words
    assert found.verdict.would_change() == ("At least 2 seeds are needed for any verdict.",)


def test_a_column_for_the_init_where_several_were_tried():
    runs = [done(arm, 1.0, 10) for arm in c.ARMS]
    settings = dataclasses.replace(MADE_UP, seeds=1, inits=("0.01", c.XAVIER))
    table = c.analyse(settings, runs).table
    assert table.columns[:3] == ("network", "rate", "init")
    assert table.rows[0][:3] == ("plain", "1", "Xavier")


def test_seconds_are_steps_times_the_runs_own_time_per_step():
    run = dataclasses.replace(done(c.PLAIN, 1.0, 20), timing={"step_ms": 4.0})
    assert c.seconds_to(0.9, run) == pytest.approx(0.08)
    never = dataclasses.replace(done(c.PLAIN, 1.0, None), timing={"step_ms": 4.0})
    assert c.seconds_to(0.9, never) == pytest.approx(0.12)


def drawn(picture):
    """The figures' lines by label, as lists."""
    return {
        line.get_label(): list(line.get_ydata())
        for axes in picture.figure.axes
        for line in axes.get_lines()
    }


def test_figures_and_their_sentences_show_the_runs_own_numbers():
    reaches = {c.PLAIN: (20, 30, 30), c.NORMALIZED: (10, 10, 20)}
    speed = {c.PLAIN: (1.0, 2.0, 9.0), c.NORMALIZED: (3.0, 6.0, 30.0)}
    last = {c.PLAIN: (8.0, 10.0, 12.0), c.NORMALIZED: (1.0, 0.5, 0.25)}
    settings = dataclasses.replace(MADE_UP, seeds=3)
    evaluation = []
    for arm in c.ARMS:
        for seed in range(3):
            made = done(arm, 1.0, reaches[arm][seed], seed=seed)
            looks = len(made.measured["step"])
            made.measured["all_units"] = [[-1.0 - seed, 0.0, 1.0 + seed]] * looks
            made.measured["unit_0"] = [[-5.0 - seed, seed, 5.0 + seed]] * looks
            made.measured["gradient_norm"] = [[1.0, 2.0, last[arm][seed]], *[[1.0] * 3] * 2]
            made.timing["step_ms"] = speed[arm][seed]
            evaluation.append(made)
    table = {
        c.PLAIN: {0.1: (None, None), 1.0: (30, None), 10.0: (20, 20)},
        c.NORMALIZED: {0.1: (30, 30), 1.0: (10, 10), 10.0: (20, None)},
    }
    pictures = {p.name: p for p in c.figures(settings, [*swept(table), *evaluation])}

    accuracy = drawn(pictures["accuracy"])
    assert accuracy[c.PLAIN] == [0.89, 0.89, 0.95]
    assert accuracy[c.NORMALIZED] == [0.9, 0.9, 0.95]
    assert "median of 3 seeds" in pictures["accuracy"].see

    sees = pictures["sweep"].see
    assert "1 of 3 points" in sees
    assert "at 2 with it" in sees

    # Medians over the seeds of last over first at the *first* look: 10 and 1/2.
    assert "10 times larger in the plain network" in pictures["gradients"].see
    assert "2.0 times smaller with BatchNorm" in pictures["gradients"].see
    assert [1.0, 2.0, 10.0] in drawn(pictures["gradients"]).values()

    assert "3.0 times as long" in pictures["time"].see  # medians 6 and 2, not maxima or means
    values = [line for axes in pictures["one-input"].figure.axes for line in axes.get_lines()]
    levels = {tuple(line.get_ydata()) for line in values}
    assert {(-5.0,) * 3, (0.0,) * 3, (5.0,) * 3} <= levels  # the first seed's, no other's
    assert not {(-6.0,) * 3, (6.0,) * 3} & levels
