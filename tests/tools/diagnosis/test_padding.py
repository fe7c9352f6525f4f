"""Padding: what it does to the statistics, both ends, and what only looks like it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from batchnorm.tools.diagnosis.padding import padding_in

N, C, L = 32, 4, 20


def sequences(lengths, channels=C, length=L, pad=0.5, left=False):
    """(N, C, L) and which positions are real."""
    x = torch.randn(len(lengths), channels, length, dtype=torch.float64)
    real = torch.arange(length) < torch.as_tensor(lengths)[:, None]
    real = real.flip(1) if left else real
    return torch.where(real[:, None], x, pad), real


def expected(x, real):
    """Share, shift and ratio in NumPy."""
    rows, real = x.numpy().transpose(0, 2, 1).reshape(-1, x.shape[1]), real.numpy().reshape(-1)
    alone = rows[real]
    shift = np.sqrt((((rows.mean(0) - alone.mean(0)) ** 2) / alone.var(0)).mean())
    ratio = np.exp(np.log(rows.var(0) / alone.var(0)).mean())
    return 1 - real.mean(), shift, ratio


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("axis", [1, 2])
def test_padding_in_sequences(left, axis):
    lengths = torch.randint(3, L + 1, (N,))
    lengths[:3] = torch.tensor([L, 3, 3])
    x, real = sequences(lengths, left=left)
    found = padding_in(x if axis == 1 else x.transpose(1, 2), axis)
    share, shift, ratio = expected(x, real)
    # The longest padding is that of one sample only: nothing is like it.
    assert found.share == pytest.approx(share, abs=3 / N)
    assert found.mean_shift == pytest.approx(shift, rel=0.1)
    assert found.var_ratio == pytest.approx(ratio, rel=0.1)
    assert found.lengths > 2


def test_two_lengths_to_the_last_digit():
    x, real = sequences([L] * 20 + [12] * 12)
    found = padding_in(x, 1)
    share, shift, ratio = expected(x, real)
    assert found.share == pytest.approx(share, rel=1e-12)
    assert found.mean_shift == pytest.approx(shift, rel=1e-9)
    assert found.var_ratio == pytest.approx(ratio, rel=1e-9)
    assert found.lengths == 2


def test_padding_that_differs_from_position_to_position():
    """As behind an embedding of positions."""
    x, real = sequences([L] * 20 + [12] * 12)
    x = torch.where(real[:, None], x, torch.randn(C, L, dtype=torch.float64))
    assert padding_in(x, 1).share == pytest.approx(1 - float(real.double().mean()), rel=1e-12)


def test_an_end_mark_before_the_padding_is_no_padding():
    lengths = torch.randint(2, L + 1, (64,))
    x, real = sequences(lengths)
    for row, length in zip(x, lengths, strict=True):
        row[:, length - 1] = 3.0
    found = padding_in(x, 1)
    # Where few are padded, as many end: those positions are left alone.
    assert 0.5 * (1 - real.double().mean()) < found.share <= 1 - real.double().mean()


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_padding_among_rows(share):
    x = torch.randn(200, C, dtype=torch.float64)
    real = torch.rand(200) > share
    x[~real] = torch.tensor([0.1, 0.0, 2.0, 0.0], dtype=torch.float64)
    found = padding_in(x, 1)
    rows, kept = x.numpy(), x.numpy()[real.numpy()]
    shift = np.sqrt((((rows.mean(0) - kept.mean(0)) ** 2) / kept.var(0)).mean())
    assert found.share == pytest.approx(1 - float(real.double().mean()), rel=1e-12)
    assert found.mean_shift == pytest.approx(shift, rel=1e-9)
    ratio = np.exp(np.log(rows.var(0) / kept.var(0)).mean())
    assert found.var_ratio == pytest.approx(ratio, rel=1e-9)
    assert found.lengths == 0


def test_padding_among_words_that_repeat():
    vocabulary = torch.randn(51, 8)
    words = torch.randint(1, 51, (300,))
    words[torch.rand(300) < 0.4] = 0
    assert padding_in(vocabulary[words], 1).share == pytest.approx(
        float((words == 0).double().mean())
    )


# --- what only looks like it ---------------------------------------------------------------------

SHAPES = st.sampled_from(
    [(8, 3), (64, 1), (64, 8), (2, 2), (1, 4), (12, 3, 5), (4, 1, 30), (1, 2, 3)]
)


@given(st.integers(0, 10_000), SHAPES)
def test_random_data_have_none(seed, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    assert padding_in(x, 1) is None


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 8), st.integers(2, 80))
def test_rows_of_categories_have_none(seed, columns, kinds, size):
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.rand(kinds, generator=generator) ** 3 + 0.01
    x = torch.multinomial(frequencies.expand(size, -1), columns, True, generator=generator)
    assert padding_in(x.double(), 1) is None
    assert padding_in(functional.one_hot(x, kinds).flatten(1).double(), 1) is None


@given(st.integers(0, 10_000), st.integers(1, 8), st.floats(0.02, 0.98))
def test_rows_behind_a_relu_have_none(seed, channels, share):
    """Rows that are 0 throughout, which narrow layers often have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(100, channels, generator=generator)
    common = torch.randn(100, 1, generator=generator)
    assert padding_in((x + 2 * common + 2 * share - 1).relu(), 1) is None


@given(st.integers(0, 10_000), st.integers(1, 3), st.floats(0.01, 0.6))
def test_sequences_in_which_little_happens_have_none(seed, channels, share):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(64, channels, 24, generator=generator) < share).double()
    found = padding_in(x, 1)
    assert found is None or found.share < 0.05  # what diagnose does not speak of


def test_images_between_black_borders_have_none():
    x = torch.zeros(64, 1, 16, 16)
    for k in range(64):
        a, b = torch.randint(0, 9, (2,)).tolist()
        x[k, :, a : a + 8, b : b + 8] = torch.rand(8, 8)
    assert padding_in(x[:, 0], 1) is None  # lines as steps
    assert padding_in(x, 1) is None  # images are not looked at


@pytest.mark.parametrize("end", [0, -1])
def test_a_word_that_all_begin_or_end_with_is_none(end):
    vocabulary = torch.randn(52, C)
    for seed in range(20):
        torch.manual_seed(seed)
        words = torch.multinomial((1 / torch.arange(1.0, 51)).expand(N, -1), 12, replacement=True)
        words[:, end] = 51
        found = padding_in(vocabulary[words].transpose(1, 2), 1)
        assert found is None or found.share < 0.05


def test_too_little_to_tell():
    assert padding_in(torch.zeros(8, 3), 1) is None
    assert padding_in(torch.zeros(8, 3, 5), 1) is None
    assert padding_in(torch.randn(8, 3), 0) is None  # channels first: there are no samples
    x = torch.randn(20, 3)
    x[:5] = 1.0
    assert padding_in(x, 1) is not None
    x[4] = 2.0  # four alike may be chance
    assert padding_in(x, 1) is None
    # Constant where it is real: nothing to measure by.
    x, _ = sequences([L] * 20 + [12] * 12)
    assert padding_in(torch.where(x == 0.5, x, 1.0), 1) is None
