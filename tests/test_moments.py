"""Moments against the oracle, and the invariances that make merging exact."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from batchnorm import InputError, Moments

# float64: u = 2^-53. Each of n sums errs by at most (n-1)·u relative to the sum of magnitudes, and
# torch's pairwise sums by far less; n <= 500 here. 64 u covers both sums; measured
# worst, over the cases below: 31 u.
ROUNDING = 64 * 2.0**-53

LAYOUTS = {
    "dense": ((40, 5), None),
    "sequence": ((6, 5, 9), None),
    "image": ((4, 5, 6, 7), None),
    "channels_last": ((4, 5, 6, 7), torch.channels_last),
    "volume": ((2, 5, 3, 4, 5), None),
}


def data(layout, dtype, offset, scale):
    shape, memory_format = LAYOUTS[layout]
    x = (torch.randn(shape, dtype=torch.float64) * scale + offset).to(dtype)
    return x if memory_format is None else x.to(memory_format=memory_format)


def assert_moments(m: Moments, x, mask=None, channel_dim=1):
    count, mean, var, _, _ = oracle.moments(x, mask, channel_dim)
    reach = abs(oracle.wide(x)[~torch.isnan(x).numpy()]).max()
    assert m.count.item() == pytest.approx(float(count), rel=ROUNDING)
    assert (abs(oracle.wide(m.mean) - mean) <= ROUNDING * reach).all()
    # The variance feels the mean's error e only as e², and its own rounding.
    bound = ROUNDING * var + (ROUNDING * reach) ** 2
    assert (abs(oracle.wide(m.variance()) - var) <= bound).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_offset_spread_dtype_and_layout(layout, dtype, offset, scale):
    x = data(layout, dtype, offset, scale)
    if not x.isfinite().all():
        pytest.skip("beyond float16's range")
    assert_moments(Moments.of(x), x)


@pytest.mark.parametrize("channel_dim", [0, 1, 2, -1, -2])
def test_any_channel_axis(channel_dim):
    x = torch.randn(4, 5, 6, dtype=torch.float64) + 10
    assert_moments(Moments.of(x, channel_dim=channel_dim), x, channel_dim=channel_dim)


@pytest.mark.parametrize("shape", [(4, 6), (4, 1), (1, 6), (6,), (1,)])
@pytest.mark.parametrize("kind", ["bool", "weights", "counts"])
def test_mask_broadcasts_and_weighs(shape, kind):
    x = torch.randn(4, 5, 6) + 3
    mask = {"bool": torch.rand(shape) > 0.4, "weights": torch.rand(shape) * 3}.get(
        kind, torch.randint(0, 3, shape)
    )
    mask.reshape(-1)[0] = 2
    assert_moments(Moments.of(x, mask), x, mask)


def test_what_the_mask_leaves_out_may_hold_anything():
    x = torch.randn(8, 3, 5)
    mask = torch.rand(8, 5) > 0.5
    clean = Moments.of(x, mask)
    for poison in (torch.nan, torch.inf, -torch.inf, 3e38):
        dirty = torch.where(mask[:, None], x, poison)
        m = Moments.of(dirty, mask)
        assert torch.equal(m.mean, clean.mean)
        assert torch.equal(m.m2, clean.m2)


def test_a_weight_of_two_is_two_elements():
    x = torch.randn(7, 3)
    weights = torch.tensor([1, 2, 0, 3, 1, 1, 2])
    repeated = Moments.of(x.repeat_interleave(weights, 0))
    weighted = Moments.of(x, weights)
    torch.testing.assert_close(weighted.mean, repeated.mean, rtol=ROUNDING, atol=ROUNDING)
    for correction in (0, 1):
        torch.testing.assert_close(
            weighted.variance(correction), repeated.variance(correction), rtol=ROUNDING, atol=0
        )


def test_variance_by_hand():
    m = Moments.of(torch.tensor([[1.0], [2.0], [3.0], [6.0]]))
    assert (m.count.item(), m.mean.item(), m.m2.item()) == (4, 3, 14)
    assert m.variance().item() == 14 / 4
    assert m.variance(correction=1).item() == 14 / 3
    one = Moments.of(torch.tensor([[5.0]]))
    assert one.variance().item() == 0
    assert one.variance(correction=1).isnan()


def test_nothing_is_a_value():
    nothing = Moments.of(torch.empty(0, 3))
    assert nothing.count.item() == 0
    assert torch.equal(nothing.mean, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(nothing.m2, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(nothing.variance(), torch.zeros(3, dtype=torch.float64))
    assert nothing.variance(correction=1).isnan().all()
    masked = Moments.of(torch.full((4, 3), torch.nan), torch.zeros(4, dtype=torch.bool))
    assert torch.equal(masked.mean, nothing.mean)
    some = Moments.of(torch.randn(9, 3) * 1e5)
    for pooled in (some.merge(nothing), nothing.merge(some), Moments.merge_all([nothing, some])):
        assert torch.equal(pooled.count, some.count)
        assert torch.equal(pooled.mean, some.mean)
        assert torch.equal(pooled.m2, some.m2)
    assert torch.equal(nothing.merge(nothing).mean, nothing.mean)


def test_nan_in_the_data_reaches_its_channel_only():
    x = torch.randn(6, 3)
    x[2, 1] = torch.nan
    m = Moments.of(x)
    assert m.mean.isnan().tolist() == [False, True, False]
    assert m.m2.isnan().tolist() == [False, True, False]


values = st.lists(st.floats(-1e6, 1e6, allow_nan=False, width=32), min_size=1, max_size=40)


def assert_same(a: Moments, b: Moments, reach: float):
    """Equal to float64 rounding: of the sums, and of the mean at the data's own magnitude."""
    assert a.count.item() == b.count.item()
    torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=ROUNDING * reach)
    n = a.count.item()
    torch.testing.assert_close(
        a.m2, b.m2, rtol=ROUNDING, atol=n * (ROUNDING * reach) ** 2 + ROUNDING * 1e-300
    )


