"""What `plan` asks for, and when, test_convergence.py tests through an experiment."""

import dataclasses

import numpy as np
import pytest

from batchnorm.lab import tuning
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.tuning import EVALUATION, FIRST_TUNING_SEED, SWEEP, ArmTrial

RATES = (0.1, 1.0, 10.0)
TEMPLATE = ArmTrial(stage="", seed=0, arm="", rate=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthTrial(ArmTrial):
    depth: int = 1


def plan(runs=(), *, template=TEMPLATE, corners=None, arms=("a", "b"), tuning_seeds=2, seeds=3):
    return tuning.plan(
        template,
        runs,
        arms=arms,
        corners=corners or [{"rate": rate} for rate in RATES],
        tuning_seeds=tuning_seeds,
        seeds=seeds,
        score=lambda swept: sum(r.measured["loss"] for r in swept),
    )


def swept(losses, **fields):
    """Finish the sweep; `losses[arm]` has a loss a corner, in their order."""
    wanted = plan(**fields)
    rates = list(dict.fromkeys(t.rate for t in wanted))
    return [Run(t, {"loss": losses[t.arm][rates.index(t.rate)]}, {}) for t in wanted]


def chosen(losses):
    return {t.arm: t.rate for t in plan(swept(losses)) if t.stage == EVALUATION}


def test_each_arm_gets_its_best_corner_and_of_equals_the_earlier():
    assert chosen({"a": [3, 1, 2], "b": [3, 2, 1]}) == {"a": 1.0, "b": 10.0}
    assert chosen({"a": [2, 1, 1], "b": [1, 1, 1]}) == {"a": 1.0, "b": 0.1}


def test_arms_take_turns_and_share_their_seeds():
    wanted = plan(swept({"a": [1, 2, 3], "b": [1, 2, 3]}))
    sweep = [(t.arm, t.rate, t.seed - FIRST_TUNING_SEED) for t in wanted if t.stage == SWEEP]
    assert sweep == [(a, r, s) for r in RATES for a in ("a", "b") for s in (0, 1)]
    evaluation = [(t.seed, t.arm) for t in wanted if t.stage == EVALUATION]
    assert evaluation == [(s, a) for s in range(3) for a in ("a", "b")]
    assert wanted[: len(sweep)] == plan()


def test_corners_may_have_other_fields_and_the_template_keeps_the_rest():
    corners = [{"rate": 1.0, "depth": depth} for depth in (2, 3)]
    fields = {"template": DepthTrial(stage="", seed=0, arm="", rate=9.0), "corners": corners}
    wanted = plan(**fields)
    runs = [Run(t, {"loss": -t.depth}, {}) for t in wanted]
    last = plan(runs, **fields)[-1]
    assert last == DepthTrial(stage=EVALUATION, seed=2, arm="b", rate=1.0, depth=3)


def test_runs_of_another_plan_neither_count_nor_disturb():
    other = Run(dataclasses.replace(TEMPLATE, stage=SWEEP, arm="c", seed=1), {"loss": -99}, {})
    assert plan([other]) == plan()
    runs = swept({"a": [3, 1, 2], "b": [3, 2, 1]})
    assert plan([other, *runs]) == plan(runs)


def test_no_seeds_ask_for_the_sweep_alone():
    runs = swept({"a": [1, 2, 3], "b": [1, 2, 3]})
    assert plan(runs, seeds=0) == plan()


def evaluated(rates, shares):
    return [
        Run(ArmTrial(stage=EVALUATION, seed=seed, arm=arm, rate=rates[arm]), {"error": share}, {})
        for arm, values in shares.items()
        for seed, share in enumerate(values)
    ]


SWEPT = [Run(ArmTrial(stage=SWEEP, seed=FIRST_TUNING_SEED, arm="b", rate=0.1), {"error": 9.0}, {})]
RUNS = SWEPT + evaluated({"a": 10.0, "b": 1.0}, {"a": [0.1, 0.25], "b": [0.5, 0.5]})


def test_select_and_measured_take_what_is_asked_for_in_order():
    assert [r.measured["error"] for r in tuning.select(RUNS, arm="b")] == [9.0, 0.5, 0.5]
    assert tuning.select(RUNS) == RUNS
    assert tuning.select(RUNS, arm="none") == []
    assert tuning.measured(RUNS, "error", arm="a") == [0.1, 0.25]
    assert tuning.measured(RUNS, "error") == [0.1, 0.25, 0.5, 0.5]  # the sweep's are not


@pytest.mark.parametrize(("rate", "on_edge"), [(0.1, True), (1.0, False), (10.0, True)])
def test_edge_names_the_arm_whose_rate_is_the_lowest_or_the_highest(rate, on_edge):
    found = tuning.edge(dataclasses.replace(TEMPLATE, arm="a", rate=rate), RATES)
    assert (found is not None) == on_edge
    if found:
        assert f"a network, {rate:g}, is on the edge" in found
        assert found.endswith(".")


def test_edges_say_it_once_an_arm_and_of_the_evaluation_only():
    (only,) = tuning.edges(RUNS + SWEPT, RATES)
    assert "the a network, 10," in only
    assert tuning.edges(RUNS, (0.01, 0.1, 1.0, 10.0, 100.0)) == ()


def test_table_has_mean_and_range_of_each_arm_in_the_order_of_the_runs():
    found = tuning.table(RUNS, "error", "error")
    assert found.columns == ("network", "rate", "error (range)")
    assert found.rows == (
        ("b", "1", "50.0% (50.0%–50.0%)"),
        ("a", "10", "17.5% (10.0%–25.0%)"),
    )


def test_the_sweep_sees_nothing_of_the_test_rows():
    data = load("digits")
    trial = ArmTrial(stage=EVALUATION, seed=0, arm="a", rate=1.0)
    assert tuning.data_for(trial, data) is data
    seen = tuning.data_for(dataclasses.replace(trial, stage=SWEEP), data)
    again = tuning.data_for(dataclasses.replace(trial, stage=SWEEP, seed=7), data)
    assert np.array_equal(seen.x_test, again.x_test)  # arms and seeds are judged by the same rows
    rows = len(data.x_train)
    assert len(seen.x_test) == len(seen.y_test) == round(rows / 5)
    assert len(seen.x_train) == len(seen.y_train) == rows - round(rows / 5)

    def keys(x, y):
        return sorted((row.tobytes(), int(label)) for row, label in zip(x, y, strict=True))

    both = keys(seen.x_train, seen.y_train) + keys(seen.x_test, seen.y_test)
    assert sorted(both) == keys(data.x_train, data.y_train)
