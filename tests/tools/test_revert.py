"""Back to torch's classes: with the same numbers, or not at all."""

import copy

import pytest
import torch
from torch import nn

from batchnorm import (
    ArgumentError,
    BatchNorm,
    Renorm,
    accumulate_statistics,
    bank,
    convert,
    revert,
    unfreeze,
)
from standins import BatchNormAct2d, DetrFrozenBatchNorm2d, FrozenBatchNormAct2d


class Derived(BatchNorm):
    pass


KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@pytest.mark.parametrize("rank", KINDS)
def test_layers_made_by_hand_become_what_takes_their_input(rank):
    """Against the layer of ours in training, gradients and evaluation."""
    model = nn.Sequential(BatchNorm(3, momentum=None), BatchNorm(3, eps=0.1, bias=False))
    x = torch.randn((6, 3, 4, 2, 5)[:rank])
    model(x)
    model.eval()
    model[1].train()
    twin, objects = copy.deepcopy(model), [*model.parameters(), *model.buffers()]
    assert revert(model, x) is model
    assert [type(layer) for layer in model] == [KINDS[rank]] * 2
    assert all(
        a is b for a, b in zip(objects, [*model.parameters(), *model.buffers()], strict=True)
    )
    assert [layer.training for layer in model] == [False, True]
    before = zip(model.buffers(), twin.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in before)
    fresh = nn.Sequential(KINDS[rank](3, momentum=None), KINDS[rank](3))
    assert vars(model[0]).keys() == vars(fresh[0]).keys()
    for training in (True, False):
        cotangent, results = torch.randn_like(x), []
        for either in (model, twin):
            y = either.train(training)(x)
            results.append([y, *torch.autograd.grad(y, [*either.parameters()], cotangent)])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
        for got, expected in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_example_inputs_leave_no_trace():
    model = nn.Sequential(nn.Dropout(), BatchNorm(3))
    before = torch.get_rng_state()
    revert(model, (torch.randn(1, 3, 4), "a label"))
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.randn(1, 3, 4)
    assert torch.equal(torch.get_rng_state(), after)
    assert model.training
    assert model[1].training
    assert model[1].num_batches_tracked == 0
    assert not model[1]._forward_pre_hooks


def test_a_lone_layer_and_one_of_torchs():
    layer = BatchNorm(3)
    assert revert(layer, torch.randn(2, 3)) is layer
    assert type(layer) is nn.BatchNorm1d
    assert revert(layer) is layer


def test_a_process_group_makes_a_sync_batch_norm():
    model = nn.Sequential(BatchNorm(3, process_group="world"), nn.SyncBatchNorm(3))
    convert(model)
    revert(model)
    assert [type(layer) for layer in model] == [nn.SyncBatchNorm] * 2
    assert [layer.process_group for layer in model] == [None] * 2


def test_what_convert_gave_for_training_ends():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    x = torch.randn(8, 3)
    convert(model, virtual_batch_size=4, renorm=Renorm(r_steps=(0, 0)), process_group="world")
    convert(model, momentum=0.3)
    model(x)
    expected = model.eval()(x)
    revert(model)
    assert [type(layer) for layer in model] == [nn.BatchNorm1d] * 2
    assert [layer.momentum for layer in model] == [0.3] * 2
    torch.testing.assert_close(model(x), expected, rtol=2e-6, atol=2e-6)


def test_a_process_group_that_an_option_replaced_is_back():
    for given in (None, "world"):
        model = nn.Sequential(nn.SyncBatchNorm(3), nn.SyncBatchNorm(3))
        group = model[1].process_group = torch.distributed.ProcessGroup(0, 1)
        convert(model, process_group=given)
        assert [layer.process_group for layer in model] == [given] * 2
        revert(model)
        assert [type(layer) for layer in model] == [nn.SyncBatchNorm] * 2
        assert model[0].process_group is None
        assert model[1].process_group is group


def test_what_no_longer_shares_goes_by_its_input():
    model = nn.Sequential(nn.SyncBatchNorm(3))
    convert(model)[0].process_group = None
    with pytest.raises(ArgumentError, match="pass example_inputs"):
        revert(model)
    assert type(revert(model, torch.randn(2, 3, 4, 4))[0]) is nn.BatchNorm2d


def with_activation():
    layer = convert(nn.Sequential(BatchNormAct2d(3)))[0]
    layer.activation = "leaky_relu"
    return layer


def with_bank():
    layer = BatchNorm(3)
    bank(layer, "fake")
    return layer


