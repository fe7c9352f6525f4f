"""The operators by themselves, with groups: where each one's numbers stand; what is refused."""

import pytest
import torch

import oracle
from batchnorm.kernels import calls, native

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))

EPS = 1e-5
CASES = [
    # shape, channel axis, samples in a group, threads
    ((7, 3, 5), 1, 2, 1),
    ((7, 3, 5), 1, 3, 2),
    ((8, 3), 1, 4, 1),
    ((9, 40), 1, 2 + 1, 2),
    ((6, 4, 5, 3), -1, 4, 1),  # channels last in memory
    ((6, 1, 8), 1, 1, 2),  # a single channel: all memory is one run
    ((40, 2, 33), 1, 1, 2),  # more groups than threads: each on its own
]


@pytest.fixture(autouse=True)
def _best_afterwards():
    yield
    native.use()
    torch.set_num_threads(1)


def flags(size, *more):
    return sum(more) + (size << calls.GROUP_BIT)


def whole(x, size, channel, mask=None, weight=None, bias=None, residual=None, activation=0):
    return native.forward(
        *(x, weight, bias, residual, mask, None, None, None, 0.1, EPS, channel),
        flags(size, calls.TRAINING, calls.KEEP, activation),
    )


def wanted_statistics(x, size, channel, mask=None):
    """Those of the groups, one after the other, and of all."""
    mask = [None] * len(x.split(size)) if mask is None else mask.squeeze(channel).split(size)
    parts = [
        oracle.moments(part, m, channel)[1:3] for part, m in zip(x.split(size), mask, strict=True)
    ]
    of_all = None if mask[0] is None else torch.cat(mask)
    parts.append(oracle.moments(x, of_all, channel)[1:3])
    return torch.stack(
        [torch.cat([torch.from_numpy(p[k].astype(float)) for p in parts]) for k in range(2)]
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "channel", "size", "threads"), CASES)
def test_statistics_of_the_groups_stand_before_those_of_all(
    shape, channel, size, threads, dtype, masked
):
    torch.set_num_threads(threads)
    native.use(serial_elements=0)
    # Groups whose means differ: the variance of all has a part between them.
    x = torch.randn(shape) + torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    x = x.to(dtype)
    mask = None
    if masked:
        rest = list(shape)
        rest[channel] = 1
        mask = torch.rand(rest) > 0.3
        for group in mask.split(size):
            group.reshape(-1)[:2] = True
            group[(0,) * len(rest)] = group[(-1,) * len(rest)] = True
    want = wanted_statistics(x, size, channel, mask)
    y, statistics, count, refused = whole(x, size, channel, mask)
    assert refused == 0
    assert y.shape == x.shape
    assert count == (x.numel() // x.shape[channel] if mask is None else mask.sum())
    torch.testing.assert_close(statistics, want, rtol=1e-12, atol=1e-12)
    by_itself, count_again, served = native.moments(x, mask, channel, flags(size))
    assert served == 0
    assert count_again == count
    assert torch.equal(by_itself, statistics)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", None])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("shape", "channel", "size", "threads"), CASES)
def test_each_group_by_its_own_parameters(shape, channel, size, threads, own, activation):
    """By given statistics, backward by its sums or in one; as single calls, group by group."""
    torch.set_num_threads(threads)
    native.use(serial_elements=0)
    x, dy, residual = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    channels, number = x.shape[channel], -(-shape[0] // size)
    weight, bias = torch.randn(2, number * channels if own else channels).double()
    act = calls.ACTIVATIONS[activation]
    y, statistics, count, refused = whole(x, size, channel, None, weight, bias, residual, act)
    assert refused == 0
    per_group = statistics[:, : number * channels]
    given, _, _, served = native.forward(
        *(x, weight, bias, residual, None, *(s.contiguous() for s in per_group), None),
        *(0.0, EPS, channel, flags(size, act)),
    )
    assert served == 0
    assert torch.equal(given, y)
    want = calls.WANT_X | calls.WANT_PARAMETERS | calls.WANT_RESIDUAL | calls.TRAINING | act
    tensors = dy, x, y, statistics, weight, bias, None
    dx, dz, d_weight, d_bias, served = native.backward(
        *tensors, None, count, EPS, channel, flags(size, want)
    )
    assert served == 0
    assert d_weight.shape == d_bias.shape == weight.shape
    sums, served = native.backward_reduce(*tensors, EPS, channel, flags(size, act))
    assert served == 0
    assert sums.shape == (2, number * channels)

    of = lambda v, k: v[k * channels : (k + 1) * channels] if own else v  # noqa: E731
    dz = dy if dz is None else dz
    total = torch.zeros(2, channels).double()
    for k, part in enumerate(x.split(size)):
        here = slice(k * size, (k + 1) * size)
        g, b = of(weight, k), of(bias, k)
        f = oracle.step(
            *(dy[here], part, g, b),
            residual=residual[here],
            activation=activation,
            channel_dim=channel,
        )
        n = x.numel() / channels
        for got, name in ((y[here], "y"), (dx[here], "dx"), (dz[here], "d_residual")):
            error = abs(oracle.wide(got) - f[name].value)
            assert (error <= (16 + n) * 2.0**-53 * f[name].size + 1e-300).all(), name
        for row, name in ((0, "d_bias"), (1, "d_weight")):
            mine = sums[row, k * channels : (k + 1) * channels]
            bound = (16 + n) * 2.0**-53 * f[name].size
            assert (abs(oracle.wide(mine) - f[name].value) <= bound).all(), name
            total[row] += mine
            if own:
                got = of((d_bias, d_weight)[row], k)
                assert (abs(oracle.wide(got) - f[name].value) <= bound).all(), name
    if not own:
        torch.testing.assert_close(torch.stack([d_bias, d_weight]), total, rtol=1e-13, atol=1e-13)
    # Given its own sums it gives the same again; given others, it is linear in them.
    base = *tensors, sums, count, EPS, channel, flags(size, want & ~calls.WANT_PARAMETERS)
    again = native.backward(*base)
    torch.testing.assert_close(again[0], dx, rtol=1e-13, atol=1e-13)
    none = native.backward(*tensors, torch.zeros_like(sums), *base[8:])[0]
    twice = native.backward(*tensors, 2 * sums, *base[8:])[0]
    torch.testing.assert_close(twice - none, 2 * (dx - none), rtol=1e-12, atol=1e-12)
    assert (dx - none).abs().max() > 1e-3


def test_half_a_parameter_of_each():
    """γ of all groups, β of each, and the reverse."""
    x, dy = torch.randn(2, 6, 3, 4).double()
    for many in (0, 1):
        parameters = [torch.randn(3).double(), torch.randn(3).double()]
        parameters[many] = torch.randn(9).double()
        y, statistics, count, _ = whole(x, 2, 1, None, *parameters)
        _, _, d_weight, d_bias, served = native.backward(
            *(dy, x, None, statistics, *parameters, None, None, count, EPS, 1),
            flags(2, calls.TRAINING, calls.WANT_PARAMETERS),
        )
        assert served == 0
        assert [len(d_weight), len(d_bias)] == [len(p) for p in parameters]
        full = [p if len(p) == 9 else p.repeat(3) for p in parameters]
        want, *_ = whole(x, 2, 1, None, *full)
        assert torch.equal(y, want)
        d_full = native.backward(
            *(dy, x, None, statistics, *full, None, None, count, EPS, 1),
            flags(2, calls.TRAINING, calls.WANT_PARAMETERS),
        )[2:4]
        for got, each in zip((d_weight, d_bias), d_full, strict=True):
            want = each if len(got) == 9 else each.view(3, 3).sum(0)
            torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_a_group_as_large_as_the_batch_is_none():
    x = torch.randn(6, 3, 4)
    plain = whole(x, 0, 1)
    for size in (6, 7, 2**50):
        for got, want in zip(whole(x, size, 1)[:3], plain[:3], strict=True):
            assert got == want if isinstance(got, float) else torch.equal(got, want)
    assert plain[1].shape == (2, 3)


def test_what_is_not_served_is_left_untouched():
    mean, var, counter = torch.zeros(3), torch.ones(3), torch.tensor(0)

    def call(x, size, mask=None, channel=1, weight=None):
        training = flags(size, calls.TRAINING)
        arguments = weight, None, None, mask, mean, var, counter, 0.1, EPS, channel
        return native.forward(x, *arguments, training)[-1]

    few = torch.ones(6, 1, 4)
    few[2:4] = 0
    one = few.clone()
    one[2, 0, 0] = 1.5
    refused = [
        call(torch.randn(6, 3), 1),  # one value in each
        call(torch.randn(5, 3), 2),  # in the last
        call(torch.randn(6, 3, 4), 2, few),
        call(torch.randn(6, 3, 4), 2, one),
        call(torch.randn(3, 6, 4), 2, channel=0),
        call(torch.randn(4, 3, 6).permute(2, 1, 0), 2),  # samples do not lie together
        call(torch.randn(6, 3, 4), 2, weight=torch.ones(6)),
        call(torch.randn(6, 3, 4), 2, weight=torch.ones(12)),
    ]
    assert refused == [calls.NOT_SERVED] * len(refused)
    assert native.moments(torch.randn(5, 3), None, 1, flags(2))[-1] == calls.NOT_SERVED
    assert native.moments(torch.randn(6, 3, 4), few, 1, flags(2))[-1] == calls.NOT_SERVED
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))
    assert counter == 0
    assert call(torch.randn(6, 3, 4), 2) == 0
    assert counter == 1


def test_gradients_that_are_not_served():
    x, dy = torch.randn(2, 6, 3, 4)
    _, statistics, count, _ = whole(x, 2, 1)

    def gradient(sums=None, weight=None, statistics=statistics):
        return native.backward(
            *(dy, x, None, statistics, weight, None, None, sums, count, EPS, 1),
            flags(2, calls.TRAINING, calls.WANT_X),
        )[-1]

    rows = torch.zeros(2, 12, dtype=torch.float64)
    for changed in (
        {"sums": rows},  # of all groups together there are none
        {"sums": rows[:, :3].contiguous()},
        {"weight": torch.ones(6)},
        {"statistics": statistics[:, :9].contiguous()},
        {"statistics": statistics[:, :3].contiguous()},
    ):
        assert gradient(**changed) == calls.NOT_SERVED, changed
    assert gradient() == gradient(sums=rows[:, :9].contiguous()) == 0
