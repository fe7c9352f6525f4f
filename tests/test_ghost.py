"""Ghost batches: a loop over the groups, by the oracle, in every derivative; one running update."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import oracle
from batchnorm import BatchNorm, InputError, NonFiniteWarning, batch_norm, batch_norm_pure
from batchnorm.ghost import Groups
from batchnorm.kernels import blocked, native
from within import assert_running, assert_step

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _best_afterwards():
    yield
    if native.MISSING is None:
        native.use()
    torch.set_num_threads(1)


def arranged(x, layout):
    """The same values, differently in memory."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":  # samples are the fastest axis: groups do not lie together
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gaps":
        return torch.stack([x, x.new_full(x.shape, torch.nan)], -1)[..., 0]
    return x.contiguous()


LAYOUTS = ["contiguous", "channels_last", "transposed", "gaps"]


def check(x, size, *, mask=None, residual=None, activation=None, channel_dim=1):
    """One training step against a loop over the groups."""
    channels = x.shape[channel_dim]
    parameters = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (torch.randn(channels, dtype=parameters) for _ in range(2))
    mean, var = torch.randn(channels, dtype=parameters), torch.rand(channels, dtype=parameters)
    old = mean.clone(), var.clone()
    dy = torch.randn(x.shape).to(x.dtype)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    if residual is not None:
        leaves.append(residual.detach().requires_grad_())
    options = {"mask": mask, "activation": activation, "channel_dim": channel_dim}
    y = batch_norm(
        *(leaves[0], mean, var, *leaves[1:3], True, 0.3),
        residual=(*leaves, None)[3],
        virtual_batch_size=size,
        **options,
    )
    names = ["dx", "d_weight", "d_bias", "d_residual"][: len(leaves)]
    got = dict(zip(names, torch.autograd.grad(y, leaves, dy), strict=True))
    want = oracle.step(dy, x, weight, bias, residual=residual, size=size, **options)
    assert_step({"y": y, **got}, want, x, parameters=parameters)
    assert_running((mean, var), old, want, 0.3)
    return y


# --- values --------------------------------------------------------------------------------------

