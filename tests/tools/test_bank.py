"""Banks: one layer with several sets of statistics is several layers with the same γ and β."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from batchnorm import ArgumentError, BatchNorm, accumulate_statistics, bank, freeze
from batchnorm.layers.statistics import StatisticsBank

pytestmark = pytest.mark.usefixtures("kernels")

BUFFERS = ["running_mean", "running_var", "num_batches_tracked"]


def network(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), BatchNorm(3, **options), nn.Tanh(), BatchNorm(3))


def real():
    return torch.randn(8, 4)


def generated():
    return torch.randn(8, 4) * 3 + 2


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_state(module, expected):
    got = module.state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def statistics(layer):
    return [getattr(layer, name).clone() for name in BUFFERS]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"virtual_batch_size": 3}], ids=str)
def test_statistics_are_those_of_separate_models(options):
    """Trained by turns: each bank is as if there had been nothing but its own data."""
    model = network(**options)
    model(real())
    twins = {"real": copy.deepcopy(model), "fake": copy.deepcopy(model)}
    fake = bank(model, "fake")
    for _ in range(3):
        x, other = real(), generated()
        y = twins["real"](x)
        assert torch.equal(model(x), y)
        y = twins["fake"](other)
        with fake:
            assert torch.equal(model(other), y)
    for index in (1, 3):
        layer = model[index]
        assert same(statistics(layer), statistics(twins["real"][index]))
        assert same(statistics(layer.banks.fake), statistics(twins["fake"][index]))
    for net in (model, *twins.values()):
        net.eval()
    x = real()
    assert torch.equal(model(x), twins["real"](x))
    with fake:
        assert torch.equal(model(x), twins["fake"](x))
    assert not torch.equal(twins["fake"](x), twins["real"](x))


def test_own_affine_parameters_get_their_own_gradients():
    model = nn.Sequential(BatchNorm(3))
    with torch.no_grad():
        model[0].weight.uniform_(0.5, 1.5)
    twin = copy.deepcopy(model)
    fake = bank(model, "fake", affine=True)
    own = model[0].banks.fake
    assert torch.equal(own.weight, model[0].weight)
    with torch.no_grad():
        own.weight.mul_(-2)
        twin[0].weight.mul_(-2)
    x, cotangent = torch.randn(2, 8, 3)
    twin(x).backward(cotangent)
    with fake:
        model(x).backward(cotangent)
    assert model[0].weight.grad is None
    assert model[0].bias.grad is None
    assert torch.equal(own.weight.grad, twin[0].weight.grad)
    assert torch.equal(own.bias.grad, twin[0].bias.grad)
    model(x).backward(cotangent)
    assert torch.equal(model[0].bias.grad, twin[0].bias.grad)
    # γ's does not depend on γ: the same, of the layer's own this time.
    torch.testing.assert_close(model[0].weight.grad, own.weight.grad)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_keys_and_a_strict_load_that_makes_banks(affine, bias):
    model = nn.Sequential(BatchNorm(3, bias=bias))
    with bank(model, "fake", affine=affine):
        model(torch.randn(8, 3) + 5)
    keys = [*(["weight"] + ["bias"] * bias) * affine, *BUFFERS]
    own = [key for key in model.state_dict() if "banks" in key]
    assert own == [f"0.banks.fake.{key}" for key in keys]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    for assign in (False, True):
        file.seek(0)
        other = nn.Sequential(BatchNorm(3, bias=bias)).eval()
        other.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=assign)
        assert_state(other, state(model))
        assert not other[0].banks.fake.training
        with bank(other, "fake", affine=affine), bank(model.eval(), "fake", affine=affine):
            x = torch.randn(8, 3)
            assert torch.equal(other(x), model(x))


def test_checkpoints_without_banks():
    """torch's load strictly where there are none, and miss them by name where there are some."""
    theirs = nn.Sequential(nn.BatchNorm1d(3))
    theirs(torch.randn(8, 3))
    model = nn.Sequential(BatchNorm(3))
    model.load_state_dict(theirs.state_dict(), strict=True)
    assert_state(model, state(theirs))
    bank(model, "fake")
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.banks.fake.running_mean"'):
        model.load_state_dict(theirs.state_dict(), strict=True)
    assert model.load_state_dict(theirs.state_dict(), strict=False).unexpected_keys == []


def test_meta_device_then_load():
    model = nn.Sequential(BatchNorm(3))
    with bank(model, "fake", affine=True):
        model(torch.randn(8, 3) + 5)
    with torch.device("meta"):
        empty = nn.Sequential(BatchNorm(3))
    empty.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert_state(empty, state(model))
    bank(model.to("meta"), "fake", affine=True)
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_banks_within_banks_and_after_exceptions():
    model = nn.Sequential(BatchNorm(3))
    one, two = bank(model, "one"), bank(model, "two")
    x = torch.randn(8, 3)

    def counts():
        layer = model[0]
        return [int(k.num_batches_tracked) for k in (layer, layer.banks.one, layer.banks.two)]

    with one:
        with two:
            model(x)
            with one:
                model(x)
            model(x)
        model(x)
        with pytest.raises(ZeroDivisionError), two:
            raise ZeroDivisionError
        model(x)
    assert counts() == [0, 3, 2]
    model(x)
    assert counts() == [1, 3, 2]


