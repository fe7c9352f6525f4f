"""Converted layers compute what they did, and everything that referred to them still does."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from batchnorm import BatchNorm, Renorm, convert, freeze, revert, unfreeze
from standins import (
    BatchNormAct2d,
    DetrFrozenBatchNorm2d,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
    SyncBatchNormAct,
)


class AnyRank(nn.BatchNorm1d):
    """What many libraries have for inputs of any rank."""

    def __init__(self, channels, **options):
        super().__init__(channels, **options)
        self.note = "kept"

    @classmethod
    def of(cls, other):
        return cls(other.num_features)

    def _check_input_dim(self, x):
        pass


def act(activation, **options):
    return lambda channels: BatchNormAct2d(channels, act=activation, **options)


#: What makes a layer, the rank of its input, and what its activation becomes.
TRAINS = {
    "1d": (nn.BatchNorm1d, 2, None),
    "1d, sequence": (nn.BatchNorm1d, 3, None),
    "2d": (nn.BatchNorm2d, 4, None),
    "3d": (nn.BatchNorm3d, 5, None),
    "average": (lambda c: nn.BatchNorm2d(c, momentum=None), 4, None),
    "no affine": (lambda c: nn.BatchNorm2d(c, eps=0.1, affine=False), 4, None),
    "no statistics": (lambda c: nn.BatchNorm2d(c, track_running_stats=False), 4, None),
    "derived": (AnyRank, 4, None),
    "relu": (act(nn.ReLU), 4, "relu"),
    "relu, average": (act(nn.ReLU, momentum=None), 4, "relu"),
    "leaky relu": (act(nn.LeakyReLU), 4, "leaky_relu"),
    "steeper": (act(lambda inplace: nn.LeakyReLU(0.1, inplace)), 4, nn.LeakyReLU),
    "silu in place": (act(nn.SiLU), 4, nn.SiLU),
    "prelu": (act(nn.PReLU, inplace=False), 4, nn.PReLU),
    "identity": (act(nn.Identity), 4, None),
    "dropout": (act(nn.Identity, drop=nn.Dropout), 4, nn.Dropout),
}
EVALUATES = {
    "sync": (nn.SyncBatchNorm, 3, None),
    "sync, relu": (SyncBatchNormAct, 4, "relu"),
    "torchvision": (FrozenBatchNorm2d, 4, None),
    "detectors": (lambda c: FrozenBatchNorm2d(c, eps=0.0), 4, None),
    "eps 0": (lambda c: nn.BatchNorm2d(c, eps=0.0), 4, None),
    "transformers": (DetrFrozenBatchNorm2d, 4, None),
    "frozen, silu": (lambda c: FrozenBatchNormAct2d(c, nn.SiLU), 4, nn.SiLU),
    "frozen, relu": (FrozenBatchNormAct2d, 4, "relu"),
}
SIZES = (6, 3, 4, 2, 5)


def made(kind):
    """A model with one layer twice and another once, and an input for it."""
    make, rank, _ = (TRAINS | EVALUATES)[kind]
    shared, other = make(3), make(3)
    if kind == "sync, relu":
        shared.act, other.act = nn.ReLU(), nn.ReLU()
    model = nn.Sequential(shared, other, shared)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return model, torch.randn(SIZES[:rank]) * 2 + 1


def gradient(model, x, cotangent):
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # of a dropout
    y = model(x)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    return y.detach(), *torch.autograd.grad(y, inputs, cotangent)


def assert_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        # Three layers of a dozen roundings each, to 2⁻²⁴; sums of 144 products of size 1.
        torch.testing.assert_close(a, b, rtol=2e-5, atol=5e-5)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


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
    del other
    gc.collect()


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
