"""Groups of samples, each by its own statistics (virtual_batch_size), however they are cut."""

import math

import pytest
import torch

from batchnorm import BatchNorm, Renorm, batch_norm
from batchnorm.autograd_kernels import KernelFunction
from batchnorm.kernels import calls, triton
from batchnorm.kernels.triton import operand
from batchnorm.moments import Moments
from triton_steps import DEVICE, EPS, PATHS, check, counts, lay, normal, served

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64

each_path = pytest.mark.parametrize("cut", PATHS, indirect=True)


def by_groups(shape, size, kind=torch.bool):
    """A mask that counts two elements at least in each group."""
    parts = [counts((len(part), *shape[1:])) for part in torch.empty(shape[0]).split(size)]
    mask = torch.cat(parts)
    return (
        mask if kind is torch.bool else mask * (torch.rand(mask.shape) * 2 + 0.5).to(DEVICE, kind)
    )


@each_path
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((8, 3), 4),
        ((11, 3), 4),  # the last one is smaller
        ((33, 9), 17),
        ((5, 40), 3),
        ((5, 2, 4, 4), 1),
        ((3, 1, 130), 2),
        ((40, 2, 2), 2),  # many groups
    ],
    ids=str,
)
def test_shapes(cut, shape, size):
    # Groups whose means differ: the variance of all has a part between them.
    x = normal(*shape) * 2 + torch.arange(shape[0], device=DEVICE).view(-1, *[1] * (len(shape) - 1))
    check(x, size=size, activation="relu")
    check(lay(x, "channels_last"), size=size, residual=normal(*shape), activation="leaky_relu")
    check(x, size=size, mask=by_groups(shape, size), residual=normal(*shape))


@each_path
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1, 8).t(),
        torch.randn(1, 8, 5).transpose(0, 1),
        torch.randn(8, 5, 1).transpose(1, 2),
        torch.randn(8, 2, 5)[:, :1],
    ],
    ids=["dense", "channels outermost", "channels last", "gaps"],
)
def test_a_single_channel(cut, x):
    """Its axis has size 1, and may stand anywhere in memory."""
    x = x.to(DEVICE)
    check(x, size=3)
    check(x, size=3, mask=by_groups(x.shape, 3), activation="relu")


def test_outputs_lie_as_inputs_do():
    """With gaps too: in the order of x's axes."""
    x = lay(normal(6, 4, 2, 6), "channels_last")[..., :4]
    ghost, plain = (
        batch_norm(x, None, None, training=True, virtual_batch_size=size) for size in (2, None)
    )
    assert ghost.stride() == plain.stride()


@each_path
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_half_precision(cut, dtype):
    x = normal(7, 3, 9, dtype=dtype) + 3
    check(x, size=3, activation="relu", parameters=dtype)
    check(lay(x, "channels_last"), size=3, parameters=F64, residual=normal(7, 3, 9))


