"""Micro-batches within one block are one batch to the running statistics, and to them only."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import oracle
from batchnorm import (
    BatchNorm,
    NonFiniteWarning,
    Renorm,
    accumulate_statistics,
    batch_norm,
    freeze,
)

pytestmark = pytest.mark.usefixtures("kernels")

FULL = Renorm(r_max=2, d_max=1, r_steps=(0, 0), d_steps=(0, 0))
MODELS = {
    "ours": lambda **options: BatchNorm(3, **options),
    "ghost": lambda **options: BatchNorm(3, virtual_batch_size=4, **options),
    "renorm": lambda **options: BatchNorm(3, renorm=FULL, **options),
    "torch's": lambda **options: nn.BatchNorm1d(3, **options),
}
EVERY = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
SPLIT = [10, 2, 4]


def counts(model):
    return [int(b) for name, b in model.named_buffers() if name.endswith("tracked")]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def accumulate(model, batches):
    with accumulate_statistics(model):
        for batch in batches:
            model(batch)


def expect(layer, old, batches, momentum=0.1, **options):
    """One update by the union of the batches, from the oracle; float64 buffers, to its rounding."""
    f = oracle.forward(torch.cat(batches), **options)
    for got, want in zip(
        (layer.running_mean, layer.running_var), oracle.running(*old, f, momentum), strict=True
    ):
        assert abs(oracle.wide(got) - want).max() < 1e-13


@EVERY
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_one_update_by_the_union(make, momentum):
    layer = make(momentum=momentum, dtype=torch.float64)
    for step in range(3):
        old = layer.running_mean.clone(), layer.running_var.clone()
        batches = (torch.randn(sum(SPLIT), 3, dtype=torch.float64) * 2 + 3 * step).split(SPLIT)
        with accumulate_statistics(layer):
            for batch in batches:
                layer(batch)
            assert torch.equal(layer.running_mean, old[0])
        expect(layer, old, batches, 1 / (step + 1) if momentum is None else momentum)
        assert layer.num_batches_tracked == step + 1


@pytest.mark.parametrize("weighted", [False, True])
def test_masked_micro_batches(weighted):
    layer = BatchNorm(3, dtype=torch.float64)
    x, old = torch.randn(16, 3, 5, dtype=torch.float64), (torch.zeros(3), torch.ones(3))
    mask = torch.rand(16, 5) * 3 if weighted else torch.rand(16, 5) > 0.4
    mask[0] = 0
    poisoned = x.masked_fill((mask == 0)[:, None], torch.nan)
    with accumulate_statistics(layer):
        for part, part_mask in zip(poisoned.split(SPLIT), mask.split(SPLIT), strict=True):
            layer(part, part_mask)
    expect(layer, old, [x], mask=mask)


@EVERY
def test_outputs_and_gradients_are_as_without(make):
    model = make()
    twin = copy.deepcopy(model)
    x, cotangent = torch.randn(2, 6, 3)
    results = []
    for net in (model, twin):
        leaf = x.clone().requires_grad_()
        with accumulate_statistics(model):
            y = net(leaf)
        results.append((y, *torch.autograd.grad(y, (leaf, *net.parameters()), cotangent)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@given(st.lists(st.integers(2, 9), min_size=1, max_size=6), st.floats(-1e3, 1e3), st.booleans())
def test_any_split_gives_the_same(split, offset, own):
    """Uneven micro-batches in any order: float64 rounds at 1e-16 of the offset, and of m2."""
    generator = torch.Generator().manual_seed(sum(split))
    x = torch.randn(sum(split), 3, dtype=torch.float64, generator=generator) + offset
    make = MODELS["ours" if own else "torch's"]
    layer = make(dtype=torch.float64, momentum=1.0)
    with accumulate_statistics(layer):
        for batch in x.split(split)[::-1]:
            layer(batch)
    torch.testing.assert_close(layer.running_mean, x.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_var, x.var(0), rtol=1e-12, atol=0)
    assert layer.num_batches_tracked == 1


def fail_within(model, x):
    with accumulate_statistics(model):
        model(x)
        raise ZeroDivisionError


@EVERY
def test_an_exception_leaves_no_update_and_everything_restored(make):
    model = nn.Sequential(make())
    before, x = state(model), torch.randn(6, 3)
    with pytest.raises(ZeroDivisionError):
        fail_within(model, x)
    assert unchanged(model, before)
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks
    twin = copy.deepcopy(model)
    twin(x)
    with accumulate_statistics(model):
        pass
    assert unchanged(model, before)
    model(x)
    assert unchanged(model, state(twin))


@EVERY
def test_a_batch_that_is_refused_does_not_count(make):
    model = nn.Sequential(make(dtype=torch.float64))
    x = torch.randn(6, 3, dtype=torch.float64)
    with accumulate_statistics(model):
        model(x)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(x[:1] + 1e6)
    expect(model[0], (torch.zeros(3), torch.ones(3)), [x])
    assert counts(model) == [1]


@EVERY
def test_a_block_within_a_block_hands_over(make):
    """One update when the outer one ends; what an exception leaves is not in it."""
    layer = make(dtype=torch.float64)
    one, two, three, lost = torch.randn(4, 6, 3, dtype=torch.float64)
    with accumulate_statistics(layer):
        layer(one)
        with accumulate_statistics(layer):
            layer(two)
        assert counts(layer) == [0]
        with pytest.raises(ZeroDivisionError):
            fail_within(layer, lost)
        layer(three)
    expect(layer, (torch.zeros(3), torch.ones(3)), [one, two, three])
    assert counts(layer) == [1]


@pytest.mark.parametrize("kind", ["ours", "torch's"])
def test_a_layer_called_twice_takes_in_both(kind):
    layer = MODELS[kind](dtype=torch.float64)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x, second = torch.randn(6, 3, dtype=torch.float64), []
    model[1].register_forward_hook(lambda *args: second.append(args[2].detach()))
    with accumulate_statistics(model):
        model(x)
    expect(layer, (torch.zeros(3), torch.ones(3)), [x, *second])
    assert counts(layer) == [1]


@pytest.mark.parametrize("kind", ["ours", "torch's"])
def test_evaluating_and_frozen_layers_take_nothing_in(kind):
    model = nn.Sequential(*(MODELS[kind]() for _ in range(3)))
    model[0].eval()
    freeze(model[1])
    before = state(model[:2])
    with accumulate_statistics(model):
        model(torch.randn(6, 3) + 5)
        freeze(model[2])
        model(torch.randn(6, 3) + 9)
    assert unchanged(model[:2], before)
    assert counts(model) == [0, 0, 1]
    assert model[2].training
    # After the first: the frozen one normalises by mean 0 and variance 1, so by 5 and its scale.
    torch.testing.assert_close(model[2].running_mean, torch.full((3,), 0.5), rtol=0, atol=0.15)


@pytest.mark.parametrize("kind", ["ours", "torch's"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_nan_is_refused_by_its_channel_with_a_warning(kind, momentum):
    """In a plain average by all channels, as without accumulation."""
    model = nn.Sequential(nn.Identity(), MODELS[kind](momentum=momentum, dtype=torch.float64))
    x = torch.randn(8, 3, dtype=torch.float64)
    words = r"layer '1', BatchNorm.* in " + (r"1 of 3 channels \(1\)" if momentum else "3 of 3")
    x[5, 1] = torch.nan
    with pytest.warns(NonFiniteWarning, match=words):
        accumulate(model, x.split(4))
    taken = [0, 2] if momentum else []
    f = oracle.forward(x[:, [0, 2]])
    means, variances = oracle.running(torch.zeros(2), torch.ones(2), f, 0.1)
    expected_mean, expected_var = torch.zeros(3).double(), torch.ones(3).double()
    for index, channel in enumerate(taken):
        expected_mean[channel] = float(means[index])
        expected_var[channel] = float(variances[index])
    torch.testing.assert_close(model[1].running_mean, expected_mean, rtol=0, atol=1e-15)
    torch.testing.assert_close(model[1].running_var, expected_var, rtol=0, atol=1e-15)
    assert counts(model) == [1 if momentum else 0]


@pytest.mark.parametrize("kind", ["ours", "torch's"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_each_micro_batch_once(kind, reentrant):
    layer = MODELS[kind](dtype=torch.float64)
    model = nn.Sequential(layer, nn.Tanh())
    batches = torch.randn(sum(SPLIT), 3, dtype=torch.float64).split(SPLIT)
    with accumulate_statistics(model):
        for batch in batches:
            leaf = batch.clone().requires_grad_()
            checkpoint(model, leaf, use_reentrant=reentrant).backward(torch.randn_like(batch))
    expect(layer, (torch.zeros(3), torch.ones(3)), batches)
    assert counts(layer) == [1]


def test_empty_micro_batches():
    """Nothing beside others, and nothing at all alone."""
    layer = BatchNorm(3, dtype=torch.float64)
    x, nothing = torch.randn(6, 3, dtype=torch.float64), torch.empty(0, 3, dtype=torch.float64)
    before = state(layer)
    with warnings.catch_warnings(), accumulate_statistics(layer):
        warnings.simplefilter("error")
        layer(nothing)
    assert unchanged(layer, before)
    with accumulate_statistics(layer):
        layer(nothing)
        layer(x)
        layer(nothing)
    expect(layer, (torch.zeros(3), torch.ones(3)), [x])


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3, dtype=torch.float64)

    def forward(self, x):
        return self.bn(input=x)


def test_torchs_layer_called_by_keyword():
    model, x = ByKeyword(), torch.randn(6, 3, dtype=torch.float64)
    with accumulate_statistics(model):
        model(x)
        model(x + 1)
    expect(model.bn, (torch.zeros(3), torch.ones(3)), [x, x + 1])


def test_an_interrupt_leaves_torchs_layer_as_it_was():
    class Interrupted(nn.BatchNorm1d):
        def forward(self, x):
            raise KeyboardInterrupt

    layer = Interrupted(3)
    with pytest.raises(KeyboardInterrupt), accumulate_statistics(layer):
        layer(torch.randn(6, 3))
    assert layer.track_running_stats is True
    assert not layer._forward_hooks


def test_a_copy_made_within_is_on_its_own():
    layer = BatchNorm(3)
    with accumulate_statistics(layer):
        other = copy.deepcopy(layer)
        other(torch.randn(6, 3))
        assert counts(other) == [1]
    assert counts(layer) == [0]


@pytest.mark.parametrize("kind", ["ours", "torch's"])
def test_half_precision_has_wide_moments(kind):
    """A mean of 100 whose micro-batches differ by less than bfloat16 resolves."""
    layer = MODELS[kind](momentum=1.0)
    x = (torch.randn(64, 3) + 100).bfloat16()
    with accumulate_statistics(layer):
        for batch in x.split(16):
            layer(batch)
    torch.testing.assert_close(layer.running_mean, x.double().mean(0).float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(layer.running_var, x.double().var(0).float(), rtol=2e-7, atol=0)


def test_renorm_draws_toward_the_statistics_before_the_step():
    """All micro-batches of a step toward the same: they are updated at its end."""
    layer = BatchNorm(3, renorm=FULL)
    first, second = torch.randn(2, 6, 3) + 1
    expected = batch_norm(second, torch.zeros(3), torch.ones(3), training=True, renorm=FULL)
    with accumulate_statistics(layer):
        layer(first)
        torch.testing.assert_close(layer(second), expected, rtol=0, atol=1e-6)
