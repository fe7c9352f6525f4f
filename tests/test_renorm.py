"""Batch Renormalization: the paper's formula and limits, constants to the gradient; a schedule."""

import copy
import functools
import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import oracle
from batchnorm import (
    ArgumentError,
    BatchNorm,
    InputError,
    NonFiniteWarning,
    Renorm,
    batch_norm,
    batch_norm_pure,
    pause_statistics,
)
from batchnorm.kernels import native
from within import assert_running, assert_step

pytestmark = pytest.mark.usefixtures("kernels")

OPEN, TIGHT = Renorm(100.0, 100.0), Renorm(1.1, 0.05)
AT_ONCE = {"r_steps": (0, 0), "d_steps": (0, 0)}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
close = {"rtol": 1e-11, "atol": 1e-11}  # float64, and sums of some hundred terms


def state(channels=3, dtype=torch.float32):
    """Running statistics that no batch here has."""
    return torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5


def composed(x, mean, var, weight, bias, renorm, size=None, mask=None):
    """The paper's algorithm in torch's own operations, r and d detached; groups one by one."""
    mask = torch.ones_like(x[:, 0], dtype=torch.bool) if mask is None else mask
    outputs = []
    for part, counts in zip(x.split(size or len(x)), mask.split(size or len(x)), strict=True):
        picked = part.movedim(1, -1)[counts]
        var_b, mean_b = torch.var_mean(picked, 0, correction=0)
        sigma, sigma_b = (var + 1e-5).sqrt(), (var_b + 1e-5).sqrt()
        r = (sigma_b / sigma).clamp(1 / renorm.r_max, renorm.r_max).detach()
        d = ((mean_b - mean) / sigma).clamp(-renorm.d_max, renorm.d_max).detach()
        along = (-1,) + (1,) * (x.dim() - 2)
        x_hat = (part - mean_b.view(along)) / sigma_b.view(along)
        y = x_hat * r.view(along) + d.view(along)
        outputs.append(y * weight.view(along) + bias.view(along))
    return torch.cat(outputs)


