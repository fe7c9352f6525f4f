"""The operators by themselves: what they refuse, untouched, and the halves of a call."""

import math

import pytest
import torch

from batchnorm.kernels import calls, native
from batchnorm.moments import Moments

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))

EPS = 1e-5
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _best_afterwards():
    yield
    native.use()
    torch.set_num_threads(1)


def test_what_is_not_served_is_left_untouched():
    mean, var, count = torch.zeros(3), torch.ones(3), torch.tensor(0)
    x = torch.randn(6, 3)

    def call(**changed):
        arguments = {
            "x": x,
            "weight": None,
            "bias": None,
            "residual": None,
            "mask": None,
            "running_mean": mean,
            "running_var": var,
            "counter": count,
            "momentum": 0.1,
            "eps": 1e-5,
            "channel_dim": 1,
            "flags": calls.TRAINING,
        } | changed
        return native.forward(**arguments)[-1]

    refused = [
        {"x": torch.randn(3)},
        {"x": torch.randn(0, 3)},
        {"x": torch.randn(1, 3)},
        {"x": torch.ones(6, 3, dtype=torch.int32)},
        {"x": torch.randn(6, 4)},
        {"channel_dim": 2},
        {"channel_dim": -3},
        {"eps": 0.0},
        {"eps": math.inf},
        {"eps": math.nan},
        {"momentum": 1.1},
        {"momentum": math.nan},
        {"momentum": -1.0, "counter": None},
        {"flags": calls.TRAINING | 3},
        {"weight": torch.ones(4)},
        {"bias": torch.ones(3, 1)},
        {"weight": torch.ones(6)[::2]},
        {"weight": torch.ones(3, dtype=torch.int64)},
        {"running_mean": None},
        {"running_var": None},
        {"running_mean": torch.zeros(4)},
        {"running_var": torch.ones(3, dtype=torch.bfloat16)},
        {"running_mean": None, "running_var": None, "flags": 0},
        {"counter": torch.tensor(0.0)},
        {"counter": torch.zeros(2, dtype=torch.int64)},
        {"residual": torch.randn(6, 2)},
        {"residual": torch.randn(6, 3).double()},
        {"mask": torch.zeros(6, 1)},
        {"mask": torch.full((6, 1), 0.3)},
        {"mask": -torch.ones(6, 1)},
        {"mask": torch.full((6, 1), math.nan)},
        {"mask": torch.full((6, 1), math.inf)},
        {"mask": torch.ones(6, 1, dtype=torch.int64)},
        {"mask": torch.ones(6)},
        {"mask": torch.ones(5, 1)},
    ]
    for changed in refused:
        assert call(**changed) == calls.NOT_SERVED, changed
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))
    assert count == 0
    assert call() == 0
    assert count == 1