SHAPES = {
    "dense": ((8, 3), 1),
    "sequence": ((8, 3, 5), 1),
    "image": ((8, 3, 2, 5), 1),
    "volume": ((8, 3, 2, 2, 2), 1),
    "last": ((8, 4, 3), -1),
    "first": ((3, 8, 4), 0),
    "one channel": ((8, 1, 6), 1),
    "one channel, dense": ((8, 1), 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", SHAPES)
def test_each_shape_layout_and_dtype(kind, layout, dtype):
    shape, channel_dim = SHAPES[kind]
    x = arranged((torch.randn(shape) * 2 + 1).to(dtype), layout)
    residual = torch.randn(shape).to(dtype)
    # One more than the batch, half of it, ragged, ragged with one sample last, one.
    for size in (9, 4, 3, 7, 1):
        left = (8 % size or size) * x.numel() // x.shape[channel_dim] // 8
        if left < 2:
            continue
        fused = {"residual": residual, "activation": "leaky_relu"} if size % 2 else {}
        y = check(x, size, channel_dim=channel_dim, **fused)
        # By the C++ kernels where the groups lie together; by others the same numbers.
        if layout in ("contiguous", "channels_last") and kind != "first":
            served = getattr(y.grad_fn, "backend", None) == "native"
            assert served == (native.MISSING is None)


EDGES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33]


@pytest.mark.parametrize("threads", [1, 2])
@given(
    samples=st.integers(2, 40),
    size=st.integers(1, 45),
    channels=st.integers(1, 9) | st.sampled_from(EDGES),
    length=st.none() | st.sampled_from([*EDGES, 63, 64, 65]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    activation=st.sampled_from([None, "relu", "leaky_relu"]),
    extras=st.sampled_from(["", "mask", "weights", "residual", "residual and mask"]),
    level=st.integers(0, max(0, native.LEVELS - 1)),
    seed=st.integers(0, 2**20),
)
def test_values_at_every_edge(
    threads, samples, size, channels, length, dtype, layout, activation, extras, level, seed
):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    if native.MISSING is None:
        native.use(level, serial_elements=0)
    shape = (samples, channels) if length is None else (samples, channels, length)
    rest = (samples, *shape[2:])
    mask = None
    if "mask" in extras or extras == "weights":
        mask = torch.rand(rest) > 0.3
        for group in mask.split(size):
            group.view(-1)[:2] = True
        mask = mask * (torch.rand(rest) + 1) if extras == "weights" else mask
    alone = length in (None, 1) and (size == 1 or samples % size == 1)
    x = arranged((torch.randn(shape) * 2 + 1).to(dtype), layout)
    residual = torch.randn(shape).to(dtype) if "residual" in extras else None
    if alone:
        with pytest.raises(InputError, match="in each group of virtual_batch_size samples"):
            check(x, size, mask=mask)
    else:
        check(x, size, mask=mask, residual=residual, activation=activation)


def test_blocks_of_a_large_call(monkeypatch, without_native):
    """The reference goes through large tensors block by block, which may cut a group, or none."""
    for limit in (7, 40, 200):
        monkeypatch.setattr(blocked, "BLOCK", limit)
        x = torch.randn(11, 3, 9)
        counts = torch.rand(11, 9) > 0.3
        residual = torch.randn(11, 3, 9)
        check(x, 4)
        check(x, 4, mask=counts, residual=residual, activation="relu")


def test_an_offset_does_not_cost_precision():
    """Groups of different means, far from zero: σ = 1 in each, the groups' means 10 apart."""
    x = torch.randn(12, 3, 50) + 1e5
    x[4:8] += 10
    check(x, 4)
    check(arranged(x, "channels_last"), 4, activation="relu")


def test_groups_are_normalised_each_to_mean_0_and_variance_1():
    """The defining property, without the oracle; the same samples in one group are not."""
    x = torch.randn(12, 3, 5).double() * torch.arange(1, 13).reshape(12, 1, 1)
    y = batch_norm(x, None, None, training=True, eps=1e-12, virtual_batch_size=4)
    zeros, ones = torch.zeros(3).double(), torch.ones(3).double()
    for group in y.split(4):
        torch.testing.assert_close(group.mean((0, 2)), zeros, rtol=0, atol=1e-12)
        torch.testing.assert_close(group.var((0, 2), correction=0), ones, rtol=0, atol=1e-11)
    whole = batch_norm(x, None, None, training=True, eps=1e-12)
    assert (whole[:4].var((0, 2), correction=0) < 0.5).all()


@pytest.mark.parametrize("size", [8, 9, 1000, sys.maxsize, 2**70, np.int64(8), None])
def test_a_group_as_large_as_the_batch_is_the_batch(size):
    x = torch.randn(8, 3, 5)
    statistics = [[torch.zeros(3), torch.ones(3)] for _ in range(2)]
    plain = batch_norm(x, *statistics[0], training=True)
    ghost = batch_norm(x, *statistics[1], training=True, virtual_batch_size=size)
    if native.MISSING is None:
        assert torch.equal(ghost, plain)
    # Without, torch's own kernels serve plain float32 here: 8 roundings of y ≤ 4.
    torch.testing.assert_close(ghost, plain, rtol=0, atol=8 * 4 * 2.0**-24)
    torch.testing.assert_close(statistics[1], statistics[0], rtol=2.0**-23, atol=2.0**-24)


@given(
    size=st.integers(1, 6),
    lead=st.none() | st.integers(0, 5),
    samples=st.integers(0, 13),
    channel_dim=st.sampled_from([0, 1, -1]),
    masked=st.booleans(),
)
def test_cutting_and_joining(size, lead, samples, channel_dim, masked):
    """Sample k stands in group (lead + k) // size; what is filled in does not count."""
    lead = None if lead is None else lead % size
    shape = (2, samples, 3) if channel_dim == 0 else (samples, 2, 3)
    x = torch.randn(shape)
    mask = torch.rand(samples, shape[1 if channel_dim == -1 else 2]) if masked else None
    groups = Groups.of(x, size, channel_dim, lead)
    cut, cut_mask = groups.cut(x), groups.cut_mask(mask, x)
    assert torch.equal(groups.join(cut), x)
    by_sample = x.movedim(1, 0) if channel_dim == 0 else x
    total = 0.0
    for k in range(samples):
        group, place = divmod((lead or 0) + k, groups.size)
        assert torch.equal(cut[group, place], by_sample[k])
        if cut_mask is not None:
            want = torch.ones(()) if mask is None else mask[k]
            assert (cut_mask[group, place] == want).all()
            total += want.sum()
    if cut_mask is None:
        assert cut.shape[0] * cut.shape[1] == samples
    else:
        assert cut_mask.sum() == pytest.approx(float(total), rel=1e-5)


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_weights", [False, True])
def test_a_group_of_which_nothing_counts_takes_no_part(as_weights):
    x, residual = torch.randn(2, 9, 3, 4).double()
    mask = torch.ones(9, 4, dtype=torch.bool)
    mask[3:6] = False
    mask[0, 1] = False
    mask = mask.double() * 1.5 if as_weights else mask
    check(x, 3, mask=mask, residual=residual, activation="relu")
    # And what it holds reaches neither the statistics nor the other groups, nor their gradients.
    results = []
    for junk in (0.0, torch.nan, torch.inf):
        leaf = x.clone()
        leaf[3:6] = junk
        mean, var = torch.zeros(3), torch.ones(3)
        leaf.requires_grad_()
        y = batch_norm(leaf, mean, var, training=True, mask=mask, virtual_batch_size=3)
        dy = torch.ones_like(y).cumsum(0)
        dy[3:6] = 0
        (dx,) = torch.autograd.grad(y, leaf, dy)
        kept = [0, 1, 2, 6, 7, 8]
        results.append((y.detach()[kept], dx[kept], mean, var))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_masks_that_broadcast():
    x = torch.randn(7, 3, 4, 5).double()
    for shape in [(7, 1, 1), (4, 5), (5,), (1, 4, 1)]:
        mask = torch.rand(shape) > 0.4
        mask.view(-1)[:2] = True
        mask[(0,) * mask.dim()] = True
        if len(shape) == 3 and shape[0] == 7:
            mask[:] = mask | (torch.arange(7) % 2 == 0).reshape(7, 1, 1)
        check(x, 3, mask=mask)
        check(x, 7, mask=mask)


WRONG = [
    # (shape, size, what counts, which group is named)
    ((5, 3), 2, None, "1 in group 2 of 3"),
    ((4, 3), 1, None, "1 in group 0 of 4"),
    ((6, 3, 4), 2, [(2, 1)], "1 in group 1 of 3"),
    ((6, 3, 4), 4, [(4, 0)], "1 in group 1 of 2"),
]


@pytest.mark.parametrize(("shape", "size", "alone", "named"), WRONG)
def test_groups_with_too_few_values_are_refused_before_anything_changes(shape, size, alone, named):
    mask = None
    if alone is not None:
        mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
        start = alone[0][0] // size * size
        mask[start : start + size] = False
        for place in alone:
            mask[place] = True
    for weights in (False, True):
        if weights and mask is None:
            continue
        of_layer = mask.double() if weights else mask
        net = torch.nn.Sequential(BatchNorm(3, virtual_batch_size=size))
        with pytest.raises(InputError, match=rf"(?s)virtual_batch_size samples.*weight of {named}"):
            net[0](torch.randn(shape), of_layer)
        assert net[0].num_batches_tracked == 0
        assert torch.equal(net[0].running_mean, torch.zeros(3))
        assert torch.equal(net[0].running_var, torch.ones(3))


def test_a_bad_mask_is_refused_in_the_usual_words():
    x = torch.randn(6, 3)
    for mask, words in [
        (torch.zeros(6, dtype=torch.bool), "at least 2 elements"),
        (-torch.ones(6), "not negative"),
        (torch.full((6,), torch.nan), "finite"),
        (torch.ones(5), "broadcasts"),
    ]:
        with pytest.raises(InputError, match=words):
            batch_norm(x, None, None, training=True, mask=mask, virtual_batch_size=3)


# --- what is not finite, what is not there -------------------------------------------------------


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_in_one_group_stays_in_it(poison):
    x, dy = torch.randn(2, 9, 3, 5)
    x[4, 1, 2] = poison
    clean = x.clone()
    clean[4, 1, 2] = 0.0
    results = []
    for values in (clean, x):
        bn = BatchNorm(3, virtual_batch_size=3)
        leaf = values.clone().requires_grad_()
        if values is x:
            with pytest.warns(NonFiniteWarning, match=r"1 of 3 channels \(1\)"):
                y = bn(leaf)
        else:
            y = bn(leaf)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, dy), bn))
    (want, d_want, good), (got, d_got, bn) = results
    assert got[3:6, 1].isnan().any()
    touched = torch.zeros(9, 3, dtype=torch.bool)
    touched[3:6, 1] = True
    assert torch.equal(got[~touched], want[~touched])
    assert torch.equal(d_got[~touched], d_want[~touched])
    assert (bn.running_mean[1], bn.running_var[1]) == (0, 1)
    assert torch.equal(bn.running_mean[[0, 2]], good.running_mean[[0, 2]])
    assert torch.equal(bn.running_var[[0, 2]], good.running_var[[0, 2]])
    assert bn.num_batches_tracked == 1