# --- the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 3), (6, 3, 5), (4, 3, 2, 5), (2, 3, 2, 2, 2)])
@pytest.mark.parametrize("renorm", [OPEN, TIGHT, Renorm(1.1, 100.0), Renorm(100.0, 0.05)])
def test_a_step_is_the_papers(renorm, shape, dtype):
    parameters = torch.promote_types(dtype, torch.float32)
    x, dy = (torch.randn(2, *shape) * 3 + 1).to(dtype)
    mean, var = state(dtype=parameters)
    old = mean.clone(), var.clone()
    leaves = [x.clone(), torch.randn(3, dtype=parameters), torch.randn(3, dtype=parameters)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    y = batch_norm(leaves[0], mean, var, *leaves[1:], True, 0.3, renorm=renorm)
    grads = torch.autograd.grad(y, leaves, dy)
    want = oracle.step(dy, x, *leaves[1:], renorm=(*old, renorm.r_max, renorm.d_max))
    got = dict(zip(("dx", "d_weight", "d_bias"), grads, strict=True))
    assert_step({"y": y, **got}, want, x, renorm=True)
    # The batch's own statistics are taken in, not the corrected ones.
    assert_running((mean, var), old, want, 0.3)


def test_each_side_of_each_limit():
    """Channels with σ and mean far below, within, and far above: r and d by hand."""
    x_hat = torch.tensor([-1.0, 1.0]).double().reshape(2, 1)
    sigmas, means = torch.tensor([0.01, 0.8, 1.5, 100.0]), torch.tensor([-9.0, -0.3, 0.4, 9.0])
    x = x_hat * sigmas + means
    renorm = Renorm(2.0, 0.5)
    y = batch_norm(x, torch.zeros(4), torch.ones(4), training=True, eps=1e-12, renorm=renorm)
    r, d = torch.tensor([0.5, 0.8, 1.5, 2.0]), torch.tensor([-0.5, -0.3, 0.4, 0.5])
    # σ and means are float32 numbers; eps is 1e-12 of the running variance, 1e-8 of the least.
    torch.testing.assert_close(y, x_hat * r.double() + d.double(), rtol=0, atol=1e-7)


def test_without_limits_it_is_evaluation():
    """r and d then undo the batch's statistics: the training output is evaluation's, before."""
    x = torch.randn(8, 3, 4).double() * 5 + 2
    bn = BatchNorm(3, renorm=Renorm(1e9, 1e9, **AT_ONCE)).double()
    bn.running_mean.copy_(torch.randn(3))
    bn.running_var.uniform_(0.5, 2.0)
    before = copy.deepcopy(bn).eval()
    torch.testing.assert_close(bn(x), before(x), **close)
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_limits_are_plain_batch_normalization(size, dtype):
    x, residual, dy = torch.randn(3, 8, 3, 5).to(dtype)
    gamma = torch.rand(3) + 0.5
    results = []
    # The last one's schedule has not begun.
    for renorm in (None, Renorm(1, 0, **AT_ONCE), Renorm(3.0, 5.0)):
        bn = BatchNorm(3, activation="relu", virtual_batch_size=size, renorm=renorm)
        bn = bn.to(torch.promote_types(dtype, torch.float32))
        bn.weight.data.copy_(gamma)
        results.append([])
        for _ in range(3):
            leaf = x.clone().requires_grad_()
            y = bn(leaf, residual=residual)
            grads = torch.autograd.grad(y, (leaf, bn.weight, bn.bias), dy)
            results[-1] += [y.detach(), *grads, bn.running_mean.clone(), bn.running_var.clone()]
    for other in results[1:]:
        for k, (a, b) in enumerate(zip(results[0], other, strict=True)):
            if k % 6 == 0 and (native.MISSING is None or dtype is not torch.float32):
                # γ·1 and β + γ·0 in float64 are γ and β, and the kernels are the same.
                assert torch.equal(a, b)
            else:
                # A few roundings of sums of 40 terms of size 4, or one where it is stored.
                u = torch.finfo(torch.promote_types(a.dtype, torch.float32)).eps / 2
                torch.testing.assert_close(a, b, rtol=torch.finfo(a.dtype).eps, atol=64 * u)


@pytest.mark.parametrize("steps", [0, 1, 10])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_as_without_and_evaluation_is(steps, momentum):
    """They do not depend on the correction; but each step's correction depends on them."""
    renorm = Renorm(1.5, 0.5, **AT_ONCE)
    bn, plain = BatchNorm(3, momentum=momentum, renorm=renorm), BatchNorm(3, momentum=momentum)
    mean, var = oracle.wide(torch.zeros(3)), oracle.wide(torch.ones(3))
    for step in range(steps):
        x = torch.randn(6, 3, 5) * 2 + 1
        want = oracle.step(torch.zeros(x.shape), x, renorm=(mean, var, 1.5, 0.5))
        y = bn(x)
        plain(x)
        # The running statistics of the steps before, in float32: 1e-7 of r, d ≤ 1.5 and x̂ ≤ 4.
        assert (abs(oracle.wide(y) - want["y"].value) <= 32 * 2.0**-24 * want["y"].size).all()
        f = oracle.forward(x)
        mean, var = oracle.running(mean, var, f, 1 / (step + 1) if momentum is None else momentum)
    for got, expected in ((bn.running_mean, mean), (bn.running_var, var)):
        assert (abs(oracle.wide(got) - expected) <= 2.0**-24 * (steps + 1) * 4).all()
    assert bn.num_batches_tracked == steps
    torch.testing.assert_close(bn.state_dict(), plain.state_dict(), rtol=2.0**-22, atol=2.0**-22)
    plain.load_state_dict(bn.state_dict())
    x, before = torch.randn(6, 3, 5), copy.deepcopy(bn.state_dict())
    assert torch.equal(bn.eval()(x), plain.eval()(x))
    torch.testing.assert_close(bn.state_dict(), before, rtol=0, atol=0)


# --- the schedule --------------------------------------------------------------------------------


def test_limits_open_between_two_steps():
    renorm = Renorm(3.0, 5.0, r_steps=(10, 30), d_steps=(20, 40))
    for step, r_max, d_max in [
        (0, 1, 0), (10, 1, 0), (11, 1.1, 0), (20, 2, 0), (25, 2.5, 1.25), (30, 3, 2.5),
        (31, 3, 2.75), (39, 3, 4.75), (40, 3, 5), (41, 3, 5), (10**12, 3, 5),
    ]:  # fmt: skip
        got = renorm.limits(torch.tensor(step))
        assert [float(limit) for limit in got] == pytest.approx([r_max, d_max], rel=1e-15)
    assert renorm.limits(None) == (3.0, 5.0)


def test_limits_that_open_at_once():
    for first in (0, 7):
        renorm = Renorm(3.0, 5.0, r_steps=(first, first), d_steps=(first, first))
        if first:
            before = renorm.limits(torch.tensor(first - 1))
            assert [float(limit) for limit in before] == [1, 0]
        for step in (first, first + 1):
            assert [float(limit) for limit in renorm.limits(torch.tensor(step))] == [3, 5]


def test_defaults_are_the_papers():
    assert Renorm() == Renorm(3.0, 5.0, r_steps=(5_000, 40_000), d_steps=(5_000, 25_000))


def test_the_layers_steps_are_the_batches_before_this_one():
    """Limits by num_batches_tracked, in a loop with the function, which has them in full."""
    schedule = Renorm(3.0, 2.0, r_steps=(1, 4), d_steps=(2, 4))
    bn = BatchNorm(3, renorm=schedule).double()
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for step in range(6):
        x = torch.randn(6, 3).double() * 5 + 4
        r_max = [1, 1, 1 + 2 / 3, 1 + 4 / 3, 3, 3][step]
        d_max = [0, 0, 0, 1, 2, 2][step]
        want = batch_norm(x, mean, var, training=True, renorm=Renorm(r_max, d_max))
        torch.testing.assert_close(bn(x), want, **close)
    # A loaded checkpoint goes on where it stopped; a reset begins anew.
    other = BatchNorm(3, renorm=schedule).double()
    other.load_state_dict(bn.state_dict())
    x = torch.randn(6, 3).double() * 5 + 4
    assert torch.equal(other(x), bn(x))
    bn.reset_running_stats()
    torch.testing.assert_close(bn(x), batch_norm(x, None, None, training=True), **close)


# --- gradients -----------------------------------------------------------------------------------


def problem(size=None, masked=False):
    x, dy, ddx = (torch.randn(7, 2, 3).double() * 2 + 1 for _ in range(3))
    weight, bias = (torch.randn(2).double() for _ in range(2))
    mask = None
    if masked:
        mask = torch.rand(7, 3) > 0.3
        mask[:, :2] = True
    return x, weight, bias, mask, dy, ddx


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("renorm", [OPEN, TIGHT])
def test_first_and_second_order_are_those_with_r_and_d_detached(renorm, size, masked):
    x, weight, bias, mask, dy, ddx = problem(size, masked)
    mean, var = state(2, torch.float64)
    ours = functools.partial(
        batch_norm, training=True, mask=mask, virtual_batch_size=size, renorm=renorm
    )
    results = []
    for form in (
        lambda x, w, b: ours(x, mean.clone(), var.clone(), w, b),
        lambda x, w, b: composed(x, mean, var, w, b, renorm, size, mask),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = form(*leaves)
        plain = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        torch.testing.assert_close(plain, first, **close)
        second = torch.autograd.grad(first[:2], leaves[:2], (ddx, torch.ones(2).double()))
        results.append((y.detach(), *plain, *second))
    torch.testing.assert_close(*results, **close)
    # Not by accident: with gradients through r and d they are others, where no limit holds.
    if renorm is OPEN:
        leaf = x.clone().requires_grad_()
        evaluated = batch_norm(leaf, mean, var, weight, bias)
        (through,) = torch.autograd.grad(evaluated, leaf, dy)
        assert (through - results[0][1]).abs().max() > 0.1


@pytest.mark.parametrize(("size", "masked"), [(None, False), (3, False), (3, True)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_second_order_by_finite_differences(size, masked, activation):
    """Beyond the limits r and d are constants, and finite differences see no gradient of theirs.

    Within them finite differences do; so here both limits hold in every channel and group.
    """
    x, weight, bias, mask, _, _ = problem(size, masked)
    residual = torch.randn(7, 2, 3).double()
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def call(x, weight, bias, residual):
        return batch_norm(
            *(x, torch.full((2,), -50.0).double(), torch.full((2,), 1e-3).double()),
            *(weight, bias, True),
            mask=mask,
            residual=residual,
            activation=activation,
            virtual_batch_size=size,
            renorm=TIGHT,
        )

    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
@pytest.mark.parametrize("size", [None, 3])
def test_jacobians_of_the_pure_form(transform, size):
    x, weight, bias, mask, _, _ = problem(size, True)
    mean, var = state(2, torch.float64)

    def ours(x, weight, bias):
        return batch_norm_pure(
            *(x, mean, var, weight, bias, True), mask=mask, virtual_batch_size=size, renorm=OPEN
        ).output

    got = transform(ours, argnums=(0, 1, 2))(x, weight, bias)
    want = transform(
        lambda x, w, b: composed(x, mean, var, w, b, OPEN, size, mask), argnums=(0, 1, 2)
    )(x, weight, bias)
    torch.testing.assert_close(got, want, **close)


def test_running_statistics_are_constants_both_ways():
    """Nothing flows from the old ones to y, nor from x to the new ones; in forward mode too."""
    x, weight, bias, *_ = problem()
    mean, var = state(2, torch.float64)

    def y(mean, var):
        return batch_norm_pure(x, mean, var, weight, bias, True, renorm=OPEN).output

    tangents = torch.randn(2, 2).double().unbind()
    assert not jvp(y, (mean, var), tangents)[1].any()
    assert not vjp(y, mean, var)[1](torch.randn_like(x))[0].any()

    for options in ({}, {"virtual_batch_size": 3}, {"renorm": OPEN}):
        step = functools.partial(batch_norm_pure, training=True, **options)
        new, moved = jvp(lambda x, step=step: step(x, mean, var)[1:], (x,), (x,))
        assert not torch.equal(new[0], mean)
        assert not any(m.any() for m in moved)


def test_vmap_of_the_pure_form_is_a_loop():
    """Batched running statistics, each batch's own correction."""
    x = torch.randn(4, 7, 2, 3).double() * 2 + 1
    mean, var = torch.randn(4, 2).double(), torch.rand(4, 2).double() + 0.5
    for size in (None, 3):
        step = functools.partial(
            batch_norm_pure, training=True, virtual_batch_size=size, renorm=Renorm(2.0, 1.0)
        )
        loop = [step(*one) for one in zip(x, mean, var, strict=True)]
        got = vmap(step)(x, mean, var)
        for field, stacked in zip(zip(*loop, strict=True), got, strict=True):
            torch.testing.assert_close(stacked, torch.stack(field), **close)


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "neither"])
def test_without_some_of_the_parameters(affine, activation, size):
    """And each gradient asked for alone."""
    x, dy, residual = torch.randn(3, 7, 2, 3).double()
    mean, var = state(2, torch.float64)
    weight = torch.randn(2).double() if affine in ("both", "weight") else None
    bias = torch.randn(2).double() if affine in ("both", "bias") else None
    want = oracle.step(
        *(dy, x, weight, bias),
        residual=residual,
        activation=activation,
        size=size,
        renorm=(mean, var, 1.1, 0.05),
    )
    names = ("dx", "d_weight", "d_bias", "d_residual")
    for asked in (*itertools.combinations(range(4), 1), (1, 2), (0, 3), (0, 1, 2, 3)):
        leaves = [
            None if t is None else t.clone().requires_grad_(k in asked)
            for k, t in enumerate((x, weight, bias, residual))
        ]
        wanted = {
            name: t
            for name, t in zip(names, leaves, strict=True)
            if t is not None and t.requires_grad
        }
        y = batch_norm(
            *(leaves[0], mean.clone(), var.clone(), *leaves[1:3], True),
            residual=leaves[3],
            activation=activation,
            virtual_batch_size=size,
            renorm=TIGHT,
        )
        assert_step({"y": y}, want, x, renorm=True)
        for again in (False, True):
            if wanted:
                grads = torch.autograd.grad(
                    y, list(wanted.values()), dy, retain_graph=True, create_graph=again
                )
                assert_step(dict(zip(wanted, grads, strict=True)), want, x, renorm=True)


# --- state, refusals -----------------------------------------------------------------------------


def test_state_dicts_are_torchs_both_ways():
    ours = BatchNorm(3, renorm=Renorm(**AT_ONCE))
    for _ in range(3):
        ours(torch.randn(8, 3) * 2 + 1)
    theirs = nn.BatchNorm1d(3)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    x = torch.randn(8, 3)
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x))
    back = BatchNorm(3, renorm=Renorm(2.0, 1.0))
    back.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(back.eval()(x), ours(x))
    assert "renorm=Renorm(r_max=2.0, d_max=1.0" in repr(back)


