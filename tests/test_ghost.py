"""Ghost batches: values of every shape, layout and dtype are those of a loop over the groups."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm import InputError, batch_norm
from batchnorm.ghost import Groups
from batchnorm.kernels import blocked, native
from ghost_steps import check
from interpreted import too_large

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


@too_large
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


@too_large
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
