"""Output, gradients, running statistics and evaluation against the oracle, and against torch.

Every bound is derived from the unit roundoff u of the dtype that is rounded to. Four cases, told
apart by the backend that served:

native
    Moments and sums as the reference's, in float64. Elements in float32, centred, so that ρ below
    does not matter: y = (x − m)·s + c has two roundings, and m, s and c one each, of which m's is
    made good in c; dx = a·dz + (b·x̂ + c) has four, and x̂ the three of y. 8 u·(natural size) for
    both; dγ sums products with x̂: 4 u. In half precision the result is rounded once more, and dγ
    and dβ add eight terms in float32 first: 7 u more. A lane
    of a register adds up to n/8 float64 values one after the other: 128 roundings for n = 1024.
    With float64 elements ρ matters as it does for the reference.
triton
    Elements likewise; sums and statistics have roundings of float32 too. See triton_steps.py.
reference
    Everything is computed in float64 and rounded once, so an error is u·|result|, plus float64's
    own, which the offset ρ = |mean|/σ magnifies: 64·2⁻⁵³·(natural size)·(1 + ρ). Where the result
    is float64 too, the second term is all there is.
aten
    float32 throughout, for ρ ≤ 16 only: y = x·α + (β − mean·α) errs by a few u of each of its
    terms, and a dense sum of n ≤ 1024 values by up to √n·u = 32 u of its terms if roundings are
    independent. 64 u·(natural size) covers both; measured worst, over the cases below: 26 u.

The natural size of a result is the sum of the magnitudes of its terms, before they cancel.
"""

import pytest
import torch
from torch.nn import functional as F

import oracle
from batchnorm import BatchNorm, batch_norm
from triton_steps import ELEMENT, SUMS, roundoff

pytestmark = pytest.mark.usefixtures("kernels")

