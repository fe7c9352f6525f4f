"""Paused layers normalise by the batch and touch nothing."""

import copy

import pytest
import torch
from torch import nn

from batchnorm import (
    BatchNorm,
    Renorm,
    accumulate_statistics,
    bank,
    forward_together,
    freeze,
    pause_statistics,
)

pytestmark = pytest.mark.usefixtures("kernels")

FULL = Renorm(r_max=2, d_max=1, r_steps=(0, 0), d_steps=(0, 0))
MODELS = {
    "ours": lambda: BatchNorm(3),
    "average": lambda: BatchNorm(3, momentum=None),
    "untracked": lambda: BatchNorm(3, track_running_stats=False),
    "renorm": lambda: BatchNorm(3, renorm=FULL),
    "ghost": lambda: BatchNorm(3, virtual_batch_size=3),
    "torch's": lambda: nn.BatchNorm1d(3),
    "torch's average": lambda: nn.BatchNorm1d(3, momentum=None),
    "torch's untracked": lambda: nn.BatchNorm1d(3, track_running_stats=False),
}
EVERY = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def trained(make):
    model = nn.Sequential(make())
    for _ in range(2):
        model(torch.randn(6, 3) * 2 + 3)
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@EVERY
def test_same_output_and_gradient_but_no_buffer_is_touched(make):
    model = trained(make)
    twin, before = copy.deepcopy(model), state(model)
    versions = [buffer._version for buffer in model.buffers()]
    x, cotangent = torch.randn(2, 6, 3)
    results = []
    for net in (twin, model):
        leaf = x.clone().requires_grad_()
        with pause_statistics(model):
            y = net(leaf)
        results.append((y, *torch.autograd.grad(y, (leaf, *net.parameters()), cotangent)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert unchanged(model, before)
    assert [buffer._version for buffer in model.buffers()] == versions
    # The twin's, which is not paused, are those of one more step.
    model(x)
    assert unchanged(model, state(twin))
    assert [int(count) for count in list(twin.buffers())[2:]] == [3] * (len(versions) // 3)


@EVERY
def test_evaluation_is_as_always(make):
    model, x = trained(make).eval(), torch.randn(6, 3)
    expected = model(x)
    with pause_statistics(model):
        assert torch.equal(model(x), expected)


@EVERY
def test_nested_and_after_an_exception(make):
    model, x = trained(make), torch.randn(6, 3)
    tracked = model[0].track_running_stats
    with pause_statistics(model):
        with pytest.raises(ZeroDivisionError), pause_statistics(model):
            raise ZeroDivisionError
        before = state(model)
        model(x)
        assert unchanged(model, before)
    assert model[0].track_running_stats is tracked
    if tracked:
        model(x)
        assert model[0].num_batches_tracked == 3


@pytest.mark.parametrize("make", [MODELS["ours"], MODELS["torch's"]], ids=["ours", "torch's"])
def test_wins_over_what_else_would_take_the_batch_in(make):
    model, x = trained(make), torch.randn(6, 3)
    before = state(model)
    with accumulate_statistics(model), pause_statistics(model):
        model(x)
    assert unchanged(model, before)
    with pause_statistics(model), accumulate_statistics(model):
        model(x)
    assert unchanged(model, before)
    freeze(model)
    expected = copy.deepcopy(model).eval()(x)
    with pause_statistics(model):
        assert torch.equal(model(x), expected)
    assert unchanged(model, before)


def test_wins_over_a_bank_and_passes_together():
    model = trained(MODELS["ours"])
    fake = bank(model, "fake")
    before = state(model)
    with pause_statistics(model), fake:
        model(torch.randn(6, 3))
        forward_together(model, torch.randn(6, 3).split(3))
    assert unchanged(model, before)


def test_a_part_of_a_model():
    model = nn.Sequential(BatchNorm(3), BatchNorm(3))
    with pause_statistics(model[0]):
        model(torch.randn(6, 3))
    assert [int(layer.num_batches_tracked) for layer in model] == [0, 1]