@pytest.mark.parametrize(
    "wrong",
    [
        {"r_max": 0.99},
        {"r_max": math.nan},
        {"r_max": math.inf},
        {"r_max": "3"},
        {"r_max": torch.tensor(3.0)},
        {"d_max": -1e-9},
        {"d_max": math.nan},
        {"d_max": math.inf},
        {"d_max": None},
        {"r_steps": (2, 1)},
        {"r_steps": (-1, 1)},
        {"r_steps": (1, 2, 3)},
        {"r_steps": (0.5, 1)},
        {"d_steps": 5},
        {"d_steps": [0, 1]},
        {"d_steps": (2, 1)},
    ],
    ids=str,
)
def test_impossible_limits_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ArgumentError, match=f"expected {name} to be"):
        Renorm(**wrong)


def test_without_running_statistics_it_is_refused():
    with pytest.raises(ArgumentError, match="track_running_stats=True with renorm"):
        BatchNorm(3, track_running_stats=False, renorm=Renorm())
    for call in (batch_norm, batch_norm_pure):
        with pytest.raises(ArgumentError, match="running statistics with renorm"):
            call(torch.randn(6, 3), None, None, training=True, renorm=Renorm())
    for wrong in (3.0, (3, 5), Renorm):
        with pytest.raises(ArgumentError, match="None or Renorm"):
            BatchNorm(3, renorm=wrong)
        with pytest.raises(ArgumentError, match="None or Renorm"):
            batch_norm(torch.randn(6, 3), *state(), training=True, renorm=wrong)