def test_gradients_that_are_not_served():
    x, dy = torch.randn(2, 6, 3)
    _, statistics, count, _ = native.forward(
        *(x, *[None] * 7, 0.1, EPS, 1), calls.TRAINING | calls.KEEP
    )
    whole = {"y": None, "weight": None, "bias": None, "mask": None, "eps": EPS, "channel_dim": 1}
    whole |= {"x": x, "dy": dy, "statistics": statistics, "flags": calls.WANT_X}

    def gradient(**changed):
        return native.backward(**({"sums": None, "count": count} | whole | changed))[-1]

    def reduction(**changed):
        return native.backward_reduce(**(whole | changed))[-1]

    refused = [
        {"x": torch.ones(6, 3, dtype=torch.int32)},
        {"dy": torch.randn(6, 2)},
        {"dy": dy.double()},
        {"y": torch.randn(3, 6)},
        {"statistics": statistics.float()},
        {"statistics": statistics[0]},
        {"statistics": statistics[:, :2]},
        {"weight": torch.ones(2)},
        {"mask": torch.ones(5, 1)},
        {"eps": 0.0},
        {"channel_dim": 2},
        {"flags": 3},
    ]
    for changed in refused:
        assert gradient(**changed) == reduction(**changed) == calls.NOT_SERVED, changed
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for changed in (
        {"sums": sums.float()},
        {"sums": sums[:, :2]},
        {"sums": torch.zeros(3, 2, dtype=torch.float64).T},
        {"sums": sums[0]},
        {"flags": calls.WANT_RESIDUAL | calls.ACTIVATIONS["relu"]},  # but no y to tell its side
    ):
        assert gradient(**changed) == calls.NOT_SERVED, changed
    assert gradient() == gradient(sums=sums) == reduction() == 0
    for mask in (torch.zeros(6, 1), -torch.ones(6, 1), torch.ones(5, 1)):
        assert native.moments(x, mask, 1, 0)[-1] == calls.NOT_SERVED
    assert native.moments(x[:0], None, 1, 0)[-1] == calls.NOT_SERVED
    assert native.moments(x, None, 1, 0)[1:] == (6.0, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", calls.ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("length", "threads", "stream"), [(21, 1, -1), (40, 2, 0), (16, 3, 0)])
def test_halves_of_a_batch_are_the_whole(
    dtype, masked, activation, with_residual, length, threads, stream
):
    """Moments, normalise, reduce, gradient, each by itself: what synchronisation needs."""
    torch.set_num_threads(threads)
    native.use(serial_elements=0, stream_bytes=stream)
    x, residual, dy = (torch.randn(12, 5, length).to(dtype) for _ in range(3))
    weight, bias = torch.randn(2, 5, dtype=torch.float64 if dtype is DTYPES[1] else torch.float32)
    residual = residual if with_residual else None
    mask = (torch.rand(12, 1, length) > 0.3) if masked else None
    flags = calls.ACTIVATIONS[activation]
    eps, eps_of_terms = torch.finfo(dtype).eps, torch.finfo(weight.dtype).eps
    every = calls.TRAINING | calls.WANT_X | (calls.WANT_RESIDUAL if with_residual else 0)

    y, statistics, count, _ = native.forward(
        *(x, weight, bias, residual, mask, None, None, None, 0.1, EPS, 1),
        calls.TRAINING | calls.KEEP | flags,
    )
    saved = y if with_residual and activation else None
    dx, dz, d_weight, d_bias, _ = native.backward(
        *(dy, x, saved, statistics, weight, bias, mask, None, count, EPS, 1),
        every | calls.WANT_PARAMETERS | flags,
    )

    parts = [slice(0, 4), slice(4, 12)]
    of = lambda t, part: None if t is None else t[part]  # noqa: E731
    moments = []
    for part in parts:
        (mean, var), n, served = native.moments(x[part], of(mask, part), 1, 0)
        assert served == 0
        moments.append(Moments(mean.new_tensor(n), mean, var * n))
    total = moments[0].merge(moments[1])
    assert total.count == count
    given = torch.stack([total.mean, total.variance()])
    torch.testing.assert_close(given, statistics, rtol=1e-12, atol=1e-14)
    sums = 0
    for part in parts:
        half, none, _, served = native.forward(
            *(x[part], weight, bias, of(residual, part), None, *given, None, 0.0, EPS, 1), flags
        )
        assert none is None
        assert served == 0
        # A rounding or two of the largest terms, and one when it is stored.
        torch.testing.assert_close(half, y[part], rtol=eps, atol=4 * eps_of_terms)
        of_part, served = native.backward_reduce(
            *(dy[part], x[part], of(saved, part), given, weight, bias, of(mask, part), EPS, 1),
            flags,
        )
        assert served == 0
        sums = sums + of_part
    # Sums of 500 terms of size 1, of which eight at a time are added in float32 or none.
    close = {"rtol": 0, "atol": 500 * 8 * eps_of_terms}
    torch.testing.assert_close(sums[0].to(d_bias.dtype), d_bias, **close)
    torch.testing.assert_close(sums[1].to(d_weight.dtype), d_weight, **close)
    for part in parts:
        dx_part, dz_part, *none, served = native.backward(
            *(dy[part], x[part], of(saved, part), given, weight, bias, of(mask, part)),
            *(sums, count, EPS, 1, every | flags),
        )
        assert none == [None, None]
        assert served == 0
        size = dx.abs().max().item()
        torch.testing.assert_close(dx_part, dx[part], rtol=eps, atol=4 * size * eps_of_terms)
        writes = with_residual and (activation is not None or masked)
        assert (dz is not None) == (dz_part is not None) == writes
        if dz is not None:
            assert torch.equal(dz_part, dz[part])