def test_a_bank_begins_as_a_copy_and_is_made_once():
    model = nn.Sequential(BatchNorm(3))
    model(torch.randn(8, 3))
    bank(model, "fake")
    own = model[0].banks.fake
    assert same(statistics(own), statistics(model[0]))
    pointers = {t.data_ptr() for t in model.state_dict().values()}
    assert len(pointers) == len(model.state_dict())
    with bank(model, "fake"):
        model(torch.randn(8, 3))
    assert model[0].banks.fake is own
    assert int(own.num_batches_tracked) == 2


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_have_banks_and_are_in_none(copied):
    model = nn.Sequential(BatchNorm(3))
    fake = bank(model, "fake", affine=True)
    with fake:
        model(torch.randn(8, 3))
        other = copied(model)
    assert_state(other, state(model))
    pointers = {t.data_ptr() for t in model.state_dict().values()}
    assert pointers.isdisjoint(t.data_ptr() for t in other.state_dict().values())
    other(torch.randn(8, 3))
    assert other[0].num_batches_tracked == 1
    with fake:
        model(torch.randn(8, 3))
    with bank(other, "fake", affine=True):
        other(torch.randn(8, 3))
    assert [int(m[0].banks.fake.num_batches_tracked) for m in (model, other)] == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_statistics_stay_float32_in_half_precision(dtype):
    model = nn.Sequential(BatchNorm(3))
    with bank(model, "fake", affine=True):
        model(torch.randn(8, 3) + 100.3)
    before = statistics(model[0].banks.fake)
    model.to(dtype)
    own = model[0].banks.fake
    assert same(statistics(own), before)
    assert own.weight.dtype is dtype
    halves = {name: v.to(dtype) if v.is_floating_point() else v for name, v in state(model).items()}
    model.load_state_dict(halves, strict=True, assign=True)
    assert model[0].banks.fake.running_mean.dtype is torch.float32


def test_shared_memory():
    model = nn.Sequential(BatchNorm(3))
    bank(model, "fake")
    model.share_memory()
    assert all(tensor.is_shared() for tensor in model.state_dict().values())


@pytest.mark.parametrize("name", ["a.b", "", "keys", "training", "_modules", "a b", 3, None])
def test_names_that_cannot_be(name):
    model = nn.Sequential(BatchNorm(3))
    with pytest.raises(ArgumentError, match="expected the name of a bank to be a word"):
        bank(model, name)
    assert list(model[0]._modules) == []


@pytest.mark.parametrize(
    ("second", "affine", "words"),
    [
        (BatchNorm(3, track_running_stats=False), False, "layer with running statistics"),
        (BatchNorm(3, affine=False), True, "with γ and β"),
        (BatchNorm(3), True, "bank 'fake' as it is, affine=False, got True"),
    ],
)
def test_nothing_is_made_where_one_layer_cannot(second, affine, words):
    if "as it is" in words:
        bank(second, "fake")
    model = nn.Sequential(BatchNorm(3), second)
    with pytest.raises(ArgumentError, match=words):
        bank(model, "fake", affine=affine)
    assert list(model[0]._modules) == []


def test_a_layer_that_lost_its_banks_is_named():
    model = nn.Sequential(BatchNorm(3), BatchNorm(3))
    fake = bank(model, "fake")
    del model[1].banks
    with pytest.raises(ArgumentError, match="expected a layer with a bank 'fake'"), fake:
        pass
    model(torch.randn(8, 3))
    assert model[0].num_batches_tracked == 1


def test_accumulated_statistics_go_to_the_bank():
    model = nn.Sequential(BatchNorm(3, momentum=1.0))
    fake = bank(model, "fake")
    x = torch.randn(9, 3) + 4
    with accumulate_statistics(model):
        model(torch.randn(5, 3))
        with fake:
            for part in x.split([4, 5]):
                model(part)
    own = model[0].banks.fake
    torch.testing.assert_close(own.running_mean, x.double().mean(0).float())
    torch.testing.assert_close(own.running_var, x.double().var(0).float())
    assert [int(k.num_batches_tracked) for k in (model[0], own)] == [1, 1]


def test_frozen_layers_evaluate_by_the_bank():
    model = nn.Sequential(BatchNorm(3))
    fake = bank(model, "fake")
    with fake:
        model(torch.randn(8, 3) + 4)
        x = torch.randn(8, 3)
        expected = model.eval()(x)
        freeze(model.train())
        before = state(model)
        assert torch.equal(model(x), expected)
    assert_state(model, before)
    assert not torch.equal(model(x), expected)


def test_pruned_layers_have_plain_banks():
    """What pruning adds to the layer is no statistic."""
    layer = BatchNorm(3)
    prune.random_unstructured(layer, "weight", 1)
    layer.add_bank("fake")
    assert list(layer.banks.fake.state_dict()) == BUFFERS
    layer._bank = "fake"
    layer(torch.randn(8, 3))
    assert [int(k.num_batches_tracked) for k in (layer, layer.banks.fake)] == [0, 1]


def test_repr():
    layer = BatchNorm(3)
    layer.add_bank("real", affine=True)
    assert repr(layer.banks.real) == "StatisticsBank(affine=True)"
    assert isinstance(layer.banks.real, StatisticsBank)


def test_a_bank_that_does_not_fit_is_told_with_all_else():
    source, target = nn.Sequential(BatchNorm(3)), nn.Sequential(BatchNorm(3))
    bank(source, "a", affine=True)
    made = bank(target, "a")
    with pytest.raises(RuntimeError, match="0: expected bank 'a' as it is, affine=False"):
        target.load_state_dict(source.state_dict())
    assert repr(made) == "<bank 'a' of 1 layers>"