def test_what_raises_afterwards_has_changed_nothing():
    def fails(y):
        raise ValueError

    bn = BatchNorm(3, activation=fails, renorm=Renorm(**AT_ONCE))
    with pytest.raises(ValueError):  # noqa: PT011
        bn(torch.randn(6, 3))
    assert bn.num_batches_tracked == 0
    assert torch.equal(bn.running_mean, torch.zeros(3))


def test_an_empty_batch_is_no_batch():
    bn = BatchNorm(3, renorm=Renorm(**AT_ONCE))
    bn(torch.randn(6, 3) + 4)
    before = copy.deepcopy(bn.state_dict())
    assert bn(torch.randn(0, 3, 4)).shape == (0, 3, 4)
    torch.testing.assert_close(bn.state_dict(), before, rtol=0, atol=0)


def test_nan_stays_in_its_channel():
    x = torch.randn(6, 3, 4) * 2 + 1
    bad = x.clone()
    bad[2, 1, 3] = torch.nan
    bn, clean = (BatchNorm(3, renorm=Renorm(**AT_ONCE)) for _ in range(2))
    with pytest.warns(NonFiniteWarning, match=r"1 of 3 channels \(1\)"):
        y = bn(bad)
    assert y[:, 1].isnan().all()
    assert torch.equal(y[:, [0, 2]], clean(x)[:, [0, 2]])
    assert bn.running_var[1] == 1
    assert torch.equal(bn.running_var[[0, 2]], clean.running_var[[0, 2]])