def test_an_empty_batch_is_no_batch():
    """Nor one of NaN: warnings are errors here."""
    for shape, channel_dim in [((0, 3, 4), 1), ((4, 3, 0), 1), ((3, 0), 0), ((0, 4, 3), -1)]:
        bn = BatchNorm(3, virtual_batch_size=2, channel_dim=channel_dim, momentum=None)
        x = torch.randn(shape, requires_grad=True)
        y = bn(x)
        assert y.shape == x.shape
        grads = torch.autograd.grad(y, (x, bn.weight), torch.randn(shape))
        assert grads[0].shape == x.shape
        assert torch.equal(grads[1], torch.zeros(3))
        assert bn.num_batches_tracked == 0
        assert torch.equal(bn.running_mean, torch.zeros(3))
        assert torch.equal(bn.running_var, torch.ones(3))


# --- derivatives ---------------------------------------------------------------------------------

GRID = [  # of 5 samples, in groups of 2 the last is alone; in one of 5 there is one group
    *itertools.product([2, 3], [None, "bool", "weights"], [None, "relu"], [1]),
    *((3, None, "relu", 0), (2, "bool", None, 0), (5, "weights", "relu", 1)),
]


def function(size, mask_kind, activation, channel_dim):
    counts = torch.rand(5, 3) > 0.3
    counts[:, :2] = True
    masks = {None: None, "bool": counts, "weights": counts * (torch.rand(5, 3) + 1)}
    shape = (5, 2, 3) if channel_dim else (2, 5, 3)

    def call(x, weight, bias, residual):
        return batch_norm(
            *(x, None, None, weight, bias, True),
            mask=masks[mask_kind],
            residual=residual,
            activation=activation,
            virtual_batch_size=size,
            channel_dim=channel_dim,
        )

    shapes = shape, (2,), (2,), shape
    return call, tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)