def with_given_activation():
    layer = convert(nn.Sequential(nn.BatchNorm2d(3)), activation="relu")[0]
    assert layer.activation == "relu"
    return layer


def thawed():
    layer = convert(FrozenBatchNormAct2d(3))
    unfreeze(layer)
    return layer


def with_other_eps():
    layer = convert(DetrFrozenBatchNorm2d(3))
    layer.eps = 1e-3
    return layer


REFUSED = {
    "thawed": (thawed, "a BatchNorm2d does not apply activation='relu'"),
    "number in a forward": (
        with_other_eps,
        "as a DetrFrozenBatchNorm2d, its output in evaluation would not be the same",
    ),
    "unknown rank": (lambda: BatchNorm(3), "rank of its input, and there are none to go by"),
    "renorm": (lambda: BatchNorm(3, renorm=Renorm()), "no renorm; .*set it to None first"),
    "groups": (lambda: BatchNorm(3, virtual_batch_size=2), "no virtual_batch_size; "),
    "activation": (
        lambda: BatchNorm(3, activation="relu", process_group="world"),
        "a SyncBatchNorm does not apply activation='relu'",
    ),
    "other activation": (with_activation, "set activation to 'relu' first"),
    "given activation": (with_given_activation, "a BatchNorm2d does not apply activation='relu'"),
    "axis": (lambda: BatchNorm(3, channel_dim=-1, process_group="world"), "axis 1, not -1"),
    "bank": (with_bank, r"no banks \(fake\)"),
    "derived": (lambda: Derived(3), "a class of its own"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_is_refused_and_nothing_is_changed(make, message):
    model = nn.Sequential(convert(nn.BatchNorm2d(3)), make())
    attributes = [set(vars(m)) for m in model.modules()]
    with pytest.raises(ArgumentError, match=message) as caught:
        revert(model)
    assert " at '1': " in str(caught.value)
    assert isinstance(model[0], BatchNorm)
    assert isinstance(model[1], BatchNorm)
    assert [set(vars(m)) for m in model.modules()] == attributes


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([(2, 3), (2, 3, 4, 4)], "inputs of rank 2, 4"),
        ([(2, 3, 4, 4, 4, 4)], "inputs of rank 6"),
        ([], "none to go by"),
    ],
)
def test_inputs_that_no_layer_of_torchs_takes(inputs, message):
    layer = BatchNorm(3)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            for size in inputs:
                layer(torch.randn(size))
            return x

    with pytest.raises(ArgumentError, match=message):
        revert(Model(), torch.zeros(1))


def test_both_ranks_of_one_class():
    class Model(nn.Sequential):
        def forward(self, x):
            return self[0](self[0](x).mean(-1))

    model = Model(BatchNorm(3))
    assert type(revert(model, torch.randn(2, 3, 4))[0]) is nn.BatchNorm1d


def test_another_axis_that_is_the_first():
    layer = BatchNorm(3, channel_dim=-1)
    assert type(revert(layer, torch.randn(2, 3))) is nn.BatchNorm1d
    other = BatchNorm(3, channel_dim=-1)
    with pytest.raises(ArgumentError, match="axis 1, not -1"):
        revert(other, torch.randn(2, 4, 3))


def test_within_a_block_of_a_tool():
    model = convert(nn.Sequential(nn.BatchNorm1d(3)))
    with accumulate_statistics(model), pytest.raises(ArgumentError, match="at work"):
        revert(model)
    assert type(revert(model)[0]) is nn.BatchNorm1d


def test_half_precision():
    """torch's kernels take statistics of the dtype of γ only."""
    model = nn.Sequential(BatchNorm(3, dtype=torch.bfloat16))
    x = torch.randn(6, 3, dtype=torch.bfloat16)
    model(x)
    expected = model.eval()(x)
    revert(model, x)
    # Statistics have 8 bits now, and so has what is computed.
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("lost", [("weight", "bias"), ("weight",), ("bias",)])
def test_half_precision_without_gamma_or_beta(lost):
    """Both dtypes of the running statistics are such that torch computes with them."""
    model, x = nn.Sequential(nn.BatchNorm2d(3)), torch.randn(6, 3, 2, 2).half()
    for name in lost:
        model[0].register_parameter(name, None)
    model.half()(x)
    expected = model.eval()(x)
    revert(convert(model))
    assert type(model[0]) is nn.BatchNorm2d
    torch.testing.assert_close(model(x), expected, rtol=2e-3, atol=2e-3)
    model.train()(x)
    if lost == ("weight", "bias"):  # and with what the model may have become since
        revert(convert(model.eval()).float())(x.float())
