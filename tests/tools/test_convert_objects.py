"""Whatever referred to a converted layer still does; options are those of every layer."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from batchnorm import BatchNorm, Renorm, convert, freeze, revert, unfreeze
from standins import (
    BatchNormAct2d,
    FrozenBatchNorm2d,
    SyncBatchNormAct,
    assert_close,
    made,
    state,
)


def test_objects_are_the_same_ones():
    """Parameters, buffers, modules, their lists, handles of hooks: whoever has one still has it."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    layer = model[1]
    layer.weight.requires_grad_(False)
    model[2].weight = layer.weight
    layer.note = "kept"
    tensors = [*model.parameters(), *model.buffers()]
    called = []
    handles = [
        layer.register_forward_pre_hook(lambda *_: called.append("before")),
        layer.register_forward_hook(lambda *_: called.append("after")),
        layer.register_full_backward_hook(lambda *_: called.append("backward")),
        layer.register_state_dict_post_hook(lambda *_: called.append("saved")),
    ]
    layer.eval()
    convert(model)
    assert model[1] is layer
    assert layer.note == "kept"
    assert (layer.training, model[2].training) == (False, True)
    assert all(
        a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True)
    )
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)
    assert model[2].weight is layer.weight
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    model.state_dict()
    assert called == ["before", "after", "backward", "saved"]
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    model.state_dict()
    assert len(called) == 4


def test_the_model_may_be_a_layer():
    layer = nn.BatchNorm1d(3)
    assert convert(layer) is layer
    assert type(layer) is BatchNorm


@pytest.mark.parametrize("when", ["before", "within"])
def test_an_optimizer_goes_on(when):
    """Momentum and all: three steps, converted before or in between, are torch's three steps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)
    )
    twin = copy.deepcopy(model)
    batches = torch.randn(3, 8, 4)
    for either in (model, twin):
        optimizer = torch.optim.AdamW(either.parameters(), 0.1, weight_decay=0.1)
        for index, batch in enumerate(batches):
            if either is model and index == (0 if when == "before" else 1):
                convert(model)
            optimizer.zero_grad()
            (either(batch) - 1).square().mean().backward()
            optimizer.step()
    # Adam divides by the gradient's size, so a rounding counts as often as a step: 0.1 · 1e-4.
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert_close(model.buffers(), twin.buffers())


@pytest.mark.parametrize("kind", ["2d", "relu", "silu in place", "prelu", "torchvision"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_can_go_back_by_themselves(kind, copied):
    model, x = made(kind)
    expected = model.eval()(x)
    if kind in ("silu in place", "prelu") and copied is not copy.deepcopy:
        model[0].act.inplace = False
    other = copied(convert(model))
    assert_close([other(x)], [expected])
    if other[0]._modules:
        assert other[0].activation is other[0]._modules["act"]
        assert other[0].activation is not model[0].activation
    original = type(made(kind)[0][0])
    assert type(revert(other)[0]) is original
    assert torch.equal(other(x), expected)
    assert type(model[0]) is BatchNorm


def test_what_never_trained_is_frozen_and_can_be_thawed():
    model, x = made("torchvision")
    layer = convert(model)[0]
    before = state(model)
    model.train()(x.requires_grad_()).sum().backward()
    assert layer.num_batches_tracked == 0
    assert [p.requires_grad for p in model.parameters()] == [False] * 4
    assert before.keys() == model.state_dict().keys()
    unfreeze(model)
    model(x)
    assert layer.num_batches_tracked == 2  # it is there twice
    assert [p.requires_grad for p in model.parameters()] == [True] * 4
    expected = model.eval()(x)
    assert type(revert(model)[0]) is nn.BatchNorm2d
    assert_close([model(x)], [expected])


def test_frozen_stays_frozen():
    model, x = made("2d")
    expected = model.eval()(x)
    freeze(model.train())
    convert(model)
    assert model[0]._frozen
    assert not model[0]._forward_pre_hooks
    assert not model[0]._forward_hooks
    assert_close([model(x)], [expected])
    revert(model)
    assert torch.equal(model(x), expected)
    assert not model[0].weight.requires_grad
    convert(model)
    unfreeze(model)
    model(x)
    assert model[0].num_batches_tracked == 2
    assert model[0].weight.requires_grad


def test_options_are_those_of_every_layer():
    renorm = Renorm()
    model = nn.Sequential(nn.BatchNorm1d(3), BatchNorm(3, momentum=0.5), nn.BatchNorm1d(3))
    convert(model, virtual_batch_size=4, renorm=renorm, activation="relu", eps=0.25)
    for layer in model:
        assert layer.virtual_batch_size == 4
        assert layer.renorm is renorm
        assert layer.activation == "relu"
        assert layer.eps == 0.25
    assert [layer.momentum for layer in model] == [0.1, 0.5, 0.1]
    convert(model, virtual_batch_size=None, momentum=None)
    assert model[0].renorm is renorm
    assert [layer.momentum for layer in model] == [None] * 3


def test_ghost_batches_of_a_converted_model():
    """Against torch's own layer, called once a group."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    twin = copy.deepcopy(model)
    x = torch.randn(8, 3)
    got = convert(model, virtual_batch_size=4)(x)
    assert_close([got], [torch.cat([twin(part) for part in x.split(4)])])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_statistics_become_wide_and_narrow_again(dtype):
    model, x = made("2d")
    model, x = model.to(dtype), x.to(dtype)
    before = state(model)
    convert(model)
    assert model[0].running_mean.dtype is torch.float32
    assert model[0].weight.dtype is dtype
    assert torch.equal(model[0].running_var, before["0.running_var"].float())
    model(x)
    revert(model)
    assert model[0].running_mean.dtype is dtype
    assert model(x).dtype is dtype