@pytest.mark.parametrize(("size", "mask_kind", "activation", "channel_dim"), GRID)
def test_first_and_second_order(size, mask_kind, activation, channel_dim):
    call, leaves = function(size, mask_kind, activation, channel_dim)
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(
        *(call, leaves), gen_non_contig_grad_outputs=True, check_fwd_over_rev=True, fast_mode=True
    )


def by_loop(x, weight, bias, mask, size):
    """Differentiable, in torch's own operations, group by group."""
    outputs = []
    for part, counts in zip(x.split(size), mask.split(size), strict=True):
        picked = part.movedim(1, -1)[counts]
        var, mean = torch.var_mean(picked, 0, correction=0)
        shape = (-1,) + (1,) * (x.dim() - 2)
        scale = weight / (var + 1e-5).sqrt()
        outputs.append((part - mean.view(shape)) * scale.view(shape) + bias.view(shape))
    return torch.cat(outputs)


def ghost(x, weight, bias, mask, size=3):
    zeros, ones = torch.zeros(2).double(), torch.ones(2).double()
    return batch_norm_pure(
        *(x, zeros, ones, weight, bias, True), mask=mask, virtual_batch_size=size
    )


def inputs():
    x, weight, bias = (torch.randn(s).double() for s in ((5, 2, 3), (2,), (2,)))
    mask = torch.rand(5, 3) > 0.3
    mask[:, :2] = True
    return x, weight, bias, mask