def test_paused_statistics_correct_but_do_not_move():
    """Toward the running statistics as they stand, by the limits of the steps so far."""
    renorm = Renorm(2.0, 1.0, r_steps=(0, 2), d_steps=(0, 2))
    bn = BatchNorm(3, renorm=renorm).double()
    bn(torch.randn(8, 3).double() * 3 + 1)
    before = copy.deepcopy(bn.state_dict())
    x = torch.randn(8, 3).double() * 3 + 1
    with pause_statistics(bn):
        y = bn(x)
    torch.testing.assert_close(bn.state_dict(), before, rtol=0, atol=0)
    statistics = before["running_mean"].clone(), before["running_var"].clone()
    want = batch_norm(x, *statistics, training=True, renorm=Renorm(1.5, 0.5))
    torch.testing.assert_close(y, want, **close)


# --- activation checkpointing --------------------------------------------------------------------


def network(size=None):
    torch.manual_seed(1)
    options = {"virtual_batch_size": size, "renorm": Renorm(3.0, 2.0, **AT_ONCE)}
    return nn.Sequential(
        nn.Linear(3, 4), BatchNorm(4, **options), nn.Tanh(), BatchNorm(4, **options), nn.Tanh()
    ).double()


def batches(number):
    torch.manual_seed(2)
    return [(torch.randn(6, 3).double() * 4 + k, torch.randn(6, 4).double()) for k in range(number)]


