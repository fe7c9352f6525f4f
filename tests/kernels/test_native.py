"""The C++ kernels in each set of instructions: values at every edge of a block, for every layout.

The rest of the suite meets them too, in the best instructions that the processor has. Memory that
malloc gives is full of NaN here (conftest.py), so an element that no kernel wrote shows.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from batchnorm import BatchNorm, batch_norm
from batchnorm.kernels import native

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))

LEVELS = range(native.LEVELS)
EPS = 1e-5
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _best_afterwards():
    yield
    native.use()
    torch.set_num_threads(1)


def arranged(x, layout):
    """The same values, differently in memory."""
    if layout == "reversed":  # all axes, channels last among them
        return x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1])
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "gaps":
        return torch.stack([x, x.new_full(x.shape, torch.nan)], -1)[..., 0]
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x.contiguous()


LAYOUTS = ["contiguous", "channels_last", "reversed", "gaps", "expanded"]


def check(x, *, channel_dim=1, mask=None, residual=None, activation=None, training=True):
    """One step, forward and backward, against the oracle: a few roundings of each term.

    Every element of y has at most 8 of float32 (float64, for float64), every one of dx too, and one
    more when it is stored; see test_numerics.py, whose bounds these are with a mask and a residual.
    """
    channels = x.shape[channel_dim]
    parameters = torch.float64 if x.dtype is torch.float64 else torch.float32
    weight, bias = torch.randn(2, channels, dtype=parameters)
    # A variance may be too large for float32.
    kept = torch.float64 if x.abs().max() > 1e15 else torch.float32
    buffers = torch.randn(channels, dtype=kept), torch.rand(channels, dtype=kept) + 0.5
    old = buffers[0].clone(), buffers[1].clone()
    dy = torch.randn(x.shape).to(x.dtype)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    if residual is not None:
        leaves.append(residual.detach().requires_grad_())
    options = {"mask": mask, "activation": activation, "channel_dim": channel_dim, "eps": EPS}
    y = batch_norm(
        leaves[0], *buffers, *leaves[1:3], training, residual=(*leaves, None)[3], **options
    )
    assert y.grad_fn.backend == "native"
    assert y.dtype is x.dtype
    grads = torch.autograd.grad(y, leaves, dy)

    options |= {"given": None if training else old, "residual": residual}
    f = oracle.forward(x, weight, bias, **options)
    dx, d_weight, d_bias, dz = oracle.backward(dy, x, weight, bias, **options)
    stored = torch.finfo(x.dtype).eps / 2
    compute = 2.0**-53 if x.dtype is torch.float64 else 2.0**-24
    column = lambda v: oracle.wide(v)[:, None]  # noqa: E731
    up = lambda rows: oracle.unrows(rows, x.shape, channel_dim)  # noqa: E731
    s = 1 / (f.var + EPS) ** 0.5
    rho = column(1 + abs(f.mean) * s) if x.dtype is torch.float64 else 1
    added = 0 if residual is None else oracle.rows(abs(oracle.wide(residual)), channel_dim)
    y_size = abs(column(weight)) * (abs(f.x_hat) + rho) + abs(column(bias)) + added
    flow = oracle.rows(abs(oracle.wide(dz)), channel_dim)
    n = flow.shape[1]
    lean, tilt = flow.sum(1), (flow * (abs(f.x_hat) + rho)).sum(1)
    pull = f.weights / f.count * (column(lean) + abs(f.x_hat) * column(tilt)) * training
    dx_size = abs(column(weight)) * column(s) * (flow + pull) * rho
    smallest = float(torch.finfo(x.dtype).smallest_normal) * torch.finfo(x.dtype).eps

    def within(name, got, want, roundings, size, storing):
        bound = 1.01 * storing * abs(want) + (roundings * compute + n * 2.0**-53) * size + smallest
        error = abs(oracle.wide(got) - want)
        assert (error <= bound).all(), f"{name}: {(error / bound).max():.3g} times the bound"

    within("y", y, f.y, 8, up(y_size), stored)
    within("dx", grads[0], dx, 8, up(dx_size), stored)
    storing = torch.finfo(parameters).eps / 2
    folded = 7 if x.dtype.itemsize == 2 else 0  # eight terms are added in float32 first
    within("d_weight", grads[1], d_weight, 4 + folded, tilt, storing)
    within("d_bias", grads[2], d_bias, 1 + folded, lean, storing)
    if residual is not None:
        within("d_residual", grads[3], dz, 1, abs(dz), stored)
    want = oracle.running(*old, f, 0.1) if training else old
    sizes = abs(oracle.wide(old[0])) + abs(f.mean) + 1 / s, oracle.wide(old[1]) + 1 / s**2 * n
    for name, got, new, size in zip(("mean", "var"), buffers, want, sizes, strict=True):
        within(f"running {name}", got, oracle.wide(new), 0, size, torch.finfo(kept).eps / 2)


EDGES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65]
CASES = st.tuples(
    st.integers(2, 9) | st.sampled_from(EDGES[1:]),  # N
    st.integers(1, 9) | st.sampled_from(EDGES),  # C
    st.none() | st.integers(1, 20) | st.sampled_from([*EDGES, 127, 129]),  # S
)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@given(
    shape=CASES,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    activation=st.sampled_from([None, "relu", "leaky_relu"]),
    extras=st.sampled_from(["", "mask", "weights", "residual", "residual and mask"]),
    training=st.booleans(),
    stream=st.booleans(),
    offset=st.sampled_from([0.0, 3.0, 100.0]),
    seed=st.integers(0, 2**20),
)
def test_values(
    level, threads, shape, dtype, layout, activation, extras, training, stream, offset, seed
):
    torch.manual_seed(seed)
    native.use(level, serial_elements=0, stream_bytes=0 if stream else -1)
    torch.set_num_threads(threads)
    shape = tuple(size for size in shape if size is not None)
    x = arranged((torch.randn(shape) + offset).to(dtype), layout)
    rest = shape[:1] + shape[2:]
    mask = None
    if "mask" in extras:
        mask = torch.rand(rest) > 0.3
        mask.view(-1)[:2] = True
    if extras == "weights":
        mask = torch.rand(rest) * 3 * (torch.rand(rest) > 0.3)
        mask.view(-1)[:2] = 1.5
    residual = torch.randn(shape).to(dtype) if "residual" in extras else None
    check(x, mask=mask, residual=residual, activation=activation, training=training)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [
        ((40, 3), 1),  # columns of several rows in one
        ((200, 80), 1),  # rows, shared among the threads
        ((20, 700), 1),  # columns, shared among the threads
        ((5, 6, 12), 1),  # runs shorter than a register's loop: columns of (C, S)
        ((3, 16, 49), 1),  # blocks of channels, each thread its own
        ((2, 3, 900), 1),  # few channels: threads share runs
        ((1, 1, 4000), 1),  # one run: threads share its elements
        ((2, 5, 3, 4, 6), 2),
        ((6, 50, 20), -1),
        ((600, 7, 3), 0),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_way_through_memory(level, threads, shape, channel_dim, dtype):
    native.use(level, serial_elements=0)
    torch.set_num_threads(threads)
    x = (torch.randn(shape) * 2 + 5).to(dtype)
    rest = [size for axis, size in enumerate(shape) if axis != channel_dim % len(shape)]
    for mask in (None, torch.rand(rest) > 0.3):
        for stream in (-1, 0):
            native.use(level, serial_elements=0, stream_bytes=stream)
            check(x, channel_dim=channel_dim, mask=mask, activation="relu")
            residual = torch.randn(shape).to(dtype)
            check(x, channel_dim=channel_dim, mask=mask, residual=residual, activation="leaky_relu")


@pytest.mark.parametrize(
    "shape", [(64, 10), (300, 80), (20, 700), (4, 6, 12), (3, 16, 50), (2, 900)]
)
def test_same_call_same_bits_and_levels_agree_to_rounding(shape):
    x, dy = torch.randn(shape), torch.randn(shape)

    def run():
        leaf, weight = x.clone().requires_grad_(), torch.ones(shape[1], requires_grad=True)
        mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
        y = batch_norm(leaf, mean, var, weight, None, True, activation="relu")
        return [y.detach(), mean, var, *torch.autograd.grad(y, (leaf, weight), dy)]

    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results = []
        for level in LEVELS:
            native.use(level, serial_elements=0)
            first = run()
            for _ in range(3):
                assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
            results.append(first)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                # Sums of up to 300 terms of size 3, and a few float32 roundings of each.
                torch.testing.assert_close(a, b, rtol=0, atol=8 * 2.0**-24 * max(1, a.abs().max()))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(50, 3), (20, 3, 64), (4, 3, 9)])
def test_far_shifts_and_extreme_numbers(level, shape):
    """A first element far from the rest, which the moments are shifted by; float's last decades."""
    native.use(level)
    for first in (1e6, 1e15, 1e30, 3e38):
        x = torch.randn(shape)
        x[0, 1, ...] = first
        check(x)
    for scale in (1e-30, 1e-18, 1e18, 1e30, 1e36, 1e38):
        check(torch.rand(shape) * scale)
        check(-torch.rand(shape) * scale, activation="relu", mask=torch.ones(shape[0], *shape[2:]))
    check(torch.full(shape, 3.7))
    check(torch.full(shape, 1e30))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("shape", [(40, 5), (4, 5, 40), (4, 5, 9)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_non_finite_elements_stay_in_their_channel(level, value, activation, shape, with_residual):
    native.use(level)
    x, dy, residual = torch.randn(3, *shape)
    x[1, 2, ...] = value
    others = [0, 1, 3, 4]
    leaves = [x.clone().requires_grad_()]
    clean = [x[:, others].clone().requires_grad_()]
    if with_residual:
        leaves.append(residual.clone().requires_grad_())
        clean.append(residual[:, others].clone().requires_grad_())
    bn = BatchNorm(5, activation=activation)
    with pytest.warns(match="in 1 of 5 channels"):
        y = bn(leaves[0], residual=(*leaves, None)[1])
    want = BatchNorm(4, activation=activation)(clean[0], residual=(*clean, None)[1])
    torch.testing.assert_close(y[:, others], want)
    grads = torch.autograd.grad(y, leaves, dy)
    for got, expected in zip(grads, torch.autograd.grad(want, clean, dy[:, others]), strict=True):
        torch.testing.assert_close(got[:, others], expected)
    # As torch's own layers: NaN is passed on, through a relu too.
    assert y[:, 2].isnan().all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(40, 5), (4, 5, 40), (4, 5, 9)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_what_a_mask_leaves_out_may_be_anything(level, shape, with_residual):
    native.use(level)
    rest = shape[:1] + shape[2:]
    mask = torch.rand(rest) > 0.4
    out = ~mask.unsqueeze(1).expand(shape)
    # σ is 0.1: what is left out may be finite, and infinite once it is normalised.
    x, dy = 0.1 * torch.randn(shape), torch.randn(shape).masked_fill(out, 0.0)
    residual = torch.randn(shape).requires_grad_() if with_residual else None
    results = []
    for junk in (0.0, torch.nan, torch.inf, 1e38):
        leaf = x.masked_fill(out, junk).requires_grad_()
        bn = BatchNorm(5, activation="leaky_relu")
        y = bn(leaf, mask, residual)
        leaves = [leaf, bn.weight, bn.bias, *([residual] if with_residual else [])]
        grads = [g[~out] if g.dim() > 1 else g for g in torch.autograd.grad(y, leaves, dy)]
        results.append([y.detach()[~out], *grads, bn.running_mean, bn.running_var])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_an_infinite_element_counts_once(level):
    """The last register of a run or a row overlaps the one before: 0 · inf must not be added."""
    native.use(level)
    for n in range(3, 40):
        x = torch.ones(1, 1, n)
        x[0, 0, n // 3] = torch.inf
        weight = torch.ones(1, requires_grad=True)
        y = batch_norm(x, torch.zeros(1), torch.ones(1), weight)
        assert torch.autograd.grad(y, weight, torch.ones_like(y))[0].tolist() == [torch.inf]
        rows, weights = torch.ones(2, n), torch.ones(n, requires_grad=True)
        rows[0, n // 3] = torch.inf
        y = batch_norm(rows, torch.zeros(n), torch.ones(n), weights)
        (d_weight,) = torch.autograd.grad(y, weights, torch.ones_like(y))
        assert d_weight[n // 3] == torch.inf
        assert d_weight.isfinite().sum() == n - 1


def test_conversions_of_half_precision_are_torchs():
    """Every float16 and bfloat16 number there is, by mean 0 and variance 1."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x.reshape(-1, 4)
        for level in LEVELS:
            native.use(level)
            y = batch_norm(x, torch.zeros(4), torch.full((4,), 1.0 - 2.0**-20), eps=2.0**-20)
            assert torch.equal(y.nan_to_num(7.0), x.nan_to_num(7.0))
            # And rounding, to a few more digits than are stored.
            scale = torch.full((4,), 1.0 + 2.0**-7 + 2.0**-13)
            y = batch_norm(x, torch.zeros(4), torch.full((4,), 1.0 - 2.0**-20), scale, eps=2.0**-20)
            want = (x.float() * scale).to(dtype)
            assert torch.equal(y.nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.slow
@pytest.mark.usefixtures("clean_memory")
@pytest.mark.parametrize("shape", [(2**25 + 1, 64), (1, 2, 2**30 + 8)])
def test_more_elements_than_31_bits_count(shape):
    # Zeros that nobody has written take no memory; the one element that is not lies at the end.
    x = torch.zeros(shape, dtype=torch.bfloat16)
    x.view(-1)[-1] = 1.0
    y = batch_norm(x, None, None, training=True, eps=1e-12).view(-1)
    n = x.numel() // shape[1]
    var = 1 / n - 1 / n**2 + 1e-12
    want = torch.tensor([-1 / n, 1 - 1 / n]).double() / math.sqrt(var)
    before = -1 - shape[1] if len(shape) == 2 else -2  # of the same channel
    torch.testing.assert_close(y[[before, -1]], want.bfloat16())
    assert y[0] == 0  # another channel, all zeros


@pytest.mark.parametrize("level", LEVELS)
def test_a_far_first_element_of_a_long_channel(level):
    """Its square cancels; what the sums of two million equal terms have lost must not show."""
    native.use(level)
    x = torch.tensor([0.1, 0.3])[torch.randint(0, 2, (2_000_000,))]
    x[0] = 93.7
    mean, var = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    batch_norm(
        x[:, None].expand(-1, 20).contiguous()[:, :1], mean, var, training=True, momentum=1.0
    )
    wide = x.double()
    assert abs(mean - wide.mean()) <= 1e-10
    assert abs(var / wide.var() - 1) <= 1e-8


def test_bytes_of_a_mask_other_than_one():
    mask = torch.tensor([0, 255, 3, 1, 0, 255], dtype=torch.uint8).view(torch.bool)
    x = torch.arange(6.0).reshape(6, 1) ** 2
    mean, var = torch.zeros(1), torch.zeros(1)
    batch_norm(x, mean, var, training=True, momentum=1.0, mask=mask)
    picked = x[[1, 2, 3, 5]]
    assert (mean.item(), var.item()) == (picked.mean().item(), picked.var().item())