close = {"rtol": 1e-11, "atol": 1e-11}  # float64, and sums of some hundred terms


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobians(transform):
    *point, mask = inputs()
    got = transform(lambda x, w, b: ghost(x, w, b, mask).output, argnums=(0, 1, 2))(*point)
    want = transform(lambda x, w, b: by_loop(x, w, b, mask, 3), argnums=(0, 1, 2))(*point)
    torch.testing.assert_close(got, want, **close)


def test_directional_derivatives():
    *point, mask = inputs()
    *directions, _ = inputs()
    got = jvp(lambda x, w, b: ghost(x, w, b, mask).output, (*point,), (*directions,))
    want = jvp(lambda x, w, b: by_loop(x, w, b, mask, 3), (*point,), (*directions,))
    torch.testing.assert_close(got, want, **close)


def test_vmap_over_batches_is_a_loop_over_batches():
    x, mask = torch.randn(4, 5, 2, 3).double(), torch.rand(4, 5, 3) > 0.3
    mask[:, :, :2] = True
    weight, bias = torch.randn(2, 4, 2).double()
    for counts, in_dims in ((mask, 0), (None, None)):
        got = vmap(ghost, in_dims=(0, 0, 0, in_dims))(x, weight, bias, counts)
        loop = [
            ghost(*one, None if counts is None else mask[k])
            for k, one in enumerate(zip(x, weight, bias, strict=True))
        ]
        for field, stacked in zip(zip(*loop, strict=True), got, strict=True):
            torch.testing.assert_close(stacked, torch.stack(field), **close)

    def loss(weight, x, mask):
        return ghost(x, weight, bias[0], mask).output.square().cumsum(0).sum()

    got = vmap(grad(loss, argnums=(0, 1)))(weight, x, mask)
    for k in range(4):
        leaves = weight[k].clone().requires_grad_(), x[k].clone().requires_grad_()
        y = by_loop(leaves[1], leaves[0], bias[0], mask[k], 3)
        want = torch.autograd.grad(y.square().cumsum(0).sum(), leaves)
        torch.testing.assert_close(tuple(g[k] for g in got), want, **close)


