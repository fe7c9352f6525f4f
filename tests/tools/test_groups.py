"""Every parameter once, γ and β without decay."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from batchnorm import ArgumentError, BatchNorm, bank, convert, freeze, param_groups, unfreeze
from standins import FrozenBatchNorm2d


def names(model, groups):
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [[by_id[id(p)] for p in group["params"]] for group in groups]


def every_kind():
    return nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "ours": BatchNorm(4, activation=nn.PReLU()),
            "theirs": nn.BatchNorm2d(4),
            "sync": nn.SyncBatchNorm(4),
            "instance": nn.InstanceNorm2d(4, affine=True),
            "group": nn.GroupNorm(2, 4),
            "layer": nn.LayerNorm(4),
            "rms": nn.RMSNorm(4),
            "none": BatchNorm(4, affine=False),
            "gru": nn.GRU(2, 2),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )


def test_gamma_and_beta_are_apart_and_nothing_is_lost():
    model = every_kind()
    bank(model["ours"], "fake", affine=True)
    groups = param_groups(model, 0.1)
    decayed, free = names(model, groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert free == [
        "ours.weight", "ours.bias", "ours.banks.fake.weight", "ours.banks.fake.bias",
        "theirs.weight", "theirs.bias", "sync.weight", "sync.bias", "instance.weight",
        "instance.bias", "group.weight", "group.bias", "layer.weight", "layer.bias", "rms.weight",
    ]  # fmt: skip
    rest = [name for name, _ in model.named_parameters() if name not in free]
    assert decayed == rest
    assert "ours.activation.weight" in decayed


def test_biases_too():
    model = every_kind()
    model["table"] = nn.Module()
    model["table"].relative_position_bias_table = nn.Parameter(torch.zeros(3, 2))
    model["table"].unbiased = nn.Parameter(torch.zeros(3))
    decayed, free = names(model, param_groups(model, 0.1, biases=True))
    assert [name for name in free if name.split(".")[0] in ("linear", "gru", "attention")] == [
        "linear.bias", "gru.bias_ih_l0", "gru.bias_hh_l0", "attention.in_proj_bias",
        "attention.out_proj.bias",
    ]  # fmt: skip
    assert [name for name in decayed if name.startswith("table")] == [
        "table.relative_position_bias_table",
        "table.unbiased",
    ]


def test_shared_parameters_are_there_once():
    first, second = BatchNorm(3), BatchNorm(3)
    second.weight = first.weight
    linear = nn.Linear(3, 3)
    linear.bias = first.bias
    model = nn.Sequential(linear, first, second, first, nn.Linear(3, 3))
    decayed, free = param_groups(model, 0.1)
    assert [id(p) for p in free["params"]] == [
        id(p) for p in (first.bias, first.weight, second.bias)
    ]
    assert len(decayed["params"]) == 3
    torch.optim.SGD([decayed, free], 0.1)


def test_decay_acts_where_it_should():
    """One step with gradients of zero: p ← p − lr · decay · p, or nothing."""
    model = nn.Sequential(nn.Linear(3, 3), BatchNorm(3))
    for p in model.parameters():
        nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    torch.optim.SGD(param_groups(model, 0.5), 0.1).step()
    for index, expected in enumerate([0.95, 1.0]):
        for p in model[index].parameters():
            torch.testing.assert_close(p.detach(), torch.full_like(p, expected))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_a_model_of_norms_only_has_an_empty_group(optimizer):
    model = nn.Sequential(BatchNorm(3))
    decayed, free = param_groups(model, 0.5)
    assert decayed["params"] == []
    built = optimizer([decayed, free], lr=0.1)
    model(torch.randn(4, 3)).square().sum().backward()
    built.step()


def test_frozen_ones_are_there_and_converted_ones():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    freeze(model)
    assert names(model, param_groups(model, 0.1))[1] == ["1.weight", "1.bias"]
    unfreeze(model)
    before = param_groups(model, 0.1)
    convert(model)
    after = param_groups(model, 0.1)
    for a, b in zip(before, after, strict=True):
        assert all(p is q for p, q in zip(a["params"], b["params"], strict=True))


def test_a_model_of_those_that_never_train():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), FrozenBatchNorm2d(3))
    assert names(model, param_groups(model, 0.1)) == [["0.weight", "0.bias"], []]
    assert names(model, param_groups(model, 0.1, biases=True)) == [["0.weight"], ["0.bias"]]


def test_pruned_and_parametrized():
    model = nn.Sequential(BatchNorm(3), nn.Linear(3, 3), nn.LayerNorm((3, 2)))
    prune.l1_unstructured(model[0], "weight", 1)
    weight_norm(model[1])
    weight_norm(model[2])
    assert names(model, param_groups(model, 0.1))[1] == [
        "0.bias", "0.weight_orig", "2.bias", "2.parametrizations.weight.original0",
        "2.parametrizations.weight.original1",
    ]  # fmt: skip


def test_what_cannot_be():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for decay in (-0.1, float("nan"), float("inf"), "1e-4", None, True):
        with pytest.raises(ArgumentError, match="weight_decay to be a number >= 0, got"):
            param_groups(model, decay)
    with pytest.raises(ArgumentError, match=r"normalization layers .*got a Linear with none"):
        param_groups(model[0], 0.1)
    with pytest.raises(ArgumentError, match=r"expected a torch\.nn\.Module, got list"):
        param_groups([model], 0.1)
    assert [group["weight_decay"] for group in param_groups(model, 0)] == [0, 0.0]
