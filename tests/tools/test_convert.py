"""Converted layers compute what they did, and so do those that are converted back."""

import copy
import pickle

import pytest
import torch

from batchnorm import BatchNorm, convert, revert, unfreeze
from standins import EVALUATES, TRAINS, FrozenBatchNorm2d, assert_close, gradient, made


@pytest.mark.parametrize("kind", TRAINS)
def test_training_and_evaluation_are_the_same(kind):
    model, x = made(kind)
    twin, cotangent = copy.deepcopy(model), torch.randn_like(x)
    assert convert(model) is model
    assert all(type(layer) is BatchNorm for layer in model)
    expected = TRAINS[kind][2]
    got = model[0].activation
    assert got == expected or type(got) is expected
    for training in (True, True, False):
        model.train(training)
        twin.train(training)
        assert_close(gradient(model, x, cotangent), gradient(twin, x, cotangent))
        assert_close(model.buffers(), twin.buffers())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", EVALUATES)
def test_what_evaluates_here_is_the_same(kind, training):
    model, x = made(kind)
    if training and ("sync" in kind or kind == "eps 0"):
        pytest.skip("torch cannot train it here")
    twin, cotangent = copy.deepcopy(model), torch.randn_like(x)
    convert(model.train(training))
    got, expected = gradient(model, x, cotangent), gradient(twin.train(training), x, cotangent)
    assert_close(got[:2], expected[:2])
    assert_close(model.buffers(), [twin.state_dict()[name] for name, _ in model.named_buffers()]
                 if "sync" in kind else model.buffers())  # fmt: skip
    if "sync" in kind:
        assert_close(got, expected)
        assert model[0].process_group == "world"


@pytest.mark.parametrize("kind", TRAINS | EVALUATES)
def test_there_and_back_is_where_it_was(kind):
    model, x = made(kind)
    model[0].note = ["anything"]
    twin = copy.deepcopy(model)
    attributes = {name: copy.copy(vars(layer)) for name, layer in model.named_modules()}
    children = {name: list(layer._modules) for name, layer in model.named_modules()}
    tensors = list(model.parameters())
    expected = model.eval()(x)
    model.train()
    revert(convert(model))
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    assert str(model) == str(twin)
    for name, layer in model.named_modules():
        assert vars(layer).keys() == attributes[name].keys()
        assert vars(layer).get("note") == attributes[name].get("note")
        assert list(layer._modules) == list(children[name])
    assert all(a is b for a, b in zip(model.parameters(), tensors, strict=True))
    assert list(model.state_dict()) == list(twin.state_dict())
    for value, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, other)
    assert torch.equal(model.eval()(x), expected)


@pytest.mark.parametrize("kind", TRAINS | EVALUATES)
def test_state_dicts_fit_both_ways(kind):
    model, x = made(kind)
    before = model.state_dict()
    other = convert(made(kind)[0])
    other.load_state_dict(before, strict=True)
    assert_close([other.eval()(x)], [model.eval()(x)])
    back = made(kind)[0]
    back.load_state_dict(other.state_dict(), strict=True)
    assert_close([back.eval()(x)], [model(x)])


class VersionedBatchNorm2d(FrozenBatchNorm2d):
    """As Detectron2's."""

    _version = 3


@pytest.mark.parametrize("thawed", [False, True])
@pytest.mark.parametrize(
    "copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_what_never_trained_has_no_counter_whatever_its_version(thawed, copied):
    """torch supplies one to state dicts of version 1."""
    before = torch.nn.Sequential(VersionedBatchNorm2d(3))
    torch.nn.init.uniform_(before[0].running_mean)
    model = copied(convert(torch.nn.Sequential(VersionedBatchNorm2d(3))))
    if thawed:
        unfreeze(model)
    model.load_state_dict(before.state_dict(), strict=True)
    x = torch.randn(2, 3, 4, 4)
    assert_close([model.eval()(x)], [before(x)])
    assert model[0].num_batches_tracked == 0
    revert(model)
    assert type(model[0]) is (torch.nn.BatchNorm2d if thawed else VersionedBatchNorm2d)
    assert not model[0]._load_state_dict_pre_hooks


def test_no_eps_is_none():
    """Detectors have eps=0, and after years of weight decay before it variances of any size."""
    layer = FrozenBatchNorm2d(3, eps=0.0)
    layer.running_var.copy_(torch.tensor([1e-30, 1e-12, 1.0]))
    x = torch.randn(2, 3, 4, 4) * 1e-12
    expected = layer(x)
    torch.testing.assert_close(convert(layer)(x), expected, rtol=1e-6, atol=0)
    assert revert(layer).eps == 0