def test_hessian():
    x, weight, bias, mask = inputs()
    cotangent = torch.randn(5, 2, 3).double()
    got = hessian(lambda x: (ghost(x, weight, bias, mask).output * cotangent).sum())(x)
    want = hessian(lambda x: (by_loop(x, weight, bias, mask, 3) * cotangent).sum())(x)
    assert want.abs().max() > 0.1
    torch.testing.assert_close(got, want, **close)


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "neither"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("asked", [1, 2, 4, 6, 7, 8, 10, 15])  # a bit for each input
def test_gradients_of_any_of_the_inputs(affine, activation, asked):
    """To second order: a gradient that is asked for alone is the same."""
    x, residual, dy, ddx = torch.randn(4, 7, 2, 3).double()
    weight = torch.randn(2).double() if affine in ("both", "weight") else None
    bias = torch.randn(2).double() if affine in ("both", "bias") else None
    tensors = [x, weight, bias, residual]
    leaves = [
        None if t is None else t.clone().requires_grad_(bool(asked >> k & 1))
        for k, t in enumerate(tensors)
    ]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    if not wanted:
        pytest.skip("nothing is asked for")
    y = batch_norm(
        *(leaves[0], None, None, *leaves[1:3], True),
        residual=leaves[3],
        activation=activation,
        virtual_batch_size=3,
    )
    first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    again = torch.autograd.grad(y, wanted, dy, create_graph=True)
    torch.testing.assert_close(first, again, **close)
    want = oracle.step(*(dy, x, weight, bias), residual=residual, activation=activation, size=3)
    names = ("dx", "d_weight", "d_bias", "d_residual")
    names = [n for n, t in zip(names, leaves, strict=True) if t is not None and t.requires_grad]
    assert_step(dict(zip(names, first, strict=True)), want, x)
    if names[0] == "dx" and activation is None:
        got = torch.autograd.grad(again[0], leaves[0], ddx)[0]
        leaf = x.clone().requires_grad_()
        gamma = torch.ones(2).double() if weight is None else weight
        z = by_loop(leaf, gamma, torch.zeros(2).double(), torch.ones(7, 3) > 0, 3)
        (dx,) = torch.autograd.grad(z, leaf, dy, create_graph=True)
        torch.testing.assert_close(got, torch.autograd.grad(dx, leaf, ddx)[0], **close)


def test_gradients_in_batches():
    """is_grads_batched has a vmap of its own, which the kernels must leave to others."""
    x = torch.randn(7, 2, 3).double().requires_grad_()
    dy = torch.randn(4, 7, 2, 3).double()
    y = batch_norm(x, None, None, training=True, virtual_batch_size=3)
    (got,) = torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)
    want = torch.stack([torch.autograd.grad(y, x, d, retain_graph=True)[0] for d in dy])
    torch.testing.assert_close(got, want, **close)


