"""save_memory in two real processes that share gradients, and statistics."""

import contextlib
import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm import BatchNorm, save_memory
from processes import launch, leave

WORLD = 2


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), BatchNorm(8, activation="leaky_relu", process_group="world"),
        nn.Conv2d(8, 8, 3), BatchNorm(8, process_group="world"), nn.ReLU(), nn.Conv2d(8, 2, 1),
    )  # fmt: skip


def work(rank, folder):
    """One process: a step as usual, and by either way of saving."""
    store = f"file://{folder / 'rendezvous'}"
    distributed.init_process_group("gloo", store, rank=rank, world_size=WORLD)
    torch.manual_seed(1 + rank)
    x, results = torch.randn(3 + rank, 3, 9, 8), {}
    for keep in ("both", "input", "output"):
        model = DistributedDataParallel(copy.deepcopy(network()))
        around = contextlib.nullcontext() if keep == "both" else save_memory(model, keep)
        with around as saved:
            y = model(x)
        torch.manual_seed(2 + rank)
        y.backward(torch.randn(y.shape))
        gradients = [p.grad for p in model.parameters()]
        layers = {} if saved is None else saved.layers
        results[keep] = gradients + list(model.buffers()), layers
    torch.save(results, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_the_same_gradients(tmp_path):
    for status, output in launch(__file__, WORLD, tmp_path):
        assert status == 0, output
    for rank in range(WORLD):
        results = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        usual, _ = results["both"]
        for keep in ("input", "output"):
            found, saved = results[keep]
            sizes = [(3 + rank) * 8 * h * w * 4 for h, w in ((7, 6), (5, 4))]
            wanted = sizes if keep == "input" else [sizes[0], 0]  # ReLU keeps its own result only
            assert list(saved.values()) == wanted
            exact = {"rtol": 0, "atol": 0} if keep == "input" else {"rtol": 1e-4, "atol": 1e-5}
            for a, b in zip(found, usual, strict=True):
                torch.testing.assert_close(a, b, **exact)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[3]))
    leave()