LAYOUTS = {
    "dense": ((32, 6), None),
    "limit": ((1024, 6), None),
    "tall": ((2048, 6), None),
    "sequence": ((6, 6, 9), None),
    "image": ((4, 6, 5, 7), None),
    "channels_last": ((4, 6, 5, 7), torch.channels_last),
    "volume": ((2, 6, 3, 4, 5), torch.channels_last_3d),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def make(layout, dtype, kind):
    """A batch of the given kind, parameters and a random cotangent."""
    shape, memory_format = LAYOUTS[layout]
    x = torch.randn(shape, dtype=torch.float64)
    if kind == "constant":
        x[:, ::2] = 3.7
    elif kind == "outlier":
        x.view(-1)[5] = 6e4 if dtype is torch.float16 else 1e18
    elif kind == "tiny":
        x = x * 1e-7 + 1e-6
    else:
        offset, scale = kind
        x = x * scale + offset
    x = x.to(dtype)
    if memory_format is not None:
        x = x.to(memory_format=memory_format)
    params = torch.float32 if dtype.itemsize == 2 else dtype
    weight, bias = torch.randn(6, dtype=params), torch.randn(6, dtype=params)
    return x, weight, bias, torch.randn(shape).to(dtype)


def run(function, x, weight, bias, dy):
    """y, dx, dγ, dβ, running mean and variance of one training step."""
    x, weight, bias = (t.detach().clone().requires_grad_() for t in (x, weight, bias))
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    mean, var = mean.detach(), var.detach()
    y = function(x, mean, var, weight, bias, True, 0.1, EPS)
    backend = getattr(y.grad_fn, "backend", None)
    grads = torch.autograd.grad(y, (x, weight, bias), dy)
    return backend, (y.detach(), *grads, mean, var)


def expected(x, weight, bias, dy, centred=False):
    """The same six from the oracle, each with the natural size of its error."""
    f = oracle.forward(x, weight, bias, eps=EPS)
    dx, d_weight, d_bias, _ = oracle.backward(dy, x, weight, bias, eps=EPS)
    mean, var = oracle.running(torch.zeros(6), torch.ones(6), f, 0.1)
    up = lambda r: oracle.unrows(r, x.shape, 1)  # noqa: E731
    column = lambda v: oracle.wide(v)[:, None]  # noqa: E731
    s = 1 / (f.var + EPS) ** 0.5
    rho = abs(f.mean) * s * (not centred)
    gamma = abs(column(weight))
    dz = oracle.rows(oracle.wide(dy), 1)
    n = dz.shape[1]
    lean = abs(dz).sum(1) / n
    tilt = abs(dz * f.x_hat).sum(1) / n
    y_size = gamma * (abs(f.x_hat) + 1 + column(rho)) + abs(column(bias))
    dx_size = gamma * column(s) * (abs(dz) + column(lean) + abs(f.x_hat) * column(tilt))
    dx_size = dx_size * (1 + column(rho))
    return [
        (f.y, up(y_size)),
        (dx, up(dx_size)),
        (d_weight, n * (tilt + lean * (1 + rho))),
        (d_bias, n * lean),
        (mean, 0.1 * abs(f.mean) * (not centred) + 0.1 / s),
        (var, 0.9 + 0.1 * (f.unbiased + EPS + (f.mean * 2.0**-53) ** 2)),
    ]


KINDS = [(offset, scale) for offset in (0.0, 1e2, 1e4, 1e6) for scale in (1e-3, 1.0, 1e3)]
NAMES = ["y", "dx", "d_weight", "d_bias", "running_mean", "running_var"]


@pytest.mark.parametrize("kind", [*KINDS, "constant", "outlier", "tiny"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_step(layout, dtype, kind):
    x, weight, bias, dy = make(layout, dtype, kind)
    if not x.isfinite().all():
        pytest.skip("beyond float16's range")
    backend, ours = run(batch_norm, x, weight, bias, dy)
    _, theirs = run(F.batch_norm, x, weight, bias, dy)
    centred = backend in ("native", "triton") and dtype is not torch.float64
    for name, got, torchs, (want, size) in zip(
        NAMES, ours, theirs, expected(x, weight, bias, dy, centred), strict=True
    ):
        u = roundoff(got.dtype)
        error = abs(oracle.wide(got) - want)
        if backend == "aten":
            bound = 64 * u * size
        elif backend == "native":
            folded = 7 if dtype.itemsize == 2 else 0
            roundings = {"y": 8, "dx": 8, "d_weight": 4 + folded, "d_bias": folded}.get(name, 0)
            compute = roundoff(torch.promote_types(x.dtype, torch.float32))
            bound = 1.01 * u * abs(want) + (roundings * compute + 128 * 2.0**-53) * size
        elif backend == "triton":
            roundings = SUMS if name.startswith("running") else ELEMENT + SUMS
            bound = 1.01 * u * abs(want) + roundings * 2.0**-24 * size
        else:
            bound = 1.01 * u * abs(want) + 64 * 2.0**-53 * size
        # The smallest step of the dtype, where a result is too small for relative precision.
        bound = bound + torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
        assert (error <= bound).all(), f"{name}: {(error / bound).max():.3g} times the bound"
        # No worse than torch, to within one rounding of the largest result, or of the spread σ
        # that a mean is summed over: where both round once, which of two neighbours is nearer is
        # chance.
        theirs_error = abs(oracle.wide(torchs) - want)
        if (theirs_error == theirs_error).all():
            largest = max(abs(want).max(), size.max() if name == "running_mean" else 0)
            assert error.max() <= theirs_error.max() + 2 * u * largest, name


@pytest.mark.parametrize("steps", [0, 1, 10])
@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
@pytest.mark.parametrize("kind", [(0.0, 1.0), (1e4, 1.0)], ids=str)
@pytest.mark.parametrize("layout", ["dense", "image", "channels_last"])
def test_running_statistics_and_evaluation(layout, kind, momentum, steps):
    x, weight, bias, dy = make(layout, torch.float32, kind)
    bn = BatchNorm(6, momentum=momentum, eps=EPS)
    with torch.no_grad():
        bn.gamma.copy_(weight)
        bn.beta.copy_(bias)
    mean, var = oracle.wide(torch.zeros(6)), oracle.wide(torch.ones(6))
    for step in range(steps):
        batch = make(layout, torch.float32, kind)[0]
        bn(batch)
        f = oracle.forward(batch, eps=EPS)
        mean, var = oracle.running(mean, var, f, 1 / (step + 1) if momentum is None else momentum)
    assert bn.num_batches_tracked.item() == steps
    # One rounding of the buffer a step; and the statistics themselves, within 64 u of σ (above).
    u = roundoff(torch.float32)
    assert (abs(oracle.wide(bn.running_mean) - mean) <= u * (steps * abs(mean) + 64)).all()
    assert (abs(oracle.wide(bn.running_var) - var) <= u * (steps + 64) * var).all()

    bn.eval()
    before = bn.running_mean.clone(), bn.running_var.clone(), bn.num_batches_tracked.clone()
    x.requires_grad_()
    y = bn(x)
    grads = torch.autograd.grad(y, (x, bn.weight, bn.bias), dy)
    given = before[:2]
    f = oracle.forward(x, weight, bias, eps=EPS, given=given)
    wanted = [f.y, *oracle.backward(dy, x, weight, bias, eps=EPS, given=given)[:3]]
    centred = abs(f.x_hat).max()
    rho = float(abs(before[0] / (before[1] + EPS).sqrt()).max())
    for got, want in zip((y, *grads), wanted, strict=True):
        # As above; sums over the batch accumulate up to n terms of size dy·x̂.
        size = 1 + centred + (rho if rho <= 16 else 0)
        size = size * max(1, abs(want).max()) * 2
        assert (abs(oracle.wide(got) - want) <= 64 * u * size).all()
    after = bn.running_mean, bn.running_var, bn.num_batches_tracked
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("mask_kind", [None, "bool", "weights"])
@pytest.mark.parametrize(("shape", "channel_dim"), [((16, 6), 1), ((4, 5, 6), -1), ((4, 6, 5), 1)])
@pytest.mark.parametrize("training", [True, False])
def test_options(shape, channel_dim, mask_kind, with_residual, activation, training):
    x, residual, dy = (torch.randn(shape) * 2 + 1 for _ in range(3))
    weight, bias = torch.randn(6), torch.randn(6)
    rest = [s for axis, s in enumerate(shape) if axis != channel_dim % len(shape)]
    mask = {None: None, "bool": torch.rand(rest) > 0.3, "weights": torch.rand(rest) * 3}[mask_kind]
    given = None if training else (torch.randn(6), torch.rand(6) + 0.5)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    y = batch_norm(
        x,
        *([t.clone() for t in given] if given else (None, None)),
        weight,
        bias,
        training,
        mask=mask,
        residual=residual if with_residual else None,
        activation=activation,
        channel_dim=channel_dim,
    )
    grads = torch.autograd.grad(y, leaves[: 3 + with_residual], dy)
    options = {
        "mask": mask,
        "residual": residual if with_residual else None,
        "activation": activation,
        "channel_dim": channel_dim,
        "given": given,
    }
    f = oracle.forward(x, weight, bias, **options)
    wanted = [f.y, *oracle.backward(dy, x, weight, bias, **options)]
    for got, want in zip((y, *grads), wanted, strict=False):
        error = abs(oracle.wide(got) - want)
        # Values are of size 10, sums of 20 terms of 200; where z is within rounding of 0 the
        # slope may be either, which these seeds do not meet.
        assert (error <= 64 * roundoff(torch.float32) * (10 + abs(want).max())).all()


def test_same_bits_again():
    for layout in LAYOUTS:
        x, weight, bias, dy = make(layout, torch.float32, (1.0, 1.0))
        first, second = (run(batch_norm, x, weight, bias, dy)[1] for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scale", [10.0, 1e-2])
def test_scale_of_the_input_does_not_matter(scale):
    """BN(a·x) = BN(x) up to eps, which is 1e-12 of the variance here."""
    x = torch.randn(64, 6, dtype=torch.float64)
    y = batch_norm(x, None, None, training=True, eps=1e-12)
    scaled = batch_norm(scale * x, None, None, training=True, eps=1e-12 * scale**2)
    torch.testing.assert_close(scaled, y, rtol=0, atol=1e-13)