# --- the layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 10])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_running_update_a_step_and_evaluation_as_without(steps, momentum, dtype):
    bn = BatchNorm(3, momentum=momentum, virtual_batch_size=4)
    mean, var = oracle.wide(torch.zeros(3)), oracle.wide(torch.ones(3))
    for step in range(steps):
        # Groups whose means differ: the variance of all is more than the mean of theirs.
        x = torch.randn(10, 3, 5) + torch.arange(10).reshape(10, 1, 1)
        x = x.to(dtype)
        bn(x)
        f = oracle.forward(x)
        mean, var = oracle.running(mean, var, f, 1 / (step + 1) if momentum is None else momentum)
    assert bn.num_batches_tracked == steps
    # Rounded once a step, in float32.
    for got, want in ((bn.running_mean, mean), (bn.running_var, var)):
        assert got.dtype is torch.float32
        assert (abs(oracle.wide(got) - want) <= 2.0**-24 * (steps + 1) * (abs(want) + 1)).all()

    plain = BatchNorm(3)
    plain.load_state_dict(bn.state_dict(), strict=True)
    leaves = [torch.randn(7, 3, 5).to(dtype).requires_grad_() for _ in range(2)]
    leaves[1].data.copy_(leaves[0].data)
    before = {name: value.clone() for name, value in bn.state_dict().items()}
    dy = torch.randn(7, 3, 5).to(dtype)
    results = []
    for layer, leaf in zip((bn.eval(), plain.eval()), leaves, strict=True):
        y = layer(leaf)
        results.append([y, *torch.autograd.grad(y, (leaf, layer.weight, layer.bias), dy)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in bn.state_dict().items())


def test_without_running_statistics_evaluation_has_no_groups():
    bn = BatchNorm(3, track_running_stats=False, virtual_batch_size=2)
    x = torch.randn(8, 3, 5)
    check_against = oracle.step(torch.zeros(8, 3, 5), x, size=2)
    assert (abs(oracle.wide(bn(x)) - check_against["y"].value) <= 8 * 2.0**-24 * 8).all()
    assert torch.equal(bn.eval()(x), batch_norm(x, None, None, bn.weight, bn.bias, True))


def test_a_frozen_layer_has_no_groups():
    from batchnorm import freeze

    bn, x = BatchNorm(3, virtual_batch_size=2), torch.randn(8, 3)
    freeze(bn, affine=False)
    assert torch.equal(bn(x), batch_norm(x, torch.zeros(3), torch.ones(3), bn.weight, bn.bias))
    assert bn.num_batches_tracked == 0


def test_what_raises_afterwards_has_changed_nothing():
    def fails(y):
        raise ValueError

    bn = BatchNorm(3, activation=fails, virtual_batch_size=2)
    with pytest.raises(ValueError):  # noqa: PT011
        bn(torch.randn(6, 3))
    assert bn.num_batches_tracked == 0
    assert torch.equal(bn.running_mean, torch.zeros(3))


def test_same_bits_again():
    for threads in (1, 2):
        torch.set_num_threads(threads)
        if native.MISSING is None:
            native.use(serial_elements=0)
        for shape in ((64, 10), (9, 16, 50), (20, 3, 7)):
            x, dy = torch.randn(shape), torch.randn(shape)
            first = None
            for _ in range(4):
                leaf, weight = x.clone().requires_grad_(), torch.ones(shape[1], requires_grad=True)
                mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
                y = batch_norm(leaf, mean, var, weight, training=True, virtual_batch_size=4)
                results = [y.detach(), mean, var, *torch.autograd.grad(y, (leaf, weight), dy)]
                first = first or results
                assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_checkpointing_counts_once():
    for reentrant in (True, False):
        net = torch.nn.Sequential(torch.nn.Linear(3, 3), BatchNorm(3, virtual_batch_size=2))
        twin = torch.nn.Sequential(torch.nn.Linear(3, 3), BatchNorm(3, virtual_batch_size=2))
        twin.load_state_dict(net.state_dict())
        x, dy = torch.randn(7, 3)[:6], torch.randn(6, 3)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        twin(leaves[0]).backward(dy)
        y = torch.utils.checkpoint.checkpoint(net, leaves[1], use_reentrant=reentrant)
        y.backward(dy)
        assert torch.equal(leaves[0].grad, leaves[1].grad)
        for name, value in twin.state_dict().items():
            assert torch.equal(net.state_dict()[name], value)
        assert net[1].num_batches_tracked == 1


# --- sequences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu", torch.nn.Softmax(-1), torch.nn.PReLU(4)])
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_groups_of_a_packed_sequence_are_of_sequences(activation, channel_dim, is_sorted):
    """As if padded, masked, cut, and packed again."""
    lengths = torch.tensor([2, 6, 4, 3, 2])
    lengths = lengths.sort(descending=True).values if is_sorted else lengths
    x, residual = torch.randn(2, 5, 6, 4)
    pack = lambda t: pack_padded_sequence(  # noqa: E731
        t, lengths, batch_first=True, enforce_sorted=is_sorted
    )
    options = {"virtual_batch_size": 2, "momentum": None}
    bn = BatchNorm(4, channel_dim=channel_dim, activation=activation, **options)
    on_padded = BatchNorm(4, channel_dim=-1, **options)
    if isinstance(activation, str):
        on_padded.activation = activation
    torch.nn.init.uniform_(bn.weight, 0.5, 1.5)
    on_padded.load_state_dict(bn.state_dict(), strict=False)
    mask = torch.arange(6) < lengths[:, None]
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    # Once with a NaN where a sequence has ended, which a pack does not hold.
    packed, skip = pack(leaves[0]), pack(residual)
    padded = torch.where(mask[..., None], leaves[1], torch.nan)
    y = bn(packed, residual=skip)
    z = pack(on_padded(padded, mask, residual))
    assert isinstance(y, PackedSequence)
    want = activation(z.data) if callable(activation) else z.data
    assert torch.equal(y.data, want)
    assert torch.equal(y.batch_sizes, packed.batch_sizes)
    if not is_sorted:
        assert torch.equal(y.unsorted_indices, packed.unsorted_indices)
    dy = torch.randn(y.data.shape)
    grads = [
        torch.autograd.grad(out, (leaf, layer.weight), dy)
        for out, leaf, layer in ((y.data, leaves[0], bn), (want, leaves[1], on_padded))
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert torch.equal(bn.running_mean, on_padded.running_mean)
    assert torch.equal(bn.running_var, on_padded.running_var)
    assert bn.num_batches_tracked == 1
    # The running statistics are those of all rows; evaluation has no groups.
    f = oracle.forward(packed.data)
    assert (abs(oracle.wide(bn.running_var) - f.unbiased) <= 2.0**-22 * f.unbiased).all()
    plain = BatchNorm(4, activation=activation)
    plain.load_state_dict(bn.state_dict())
    assert torch.equal(bn.eval()(packed).data, plain.eval()(packed).data)


def test_packed_sequences_with_more_axes():
    lengths = torch.tensor([3, 1, 2])
    x = torch.randn(3, 3, 4, 5)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    mask = (torch.arange(3) < lengths[:, None])[..., None]
    for channel_dim, channels in ((1, 4), (-2, 4), (2, 5), (-1, 5)):
        bn = BatchNorm(channels, channel_dim=channel_dim, virtual_batch_size=2)
        axis = channel_dim + 1 if channel_dim > 0 else channel_dim
        twin = BatchNorm(channels, channel_dim=axis, virtual_batch_size=2)
        want = pack_padded_sequence(twin(x, mask), lengths, batch_first=True, enforce_sorted=False)
        assert torch.equal(bn(packed).data, want.data)
        assert torch.equal(bn.running_var, twin.running_var)


def test_packed_sequences_that_cannot_be():
    lengths = torch.tensor([1, 3])
    packed = pack_padded_sequence(
        torch.randn(2, 3, 4), lengths, batch_first=True, enforce_sorted=False
    )
    for bn, words in [
        (BatchNorm(4, virtual_batch_size=1), "1 in group 0 of 2"),
        (BatchNorm(5, virtual_batch_size=1), "expected 5 channels"),
        (BatchNorm(4, virtual_batch_size=1, channel_dim=3), "channel axis 3"),
        (BatchNorm(4, virtual_batch_size=1, channel_dim=-3), "channel axis -3"),
    ]:
        with pytest.raises(InputError, match=words):
            bn(packed)
        assert bn.num_batches_tracked == 0
        assert torch.equal(bn.running_var, torch.ones(bn.num_features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_group_of_padding_stays_in_range(kernels, dtype):
    """Variance 1 where nothing counts: divided by √eps, 1000 would leave half precision."""
    x = torch.full((4, 3, 2), 1000.0, dtype=dtype)
    x[:2] = torch.randn(2, 3, 2, dtype=dtype)
    mask = torch.tensor([True, True, False, False])[:, None].expand(4, 2)
    y = batch_norm(x, None, None, training=True, mask=mask, virtual_batch_size=2)
    torch.testing.assert_close(y[2:], (x[2:].double() / math.sqrt(1 + 1e-5)).to(dtype))


def test_groups_of_one_value_are_refused_compiled_too():
    bn, x = BatchNorm(3, virtual_batch_size=2), torch.randn(5, 3)
    for run in (bn, torch.compile(bn, backend="eager")):
        with pytest.raises(Exception, match="weight of 1 in group 2 of 3"):
            run(x)
    assert bn.num_batches_tracked == 0