def train(net, run, schedule):
    """Gradients of x and of the parameters, by steps of several micro-batches each."""
    gradients = []
    data = batches(3)
    for step in schedule:
        outputs, leaves = [], []
        for k in step:
            leaves.append(data[k][0].clone().requires_grad_())
            outputs.append((run(leaves[-1]), data[k][1]))
        sum((y * dy).sum() for y, dy in outputs).backward()
        gradients += [leaf.grad for leaf in leaves] + [p.grad.clone() for p in net.parameters()]
    return gradients


SCHEDULES = {
    "one by one": [[0], [1], [2]],
    "all before the backward pass": [[0, 1, 2], [2, 1]],
    "a batch of an earlier step again": [[0], [0], [1], [0]],
    "a batch twice in a step": [[0, 1, 0], [0, 0]],
}


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_checkpointing_counts_once_and_has_the_first_passes_correction(schedule, reentrant, size):
    plain, net = network(size), network(size)
    steps = SCHEDULES[schedule]
    want = train(plain, plain, steps)
    got = train(net, functools.partial(checkpoint, net, use_reentrant=reentrant), steps)
    torch.testing.assert_close(got, want, **close)
    torch.testing.assert_close(net.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert net[1].num_batches_tracked == sum(map(len, steps))


def test_a_kept_graph_is_recomputed_with_the_same_correction_again():
    data = batches(2)
    results = []
    for checkpointed in (False, True):
        net = network()
        run = functools.partial(checkpoint, net, use_reentrant=False) if checkpointed else net
        leaf = data[0][0].clone().requires_grad_()
        loss = (run(leaf) * data[0][1]).sum()
        run(data[1][0])  # moves the statistics
        results.append([torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(3)])
    assert torch.equal(results[1][0], results[1][2])
    torch.testing.assert_close(*results, **close)


def test_a_batch_of_the_same_mean_is_another_batch():
    results = []
    for checkpointed in (False, True):
        bn = BatchNorm(2, renorm=Renorm(3.0, 2.0, **AT_ONCE)).double()
        run = functools.partial(checkpoint, bn, use_reentrant=False) if checkpointed else bn
        dy = torch.arange(8.0).reshape(4, 2).double().sqrt()
        leaves = [torch.tensor([[k, 1.0], [-k, -1.0]]).repeat(2, 1).double() for k in (0.5, 4.0)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        for loss in [(run(leaf) * dy).sum() for leaf in leaves]:
            loss.backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*results, **close)


def test_checkpointing_within_checkpointing():
    results = []
    for checkpointed in (False, True):
        net, (x, dy) = network(), batches(1)[0]
        inner = functools.partial(checkpoint, net[:3], use_reentrant=False)
        outer = lambda x, net=net, inner=inner: net[3:](inner(x))  # noqa: E731
        leaf = x.clone().requires_grad_()
        y = checkpoint(outer, leaf, use_reentrant=False) if checkpointed else net(leaf)
        y.backward(dy)
        results.append([leaf.grad, net[0].weight.grad, *net.state_dict().values()])
    torch.testing.assert_close(*results, **close)


def test_what_is_kept_for_checkpointing_is_bounded_and_not_copied():
    bn = BatchNorm(3, renorm=Renorm(**AT_ONCE))
    for _ in range(300):
        bn(torch.randn(4, 3, requires_grad=True))
    assert not bn._history  # nobody will compute these again
    with torch.no_grad():
        for _ in range(300):
            bn(torch.randn(4, 3))
    assert len(bn._history) == 256
    assert all(not t.requires_grad for entry in bn._history for t in entry[:4])
    assert not copy.deepcopy(bn)._history


@pytest.mark.parametrize("reentrant", [True, False])
def test_other_passes_over_the_batch_do_not_answer_for_it(reentrant):
    """A pass without gradients, as for a log, between a checkpointed one and its backward pass."""
    x, dy = torch.randn(6, 3, dtype=torch.float64) * 3 + 1, torch.randn(6, 3, dtype=torch.float64)
    gradients = []
    for run in ("plain", "checkpoint"):
        bn = BatchNorm(3, renorm=Renorm(1.2, 0.1, r_steps=(0, 0), d_steps=(0, 0))).double()
        leaf = x.clone().requires_grad_()
        forward = functools.partial(checkpoint, bn, use_reentrant=reentrant)
        y = bn(leaf) if run == "plain" else forward(leaf)
        if not reentrant:  # the other kind's first pass is such a one itself
            with torch.no_grad():
                bn(leaf)
        gradients.append(torch.autograd.grad(y, leaf, dy)[0] if not reentrant else None)
        if reentrant:
            y.backward(dy)
            gradients[-1] = leaf.grad
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


def test_more_passes_than_are_remembered_are_an_error(monkeypatch):
    monkeypatch.setattr("batchnorm.layers.control.MOST_FORWARDS", 3)
    bn = BatchNorm(3, renorm=Renorm(1.2, 0.1, r_steps=(0, 0), d_steps=(0, 0)))
    leaves = [torch.randn(6, 3, requires_grad=True) for _ in range(4)]
    outputs = [checkpoint(bn, leaf, use_reentrant=False) for leaf in leaves]
    outputs[-1].sum().backward()
    with pytest.raises(InputError, match="3 forward passes"):
        outputs[0].sum().backward()