@each_path
@pytest.mark.parametrize("kind", [F32, F64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps"])
def test_weights(cut, kind, layout):
    shape = (7, 3, 2, 6)
    check(lay(normal(*shape) + 2, layout), size=3, mask=by_groups(shape, 3, kind))


@each_path
@pytest.mark.parametrize("affine", [(True, False), (False, True), (False, False)])
def test_parameters_that_are_not_there(cut, affine):
    for activation in (None, "relu"):
        check(normal(5, 3, 4), size=2, affine=affine, activation=activation)


@each_path
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_does_not_count_may_be_nan(cut, layout):
    """Then it is as if its gradient had been 0: in each group by the group's own mask."""
    shape = (7, 3, 5)
    x, dy, (weight, bias) = normal(*shape), normal(*shape), normal(2, 3)
    mask = by_groups(shape, 3)
    counted = mask.unsqueeze(1)
    results = []
    for values, gradient in (
        (x.where(counted, torch.nan), dy),
        (x.where(counted, 7.0), dy.where(counted, 0.0)),
    ):
        leaves = [t.clone().requires_grad_() for t in (lay(values, layout), weight, bias)]
        buffers = torch.zeros(2, 3, device=DEVICE)
        y = batch_norm(*(leaves[0], *buffers, *leaves[1:], True), mask=mask, virtual_batch_size=3)
        assert served(y)
        dx, *parameters = torch.autograd.grad(y, leaves, gradient)
        results.append([*(t.where(counted, 0.0) for t in (y, dx)), *parameters, buffers])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@each_path
def test_far_from_zero_and_from_one_another(cut):
    x = normal(12, 3, 5) + 1e5
    x[4:8] += 10
    check(x, size=4)
    check(x, size=4, mask=by_groups(x.shape, 4))


@each_path
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_take_in_all_groups_once(cut, momentum):
    x = normal(7, 3, 5) * 2 + 1
    ghost, whole = (
        BatchNorm(3, momentum=momentum, virtual_batch_size=size, device=DEVICE)
        for size in (3, None)
    )
    for step in (1, 2):
        assert served(ghost(x * step))
        whole(x * step)
        assert ghost.num_batches_tracked == step
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(ghost, name), getattr(whole, name))


@pytest.mark.parametrize(
    ("x", "channel"),
    [
        (torch.randn(6, 3, 4), 0),
        (torch.randn(4, 3, 6).permute(2, 1, 0), 1),
        (
            torch.randn(1, 1, 2).expand(131072, 1, 2).contiguous(),
            1,
        ),  # more than a launch has room for
    ],
    ids=["channels first", "samples last", "many"],
)
def test_groups_that_are_left_to_others(x, channel):
    x = x.to(DEVICE)
    assert triton.moments(x, None, channel, 2 << calls.GROUP_BIT)[-1] == calls.NOT_SERVED
    mean, var = torch.zeros(2, x.shape[channel], device=DEVICE)
    *_, code = triton.forward(
        *(x, None, None, None, None, mean, var, None, 0.1, EPS, channel),
        2 << calls.GROUP_BIT | calls.TRAINING,
    )
    assert code == calls.NOT_SERVED
    assert not mean.any()


def test_one_value_in_a_group_is_left_to_others():
    for x, size in ((normal(6, 3), 1), (normal(5, 3), 2), (normal(5, 3, 1), 4)):
        flags = size << calls.GROUP_BIT
        assert triton.moments(x, None, 1, flags)[-1] == calls.NOT_SERVED
        *_, code = triton.forward(x, *[None] * 7, 0.1, EPS, 1, flags | calls.TRAINING)
        assert code == calls.NOT_SERVED


def test_statistics_of_other_lengths_are_left_to_others():
    """In training those of a channel, in evaluation those of every group."""
    x = normal(6, 3, 4)
    grouped, one, each = 2 << calls.GROUP_BIT, normal(3), normal(9)
    for flags, mean, var in (
        (0, one, one),
        (calls.KEEP, one, one),
        (0, each, one),
        (calls.TRAINING, one, each),
        (calls.TRAINING, each, each),
    ):
        *_, code = triton.forward(
            *(x, None, None, None, None, mean, var, None, 0.1, EPS, 1, flags | grouped)
        )
        assert code == calls.NOT_SERVED
    # More numbers of channels than 32 bits count.
    many = torch.empty(2**17 - 2, 2**15, dtype=BF16, device="meta")
    assert not operand.served(many, None, (), EPS, 1, 2 << calls.GROUP_BIT)
    assert operand.served(many[:-8], None, (), EPS, 1, 2 << calls.GROUP_BIT)


@each_path
@pytest.mark.parametrize("size", [3, None])
def test_gradients_where_a_group_counts_nothing(cut, size):
    """First ones by the kernels, and the same that can be differentiated."""
    x, weight, dy = normal(6, 3, 4), normal(3), normal(6, 3, 4)
    mask = torch.zeros(6, 4, dtype=torch.bool, device=DEVICE)
    if size is not None:
        mask[:3] = True
    results = []
    for again in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        options = mask.unsqueeze(1), None, None, None, 0.1, EPS, 1
        flags = calls.TRAINING | (size or 0) << calls.GROUP_BIT
        y, _ = KernelFunction.apply(*leaves, None, None, (*options, flags, [], None, triton))
        results.append(torch.autograd.grad(y, leaves, dy, create_graph=again))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@each_path
@pytest.mark.parametrize(
    ("activation", "masked"), [(None, False), ("relu", True), ("leaky_relu", False)]
)
def test_each_group_by_its_own_parameters(cut, masked, activation):
    """By given statistics, backward by its sums or in one: as single calls, group by group."""
    shape, size = (7, 3, 5), 3
    x, dy, residual = (normal(*shape) for _ in range(3))
    weight, bias = normal(9), normal(9)
    mask = by_groups(shape, size).unsqueeze(1) if masked else None
    of = lambda t, k: None if t is None else t[k * size : (k + 1) * size]  # noqa: E731
    grouped, act = size << calls.GROUP_BIT, calls.ACTIVATIONS[activation]
    statistics, count, code = triton.moments(x, mask, 1, grouped)
    assert code == 0
    assert statistics.shape == (2, 12)
    total = Moments.of(x.double(), None if mask is None else mask.squeeze(1))
    want = torch.stack([total.mean, total.variance()])
    torch.testing.assert_close(statistics[:, 9:], want, rtol=1e-6, atol=1e-6)
    assert count == total.count
    rows = statistics[:, :9].contiguous()
    y, kept, _, code = triton.forward(
        *(x, weight, bias, residual, mask, *rows, None, 0.0, EPS, 1, grouped | act | calls.KEEP)
    )
    assert code == 0
    assert torch.equal(kept[:, :9], rows)
    every = calls.TRAINING | calls.WANT_X | calls.WANT_RESIDUAL | calls.WANT_PARAMETERS | act
    saved = y if activation else None
    tensors = dy, x, saved, kept, weight, bias, mask
    dx, dz, d_weight, d_bias, code = triton.backward(
        *(*tensors, None, count, EPS, 1, grouped | every)
    )
    assert code == 0
    sums, code = triton.backward_reduce(*tensors, EPS, 1, grouped | act)
    assert code == 0
    by_sums = triton.backward(
        *(*tensors, sums, count, EPS, 1, grouped | every & ~calls.WANT_PARAMETERS)
    )
    close = {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(by_sums[0], dx, **close)
    torch.testing.assert_close(sums.flip(0).float(), torch.stack([d_weight, d_bias]), **close)
    assert (dz is None) == (activation is None and not masked)
    for k in range(3):
        here = slice(3 * k, 3 * k + 3)
        own = weight[here], bias[here]
        y_one, alone, n, _ = triton.forward(
            *(of(x, k), *own, of(residual, k), of(mask, k), None, None, None, 0.0, EPS, 1),
            calls.TRAINING | calls.KEEP | act,
        )
        torch.testing.assert_close(of(y, k), y_one, **close)
        torch.testing.assert_close(rows[:, here], alone, rtol=1e-6, atol=1e-6)
        dx_one, dz_one, *parameters, _ = triton.backward(
            *(of(dy, k), of(x, k), of(saved, k), alone, *own, of(mask, k), None, n, EPS, 1, every)
        )
        torch.testing.assert_close(of(dx, k), dx_one, **close)
        if dz is not None:
            assert torch.equal(of(dz, k), dz_one)
        for got, want in zip((d_weight, d_bias), parameters, strict=True):
            torch.testing.assert_close(got[here], want, **close)


@each_path
def test_renorm_in_groups(cut):
    """γ and β are each group's own; as plain torch has it."""
    x, dy = normal(7, 3, 5) * 2 + 1, normal(7, 3, 5)
    results = []
    for dtype in (F32, F64):
        bn = BatchNorm(
            3, virtual_batch_size=3, renorm=Renorm(r_max=1.5, d_max=0.5), device=DEVICE, dtype=dtype
        )
        leaf = x.to(dtype).requires_grad_()
        y = bn(leaf)
        assert served(y) == (dtype is F32)
        grads = torch.autograd.grad(y, (leaf, bn.weight, bn.bias), dy.to(dtype))
        results.append([t.float() for t in (y, *grads, bn.running_mean, bn.running_var)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@each_path
def test_same_call_same_bits_and_every_group_alike(cut):
    """Groups with the same samples come out the same."""
    part, dy = normal(3, 4, 5), normal(3, 4, 5).repeat(3, 1, 1)
    x = part.repeat(3, 1, 1)
    runs = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        y = batch_norm(leaf, None, None, training=True, virtual_batch_size=3)
        runs.append([y.detach(), *torch.autograd.grad(y, leaf, dy)])
    for first, again in zip(*runs, strict=True):
        assert torch.equal(first, again)
        assert torch.equal(first[:3], first[3:6])
        assert torch.equal(first[:3], first[6:])


@each_path
@pytest.mark.parametrize("size", [2, 4])
def test_where_nothing_counts_outputs_stay_in_range(cut, size):
    """Of a group or of a batch: variance 1. By √eps, 1000 would become more than float16 holds."""
    x = torch.full((4, 3, 2), 1000.0, dtype=F16, device=DEVICE)
    mask = torch.zeros(4, 2, dtype=torch.bool, device=DEVICE)
    if size == 2:
        x[:2], mask[:2] = normal(2, 3, 2), True
    y, statistics, count, code = triton.forward(
        *(x, None, None, None, mask.unsqueeze(1), None, None, None, 0.1, EPS, 1),
        size << calls.GROUP_BIT | calls.TRAINING | calls.KEEP,
    )
    assert code == 0
    assert count == mask.sum()
    assert (y[2:] == x[2:] / math.sqrt(1 + EPS)).all()
    of_nothing = statistics[:, 3:6] if size == 2 else statistics
    assert of_nothing.tolist() == [[0.0] * 3, [1.0] * 3]
