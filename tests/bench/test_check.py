import math

import pytest
import torch

import oracle
from batchnorm.bench import check, peers
from batchnorm.bench.cases import FUSIONS, PASSES, Case
from batchnorm.bench.check import Verdict, judge, observe
from batchnorm.bench.peers import Problem

CASES = [
    Case((6, 5)),
    Case((4, 5, 3)),
    Case((4, 20, 3, 3), channels_last=True),
    Case((2, 5, 2, 3, 2)),
    Case((4, 5, 3, 3), torch.bfloat16),
]


def truth(problem, mode, fusion):
    """What NumPy says, by the names of `observe`; with the kink where float64 has it."""
    state = problem.state
    residual = problem.residual if "add" in fusion else None
    options = {"activation": None if fusion == "bn" else "relu", "residual": residual}
    arguments = (problem.x, state["weight"], state["bias"])
    if mode == "inference":
        given = (state["running_mean"], state["running_var"])
        return {"y": oracle.forward(*arguments, given=given, **options).y}
    f = oracle.forward(*arguments, **options)
    mean, var = oracle.running(
        oracle.wide(state["running_mean"]), oracle.wide(state["running_var"]), f, 0.1
    )
    found = {"y": f.y, "running_mean": mean, "running_var": var}
    if mode == "forward+backward":
        dx, dweight, dbias, dresidual = oracle.backward(problem.dy, *arguments, **options)
        found |= {"dx": dx, "dweight": dweight, "dbias": dbias}
        found |= {"dresidual": dresidual} if residual is not None else {}
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("mode", PASSES)
def test_what_counts_as_true_is_true(case, fusion, mode, monkeypatch):
    monkeypatch.setattr(check, "BLOCK", 2 * 36)  # a block of two channels of the third case
    problem = Problem.of(case, "cpu", 7)
    expected = {
        name: torch.from_numpy(value.astype("float64"))
        for name, value in truth(problem, mode, fusion).items()
    }
    verdict = judge(expected, problem, mode, fusion)
    assert verdict.error < 1e-14
    # And nothing that a pass gives is left out.
    ours = peers.ours(case, fusion, "cpu")
    seen = observe(ours, problem, mode)
    assert seen.keys() == expected.keys()
    assert judge(seen, problem, mode, fusion).right
    assert judge(observe(peers.eager(case, fusion, "cpu"), problem, mode), problem, mode,
                 fusion).error < 0.01  # fmt: skip


@pytest.mark.parametrize(
    "name", ["y", "dx", "dweight", "dbias", "dresidual", "running_mean", "running_var"]
)
@pytest.mark.parametrize("wrong", [1 + 1e-5, 0.0, math.nan])
def test_one_wrong_value_of_any_tensor_is_noticed(name, wrong):
    case = Case((64, 40))
    problem = Problem.of(case, "cpu", 1)
    seen = observe(peers.ours(case, "bn+add+relu", "cpu"), problem, "forward+backward")
    assert judge(seen, problem, "forward+backward", "bn+add+relu").right
    place = seen[name].flatten().abs().argmax()
    seen[name].view(-1)[place] *= wrong
    verdict = judge(seen, problem, "forward+backward", "bn+add+relu")
    assert not verdict.right
    # A y of zero has another kink than its gradient, which is then as wrong.
    assert verdict.where == name or (name, wrong) == ("y", 0.0)


def test_the_error_is_a_part_of_the_largest_value():
    case = Case((64, 40))
    problem = Problem.of(case, "cpu", 1)
    seen = observe(peers.ours(case, "bn", "cpu"), problem, "inference")
    seen["y"][3, 7] += 0.25 * seen["y"].abs().max()
    assert judge(seen, problem, "inference", "bn").error == pytest.approx(0.25, rel=1e-5)


def test_a_bound_is_for_computing_and_for_storing():
    assert check.bound(torch.float32) == 64 * 2**-24
    assert check.bound(torch.bfloat16) == 64 * 2**-24 + 2**-8
    assert not Verdict(math.nan, 1.0, "y").right
    assert Verdict(1.0, 1.0, "y").right


def test_observing_starts_from_the_first_state_each_time():
    case = Case((64, 40))
    problem = Problem.of(case, "cpu", 1)
    contender = peers.eager(case, "bn", "cpu")
    first = observe(contender, problem, "forward")
    contender.step(problem, "forward")()
    again = observe(contender, problem, "forward")
    assert all(torch.equal(first[name], again[name]) for name in first)