def test_a_pruned_layer_goes_on():
    model, x = made("2d")
    twin = copy.deepcopy(model)
    for either in (model, twin):
        prune.l1_unstructured(either[0], "weight", 1)
    convert(model)
    assert_close([model(x)], [twin(x)])
    assert list(model.state_dict()) == list(twin.state_dict())
    for either in (model, twin):
        prune.remove(either[0], "weight")
    assert_close([model(x)], [twin(x)])
    assert list(revert(model)[0]._parameters) == ["bias", "weight"]


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")
def test_compiled_code_sees_the_new_layer():
    torch.compiler.reset()
    model = nn.Sequential(nn.BatchNorm1d(3))
    x = torch.randn(8, 3)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    convert(model, virtual_batch_size=4)
    twin = copy.deepcopy(model)
    assert_close([compiled(x)], [twin(x)])
    revert(model)
    assert_close([compiled(x)], [copy.deepcopy(model)(x)])
    torch.compiler.reset()


def test_a_hooked_child_stays_a_module():
    """Whoever listens to it goes on hearing it."""
    model = nn.Sequential(BatchNormAct2d(3))
    heard = []
    model[0].act.register_forward_hook(lambda *_: heard.append(1))
    convert(model)
    model(torch.randn(2, 3, 4, 4))
    assert heard == [1]
    assert model[0].activation is model[0].act


def test_random_numbers_and_modes_are_left_alone():
    model, _ = made("dropout")
    model.eval()
    before = torch.get_rng_state()
    with torch.inference_mode():
        convert(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in model.modules())


def test_without_memory():
    """On the device "meta", as large models are built."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), BatchNormAct2d(8), FrozenBatchNorm2d(8))
        assert [type(m) for m in convert(model)[1:]] == [BatchNorm] * 2
    assert model[1].weight.is_meta
    assert isinstance(revert(model)[1], BatchNormAct2d)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")
def test_a_layer_compiled_by_itself():
    """Its compiled call is of the layer, whatever the layer is."""
    torch.compiler.reset()
    model = nn.Sequential(nn.BatchNorm2d(3))
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 4, 4)
    model[0].compile(backend="eager")
    model(x), twin(x)
    convert(model, activation="relu")
    assert_close([model(x)], [twin(x).relu()])
    assert_close(model.buffers(), twin.buffers())
    model[0].activation = None
    assert_close([revert(model)(x)], [twin(x)])
    torch.compiler.reset()


@pytest.mark.parametrize("training", [True, False])
def test_children_whose_part_is_taken_come_back_in_the_layers_mode(training):
    model = nn.Sequential(BatchNormAct2d(3)).train(not training)
    convert(model).train(training)
    revert(model)
    assert {name: module.training for name, module in model.named_modules()} == dict.fromkeys(
        ["", "0", "0.drop", "0.act"], training
    )


def test_children_that_are_none_come_back():
    model = nn.Sequential(SyncBatchNormAct(3))
    model[0].act = nn.ReLU()
    model[0].register_module("drop", None)
    revert(convert(model))
    assert list(model[0]._modules) == ["act", "drop"]
    assert model[0].drop is None


def test_what_derives_from_an_activation_is_not_it():
    class Shifted(nn.ReLU):
        def forward(self, x):
            return super().forward(x) + 1

    model, x = nn.Sequential(BatchNormAct2d(3, act=Shifted)), torch.randn(2, 3, 4, 4)
    expected = copy.deepcopy(model)(x)
    assert_close([convert(model)(x)], [expected])
    assert model[0].activation is model[0].act
