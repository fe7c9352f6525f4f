"""Which modules the tools act on."""

import pytest
import torch
from torch import nn

from batchnorm import (
    ArgumentError,
    BatchNorm,
    accumulate_statistics,
    bank,
    forward_together,
    freeze,
    pause_statistics,
    save_memory,
    sync_statistics,
    unfreeze,
)
from batchnorm.tools.layers import batch_norms, keepers, own_batch_norms


class Derived(BatchNorm):
    pass


def test_all_kinds_are_found_once_and_by_name():
    shared = BatchNorm(2)
    model = nn.ModuleDict(
        {
            "one": nn.BatchNorm1d(2),
            "two": nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm3d(2)),
            "sync": nn.SyncBatchNorm(2),
            "ours": nn.ModuleList([shared, shared, Derived(2)]),
            "others": nn.Sequential(nn.LayerNorm(2), nn.InstanceNorm1d(2), nn.GroupNorm(1, 2)),
        }
    )
    found = dict(batch_norms(model))
    assert list(found) == ["one", "two.0", "two.1", "sync", "ours.0", "ours.2"]
    assert all(model.get_submodule(name) is layer for name, layer in found.items())
    assert dict(own_batch_norms(model["ours"])) == {"0": shared, "2": model["ours"][2]}
    assert dict(batch_norms(shared)) == {"": shared}


def test_keepers_are_the_layer_and_its_banks_only():
    """An activation that is a module has a weight of its own, or even statistics."""
    layer = BatchNorm(2, activation=nn.Sequential(nn.PReLU(), nn.BatchNorm1d(2)))
    assert keepers(layer) == [layer]
    layer.add_bank("fake")
    assert keepers(layer) == [layer, layer.banks.fake]
    theirs = nn.BatchNorm1d(2)
    assert keepers(theirs) == [theirs]


TOOLS = {
    "freeze": freeze,
    "unfreeze": unfreeze,
    "pause": lambda model: pause_statistics(model).__enter__(),
    "accumulate": lambda model: accumulate_statistics(model).__enter__(),
    "together": lambda model: forward_together(model, []),
    "bank": lambda model: bank(model, "fake"),
    "sync": sync_statistics,
    "memory": lambda model: save_memory(model).__enter__(),
}
OWN = {name: TOOLS[name] for name in ("together", "bank", "memory")}


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_no_batch_norm_is_an_error_and_not_silence(tool):
    with pytest.raises(ArgumentError, match=r"batch norm layers .*got a Sequential with none"):
        tool(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    with pytest.raises(ArgumentError, match=r"expected a torch.nn.Module, got list"):
        tool([BatchNorm(2)])


@pytest.mark.parametrize("tool", OWN.values(), ids=OWN)
def test_what_only_our_layers_can_do_names_the_others(tool):
    model = nn.Sequential(BatchNorm(2), nn.Sequential(nn.BatchNorm1d(2)))
    with pytest.raises(ArgumentError, match=r"got BatchNorm1d at '1\.0'"):
        tool(model)
    assert "banks" not in model[0]._modules
    assert torch.equal(model[0].num_batches_tracked, torch.tensor(0))
