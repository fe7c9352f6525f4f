"""Lazy layers may be converted before their first input, and after it."""

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm, InputError, convert, freeze, revert, unfreeze
from batchnorm.tools.lazy import LazyBatchNorm

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")

LAZY = {
    "1d": (nn.LazyBatchNorm1d, nn.BatchNorm1d, (6, 3, 4)),
    "2d": (nn.LazyBatchNorm2d, nn.BatchNorm2d, (6, 3, 4, 2)),
    "3d": (nn.LazyBatchNorm3d, nn.BatchNorm3d, (6, 3, 4, 2, 5)),
}
EVERY = pytest.mark.parametrize(("lazy", "grown", "shape"), LAZY.values(), ids=LAZY)


@EVERY
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
def test_the_first_input_makes_a_batch_norm(lazy, grown, shape, options):
    model = nn.Sequential(lazy(momentum=0.3, **options))
    parameters = [*model.parameters()]
    convert(model, activation="relu")
    assert type(model[0]) is LazyBatchNorm
    x = torch.randn(shape)
    got = model(x)
    assert type(model[0]) is BatchNorm
    assert model[0].num_features == 3
    twin = nn.Sequential(grown(3, momentum=0.3, **options), nn.ReLU())
    torch.testing.assert_close(got, twin(x), rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == list(twin.state_dict())
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len(parameters) == len([*model.parameters()])
    model[0].activation = None
    assert type(revert(model)[0]) is grown


@EVERY
def test_after_the_first_input_it_is_torchs_and_nothing_special(lazy, grown, shape):
    model = nn.Sequential(lazy())
    x = torch.randn(shape)
    model(x)
    expected = model.eval()(x)
    torch.testing.assert_close(convert(model)(x), expected, rtol=1e-5, atol=1e-5)
    assert type(revert(model)[0]) is grown


@EVERY
def test_back_before_the_first_input(lazy, grown, shape):
    model = revert(convert(nn.Sequential(lazy())))
    assert type(model[0]) is lazy
    x = torch.randn(shape)
    torch.testing.assert_close(model(x), grown(3)(x), rtol=1e-5, atol=1e-5)


def test_parameters_are_those_that_the_optimizer_has():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    convert(model)
    model(torch.randn(4, 3, 2, 2)).sum().backward()
    optimizer.step()
    # The gradient of β is the number of its elements: 4 · 2 · 2.
    assert torch.equal(model[0].bias, torch.full((3,), -16.0))


def test_channels_come_from_a_state_dict_too():
    model = convert(nn.Sequential(nn.LazyBatchNorm2d()), channel_dim=-1)
    other = nn.BatchNorm2d(3)
    nn.init.uniform_(other.weight)
    model.load_state_dict(nn.Sequential(other).state_dict(), strict=True)
    x = torch.randn(2, 4, 4, 3)
    model.eval()
    expected = other.eval()(x.movedim(-1, 1)).movedim(1, -1)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert type(model[0]) is BatchNorm
    assert model[0].num_features == 3


def test_half_before_the_first_input():
    model = convert(nn.Sequential(nn.LazyBatchNorm1d(dtype=torch.bfloat16)))
    assert model(torch.randn(4, 3).bfloat16()).dtype is torch.bfloat16
    assert model[0].running_mean.dtype is torch.float32
    assert model[0].weight.dtype is torch.bfloat16


@pytest.mark.parametrize("converted", [False, True])
def test_frozen_before_the_first_input(converted):
    """Then the running statistics are those of a new layer: mean 0, variance 1."""
    model = nn.Sequential(nn.LazyBatchNorm2d(eps=0.5))
    if converted:
        convert(model)
    freeze(model)
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(model(x), x / 1.5**0.5, rtol=1e-6, atol=1e-6)
    assert [p.requires_grad for p in model.parameters()] == [False] * 2
    unfreeze(model)
    model(x)
    assert model[0].num_batches_tracked == 1
    assert [p.requires_grad for p in model.parameters()] == [True] * 2


def test_an_input_without_channels():
    layer = convert(nn.LazyBatchNorm1d())
    with pytest.raises(InputError, match=r"an axis 1 of x, .* got x of shape \(3,\)"):
        layer(torch.randn(3))
    assert type(layer) is LazyBatchNorm
    assert layer(torch.randn(4, 3)).shape == (4, 3)
