"""A converted SyncBatchNorm shares its statistics, on the CPU too; converting asks nobody."""

import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm import convert, revert
from processes import launch, leave

WORLD = 2
SIZES = (3, 5)


def network(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), layer(4), nn.Tanh(), nn.Linear(4, 1))


def data():
    return torch.randn(sum(SIZES), 3, generator=torch.Generator().manual_seed(1)).split(SIZES)


def work(rank, folder):
    """One process: a step on its part of the batch."""
    store = f"file://{folder / 'rendezvous'}"
    distributed.init_process_group("gloo", store, rank=rank, world_size=WORLD)
    if rank == 0:  # alone: the other one would be waited for
        alone = revert(convert(network(nn.SyncBatchNorm)))
        assert type(alone[1]) is nn.SyncBatchNorm
        alone[1].process_group = distributed.group.WORLD
        assert convert(alone)[1].process_group is distributed.group.WORLD
        assert revert(alone)[1].process_group is distributed.group.WORLD
    model = DistributedDataParallel(convert(network(nn.SyncBatchNorm)))
    # DistributedDataParallel takes the mean over processes.
    loss = model(data()[rank]).square().sum() * WORLD / sum(SIZES)
    loss.backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters()}
    torch.save((gradients, dict(model.module.named_buffers())), folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_it_is_as_if_one_process_had_all(tmp_path):
    for status, output in launch(__file__, WORLD, tmp_path):
        assert status == 0, output
    model = network(nn.BatchNorm1d)
    model(torch.cat(data())).square().mean().backward()
    for rank in range(WORLD):
        gradients, buffers = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert gradients.keys() == dict(model.named_parameters()).keys()
        # Sums of 8 products of size 1 through two layers, to 2⁻²⁴ each.
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-5)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffers[name], buffer, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[3]))
    leave()
