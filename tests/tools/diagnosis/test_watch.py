"""What is seen of what comes into layers, and how many independent values it is worth."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from batchnorm import BatchNorm
from batchnorm.tools.diagnosis.inputs import effective_values
from batchnorm.tools.diagnosis.watch import OneValueError, Watch, given
from oracle import moments


def watched(layer, *batches, deep=True):
    """What is seen of a layer; a batch is a list of the arguments of each call."""
    watch = Watch([layer], deep=deep)
    with watch.hooks():
        for calls in batches:
            watch.next_batch()
            for arguments in calls:
                layer(*arguments) if type(arguments) is tuple else layer(arguments)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    return watch.seen[layer]


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.BatchNorm1d(3), (8, 3), 1),
        (nn.BatchNorm1d(3), (8, 3, 5), 1),
        (nn.BatchNorm2d(3), (8, 3, 4, 5), 1),
        (BatchNorm(3, channel_dim=-1), (8, 4, 5, 3), 3),
        (BatchNorm(3, channel_dim=0), (3, 8, 5), 0),
    ],
)
def test_moments_of_calls_and_of_samples(layer, shape, axis):
    x, y = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    seen = watched(layer.double(), [x, y], [y])
    assert [len(calls) for calls in seen.calls] == [2, 1]
    for found, given_ in zip(seen.every_call(), (x, y, y), strict=True):
        count, mean, var, _, _ = moments(given_, channel_dim=axis)
        assert float(found.count) == count
        assert np.allclose(found.mean, mean.astype(float), rtol=1e-12)
        assert np.allclose(found.variance(), var.astype(float), rtol=1e-12)
    everything = np.concatenate(
        [np.moveaxis(z.numpy(), axis, 0).reshape(3, -1) for z in (x, y, y)], 1
    )
    assert np.allclose(seen.population().mean, everything.mean(1), rtol=1e-12, atol=1e-15)
    assert np.allclose(seen.population().variance(), everything.var(1), rtol=1e-12)
    assert float(seen.batches()[0].count) == 2 * float(seen.batches()[1].count)
    assert seen.values() == float(seen.calls[0][0].count)
    # Samples are those of the first call; where channels come first, all is one.
    first = np.moveaxis(x.numpy(), axis, 1) if axis else x.numpy()[None]
    means = first.reshape(*first.shape[:2], -1).mean(2)
    assert [float(part.count) for part in seen.samples] == [len(means)] * 2
    assert np.allclose(seen.samples[0].mean, means.mean(0), rtol=1e-12, atol=1e-15)
    assert np.allclose(seen.samples[0].m2, means.var(0) * len(means), rtol=1e-12, atol=1e-15)


def test_the_highest_output_of_each_channel():
    layer = nn.BatchNorm1d(3).eval()
    x, y = torch.randn(8, 3, 5), torch.randn(8, 3, 5)
    seen = watched(layer, [x], [y])
    expected = torch.maximum(layer(x).amax((0, 2)), layer(y).amax((0, 2)))
    assert torch.equal(seen.highest, expected.detach())


def test_masks_leave_out_what_does_not_count():
    layer = BatchNorm(2).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]]).bool()
    x[~mask[:, None].expand_as(x)] = torch.nan
    seen = watched(layer, [(x, mask)])
    assert seen.values() == 6
    means = np.stack([x.numpy()[k][:, mask[k]].mean(1) for k in (0, 1, 3)])
    assert float(seen.samples[0].count) == 3  # the third has nothing that counts
    assert np.allclose(seen.samples[0].mean, means.mean(0), rtol=1e-12)
    assert seen.padding == []
    by_name = given(layer, (), {"x": x, "mask": mask})
    assert torch.equal(by_name[1], mask)


def test_packed_sequences_and_names():
    layer = BatchNorm(2)
    x = torch.randn(3, 4, 2)
    packed = pack_padded_sequence(x, torch.tensor([4, 2, 1]), batch_first=True)
    seen = watched(layer, [packed])
    assert seen.values() == 7
    assert torch.equal(given(nn.BatchNorm1d(2), (), {"input": x})[0], x)
    assert given(nn.BatchNorm1d(2), (), {}) == (None, None)


def test_a_failed_batch_is_forgotten():
    layer = nn.BatchNorm1d(2)
    watch = Watch([layer])
    x = torch.randn(5, 2)
    with watch.hooks():
        watch.next_batch()
        layer(x)
        watch.next_batch()
        layer(x)  # before it fails
        with pytest.raises(OneValueError) as caught:
            layer(x[:1])
        assert caught.value.layer is layer
        watch.drop_batch()
        watch.next_batch()
        layer(x)
    seen = watch.seen[layer]
    assert (len(seen.calls), len(seen.samples)) == (2, 2)
    watched(layer.eval(), [x[:1]])  # evaluation does not mind


def test_batches_that_are_not_finite_are_left_out():
    x = torch.randn(5, 2)
    bad = x.clone()
    bad[2, 1] = torch.inf
    seen = watched(nn.BatchNorm1d(2), [x], [bad], [x])
    assert [len(seen.every_call()), len(seen.batches()), len(seen.finite_samples())] == [3, 2, 2]
    assert torch.allclose(seen.population().mean, x.double().mean(0))
    empty = watched(nn.BatchNorm1d(2))
    assert (empty.population(), empty.values()) == (None, None)
    assert watched(nn.BatchNorm1d(2), [x], deep=False).samples == []


# --- how many independent values -----------------------------------------------------------------


def autoregressive(samples, steps, correlation, generator):
    """x_t = ρ x_(t−1) + noise, stationary with variance 1: the mean of T has a known variance."""
    x = np.empty((samples, steps))
    x[:, 0] = generator.normal(size=samples)
    for t in range(1, steps):
        noise = generator.normal(size=samples)
        x[:, t] = correlation * x[:, t - 1] + math.sqrt(1 - correlation**2) * noise
    return x


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("size", [16, 1])
def test_effective_values_of_a_process_with_known_correlation(correlation, size):
    """Var(mean of T) = (1 + 2 Σ (1 − k/T) ρᵏ) / T; batches of one sample are no exception."""
    steps, channels, batches = 40, 24, 1600 // size
    generator = np.random.default_rng(0)
    x = autoregressive(batches * size * channels, steps, correlation, generator)
    x = torch.as_tensor(x.reshape(batches, size, channels, steps))
    seen = watched(nn.BatchNorm1d(channels).double(), *([batch] for batch in x))
    lags = np.arange(1, steps)
    var = (1 + 2 * ((1 - lags / steps) * correlation**lags).sum()) / steps
    # 1600 samples know a variance to √(2/1600), 3.5 %; the median over 24 channels better.
    assert effective_values(seen) == pytest.approx(min(size / var, size * steps), rel=0.04)


def test_effective_values_of_rows_are_their_number():
    x = torch.randn(3, 7, 5)
    assert effective_values(watched(nn.BatchNorm1d(5), *([batch] for batch in x))) == 7
    # Two calls a batch are two statistics of 7 each.
    assert effective_values(watched(nn.BatchNorm1d(5), [x[0], x[1]])) == 7


def test_effective_values_where_nothing_is_known():
    one = torch.randn(1, 5, 9)
    assert effective_values(watched(nn.BatchNorm1d(5), [one])) == 1
    constant = torch.zeros(4, 5, 9)
    assert effective_values(watched(nn.BatchNorm1d(5), [constant])) == 4
    assert effective_values(watched(nn.BatchNorm1d(5))) == 0
    # A sample that is all alike is worth one value.
    alike = torch.randn(4000, 5, 1).expand(-1, -1, 9)
    assert effective_values(watched(nn.BatchNorm1d(5), [alike])) == pytest.approx(4000, rel=0.01)
