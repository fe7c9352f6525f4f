"""Frozen layers are evaluation, bit for bit, whatever happens around them; and thaw unharmed."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from batchnorm import ArgumentError, BatchNorm, bank, freeze, unfreeze

pytestmark = pytest.mark.usefixtures("kernels")

SHAPES = {2: (6, 3), 3: (6, 3, 4), 4: (6, 3, 4, 2), 5: (6, 3, 2, 2, 2)}
LAYERS = {
    "ours": (BatchNorm, 4),
    "1d": (nn.BatchNorm1d, 3),
    "2d": (nn.BatchNorm2d, 4),
    "3d": (nn.BatchNorm3d, 5),
    "sync": (nn.SyncBatchNorm, 2),
}
EVERY = pytest.mark.parametrize("kind", LAYERS)


def randomized(model):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return model


def made(kind, **options):
    """A model with one layer in it, and an input for it."""
    layer, rank = LAYERS[kind]
    return randomized(nn.Sequential(layer(3, **options))), torch.randn(SHAPES[rank]) * 2 + 1


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_state(model, expected):
    got = model.state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def gradient(model, x, cotangent):
    x = x.clone().requires_grad_()
    y = model(x)
    return y.detach(), torch.autograd.grad(y, x, cotangent)[0]


def hooks(model):
    names = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(m, name)) for m in model.modules() for name in names)


@EVERY
def test_is_evaluation_in_any_mode_and_leaves_no_trace(kind):
    model, x = made(kind)
    before, cotangent = state(model), torch.randn_like(x)
    expected = gradient(model.eval(), x, cotangent)
    freeze(model)
    for training in (True, False, True):
        model.train(training)
        got = gradient(model, x, cotangent)
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
        assert model[0].training is training
    assert_state(model, before)


# SyncBatchNorm trains on accelerators only.
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "sync"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_unfreeze_gives_everything_back(kind, momentum):
    model, x = made(kind, momentum=momentum)
    model[0].bias.requires_grad_(False)
    model[0](x)
    twin = copy.deepcopy(model)
    freeze(model)
    freeze(model)
    model(x)
    unfreeze(model)
    assert [p.requires_grad for p in model.parameters()] == [True, False]
    assert hooks(model) == 0
    assert model[0].__dict__.keys() == twin[0].__dict__.keys()
    cotangent = torch.randn_like(x)
    got, expected = (gradient(either, x, cotangent) for either in (model, twin))
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    assert_state(model, state(twin))
    unfreeze(model)
    assert [p.requires_grad for p in model.parameters()] == [True, False]


@pytest.mark.parametrize("kind", ["ours", "1d"])
def test_halves(kind):
    """Statistics and affine parameters are frozen and thawed apart."""
    model, x = made(kind)
    before = state(model)

    def is_frozen():
        counter = model[0].num_batches_tracked.clone()
        model(x)
        return bool(model[0].num_batches_tracked == counter), not model[0].weight.requires_grad

    for tool, options, expected in [
        (freeze, {"affine": False}, (True, False)),
        (freeze, {"statistics": False}, (True, True)),
        (unfreeze, {"affine": False}, (False, True)),
        (freeze, {}, (True, True)),
        (unfreeze, {"statistics": False}, (True, False)),
        (unfreeze, {}, (False, False)),
        (freeze, {"statistics": False}, (False, True)),
    ]:
        tool(model, **options)
        assert is_frozen() == expected, (tool, options)
    assert not torch.equal(model[0].running_mean, before["0.running_mean"])


@pytest.mark.parametrize("kind", ["ours", "2d"])
def test_optimizer_with_decay_and_momentum_leaves_them_alone(kind):
    layer, x = made(kind)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)

    def step(set_to_none=True):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad(set_to_none=set_to_none)
        model(x).square().sum().backward()
        optimizer.step()
        return [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]

    assert step() == [True] * 4
    model(x).square().sum().backward()  # gradients that are there when it is frozen
    freeze(model)
    # Gradients of 0 would be enough for decay and momentum to move them.
    assert step(set_to_none=False) == [True, True, False, False]
    assert step() == [True, True, False, False]
    unfreeze(model)
    assert step() == [True] * 4


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "file": through_file,
    "double and back": lambda model: copy.deepcopy(model).double().float(),
}


@pytest.mark.parametrize("kind", ["ours", "2d"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_frozen_too_and_thaw_by_themselves(kind, copied):
    model, x = made(kind)
    expected = model.eval()(x)
    model[0].bias.requires_grad_(False)
    freeze(model.train())
    other = copied(model)
    assert torch.equal(other.train()(x), expected)
    unfreeze(other)
    other(x)
    assert other[0].num_batches_tracked == 1
    assert [p.requires_grad for p in other.parameters()] == [True, False]
    assert hooks(other) == 0
    assert torch.equal(model(x), expected)
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("kind", ["ours", "2d"])
def test_without_running_statistics_nothing_is_changed(kind):
    model = nn.Sequential(made(kind)[0], LAYERS[kind][0](3, track_running_stats=False))
    with pytest.raises(ArgumentError, match=r"in layer '1', .*track_running_stats=False"):
        freeze(model)
    assert hooks(model) == 0
    assert all(p.requires_grad for p in model.parameters())
    assert not any("_before_freezing" in m.__dict__ for m in model.modules())
    x = torch.randn(SHAPES[4])
    model(x)
    assert model[0][0].num_batches_tracked == 1
    freeze(model, statistics=False)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_forward_that_raises_leaves_the_mode_of_torchs_layer(training):
    model, x = made("2d")
    freeze(model.train(training))
    with pytest.raises(ValueError, match="4D"):
        model(x[0])
    assert model[0].training is training
    assert "_was_training" not in model[0].__dict__


def test_other_hooks_stay():
    """Only its own hooks go; and others see the mode in which the layer runs."""
    model, x = made("2d")
    seen = []
    model[0].register_forward_pre_hook(lambda layer, _: seen.append(layer.training))
    model[0].register_forward_hook(lambda layer, *_: seen.append("after"), always_call=True)
    freeze(model)
    model(x)
    unfreeze(model)
    model(x)
    assert seen == [False, "after", True, "after"]
    assert hooks(model) == 3


def test_shared_parameters_train_again():
    """The second layer finds γ frozen by the first: that is not what it was before."""
    model = nn.Sequential(BatchNorm(3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    freeze(model)
    assert not any(p.requires_grad for p in model.parameters())
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


def test_an_activation_is_not_frozen():
    layer = BatchNorm(3, activation=nn.PReLU())
    freeze(layer)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == [
        "activation.weight"
    ]


@pytest.mark.parametrize("first", ["bank", "freeze"])
def test_banks_are_frozen_with_their_layer(first):
    """In either order; and what a bank copied from frozen γ and β trains when they do again."""
    model, x = made("ours")
    if first == "freeze":
        freeze(model)
    fake = bank(model, "fake", affine=True)
    if first == "bank":
        freeze(model)
    before = state(model)
    with fake:
        assert not model(x).requires_grad
    assert_state(model, before)
    assert not any(p.requires_grad for p in model.parameters())
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())
    assert len(list(model.parameters())) == 4
    with fake:
        model(x)
    assert (model[0].num_batches_tracked, model[0].banks.fake.num_batches_tracked) == (0, 1)


def test_repr_tells():
    layer = BatchNorm(3)
    freeze(layer)
    assert repr(layer).endswith("track_running_stats=True, frozen)")
    unfreeze(layer)
    assert "frozen" not in repr(layer)


def test_parametrized_and_pruned_parameters_are_frozen():
    for change in (
        lambda bn: weight_norm(bn, dim=None),
        lambda bn: prune.l1_unstructured(bn, "weight", amount=1),
    ):
        for bn in (BatchNorm(4), nn.BatchNorm1d(4)):
            change(bn)
            model = nn.Sequential(bn)
            freeze(model)
            assert not any(p.requires_grad for p in model.parameters())
            unfreeze(model)
            assert all(p.requires_grad for p in model.parameters())


def test_a_shared_parameter_frozen_in_two_steps_trains_again():
    first, second, third = (BatchNorm(3) for _ in range(3))
    third.weight = second.weight = first.weight
    first.bias.requires_grad_(False)
    second.bias = first.bias
    model = nn.Sequential(first, second, third)
    freeze(second)
    freeze(model)
    assert not first.weight.requires_grad
    unfreeze(model)
    assert first.weight.requires_grad
    assert not first.bias.requires_grad