@given(values, st.data())
def test_any_split_and_order_gives_the_same(numbers, draw):
    x = torch.tensor(numbers)[:, None]
    reach = max(map(abs, numbers))
    whole = Moments.of(x)
    order = draw.draw(st.permutations(range(len(numbers))))
    assert_same(Moments.of(x[list(order)]), whole, reach)
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(numbers)), max_size=6)))
    parts = [Moments.of(part) for part in torch.tensor_split(x[list(order)], cuts)]
    assert_same(Moments.merge_all(parts), whole, reach)
    one_by_one = parts[0]
    for part in parts[1:]:
        one_by_one = one_by_one.merge(part)
    assert_same(one_by_one, whole, reach)


@given(values, st.floats(-1e6, 1e6, width=32), st.sampled_from([-4.0, 0.5, 2.0, 1024.0]))
def test_shift_and_scale(numbers, shift, scale):
    """mean(ax + b) = a·mean(x) + b and m2(ax + b) = a²·m2(x)."""
    x = torch.tensor(numbers, dtype=torch.float64)[:, None]
    moved = Moments.of(scale * x + shift)
    m = Moments.of(x)
    reach = abs(scale) * max(map(abs, numbers)) + abs(shift)
    expected = Moments(m.count, scale * m.mean + shift, scale**2 * m.m2)
    # scale·x + shift is itself rounded, by u·reach an element, which m2 feels at first order.
    n = len(numbers)
    error = ROUNDING * reach
    torch.testing.assert_close(moved.mean, expected.mean, rtol=0, atol=error)
    slack = 2 * error * (n * expected.m2.item()) ** 0.5 + n * error**2
    torch.testing.assert_close(moved.m2, expected.m2, rtol=ROUNDING, atol=slack)


@pytest.mark.parametrize(
    ("x", "mask", "channel_dim", "words"),
    [
        (torch.randn(4), None, 0, r"rank 2.*axis 0, got torch.float32 of shape \(4,\)"),
        (torch.tensor(1.0), None, 0, r"got torch.float32 of shape \(\)"),
        (torch.randn(4, 3), None, 2, r"axis 2, got torch.float32 of shape \(4, 3\)"),
        (torch.randn(4, 3), None, -3, "axis -3"),
        (torch.zeros(4, 3, dtype=torch.long), None, 1, "got torch.int64"),
        (torch.randn(4, 3, 5), torch.ones(4, 3), 1, r"\(4, 5\).*axis 1; got \(4, 3\)"),
        (torch.randn(4, 3, 5), torch.ones(4, 1, 5), 1, r"got \(4, 1, 5\)"),
        (torch.randn(4, 3, 5), torch.ones(4, 5, dtype=torch.complex64), 1, "torch.complex64"),
    ],
)
def test_bad_input_is_refused(x, mask, channel_dim, words):
    with pytest.raises(InputError, match=words):
        Moments.of(x, mask, channel_dim=channel_dim)


def test_bad_merges_are_refused():
    with pytest.raises(InputError, match="at least one"):
        Moments.merge_all([])
    with pytest.raises(InputError, match="same channels"):
        Moments.of(torch.randn(4, 3)).merge(Moments.of(torch.randn(4, 2)))


def test_float64_data_have_a_mean_that_is_correctly_rounded():
    """No float64 is nearer to the mean than ours, to 1 %; the plain sum is off by several."""
    x = torch.randn(20_000, 5, dtype=torch.float64) + 1e6
    _, mean, _, _, _ = oracle.moments(x)
    half_a_step = torch.finfo(torch.float64).eps * 2.0**19 / 2  # 2^19 <= 1e6 < 2^20
    assert (abs(oracle.wide(Moments.of(x).mean) - mean) <= 1.01 * half_a_step).all()
    assert (abs(oracle.wide(x.mean(0)) - mean) > 1.01 * half_a_step).any()
