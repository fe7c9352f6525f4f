"""DistributedDataParallel in two real processes: two forward passes, then one backward pass."""

import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm import BatchNorm
from processes import launch, leave

WORLD = 2
PASSES = {"train, train": (True, True), "train, eval": (True, False), "eval, train": (False, True)}
CASES = [
    (passes, broadcast, dtype)
    for passes in PASSES
    for broadcast in (True, False)
    for dtype in (torch.float32, torch.float64)
]


def network(dtype):
    torch.manual_seed(0)
    bn = BatchNorm(4)
    with torch.no_grad():
        for tensor in (*bn.parameters(), *list(bn.buffers())[:2]):
            tensor.uniform_(0.5, 1.5)
    return nn.Sequential(nn.Linear(3, 4), bn, nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def batches(rank, dtype):
    """(x, cotangent) of each pass, different ones on each rank."""
    generator = torch.Generator().manual_seed(1 + rank)
    shapes = ((6, 3), (6, 2)), ((4, 3), (4, 2))
    return [[torch.randn(s, generator=generator).to(dtype) for s in pair] for pair in shapes]


def work(rank, folder):
    """One process: runs every case and saves what it leaves behind."""
    store = f"file://{folder / 'rendezvous'}"
    distributed.init_process_group("gloo", store, rank=rank, world_size=WORLD)
    results = []
    for passes, broadcast, dtype in CASES:
        model = DistributedDataParallel(network(dtype), broadcast_buffers=broadcast)
        loss = torch.zeros((), dtype=dtype)
        for training, (x, cotangent) in zip(PASSES[passes], batches(rank, dtype), strict=True):
            loss = loss + (model.train(training)(x) * cotangent).sum()
        loss.backward()
        gradients = {name: p.grad for name, p in model.module.named_parameters()}
        results.append((gradients, dict(model.module.named_buffers())))
    torch.save(results, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results[rank][case]: gradients and buffers."""
    folder = tmp_path_factory.mktemp("ddp")
    for status, output in launch(__file__, WORLD, folder):
        assert status == 0, output
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


def by_hand(passes, broadcast):
    """The same in one process, in float64 and elementary operations."""
    model = network(torch.float64)
    parameters = dict(model.named_parameters())
    w1, b1, gamma, beta, w2, b2 = parameters.values()
    buffers = [(model[1].running_mean, model[1].running_var)] * WORLD
    loss = torch.zeros((), dtype=torch.float64)
    for index, training in enumerate(PASSES[passes]):
        if broadcast:  # of the first process's buffers, before every forward pass
            buffers = [buffers[0]] * WORLD
        for rank in range(WORLD):
            x, cotangent = batches(rank, torch.float64)[index]
            h = x @ w1.T + b1
            mean, var = buffers[rank]
            if training:
                unbiased, batch_mean = torch.var_mean(h.detach(), 0, correction=1)
                buffers[rank] = 0.9 * mean + 0.1 * batch_mean, 0.9 * var + 0.1 * unbiased
                mean, var = h.mean(0), (h - h.mean(0)).square().mean(0)
            h = ((h - mean) / (var + 1e-5).sqrt() * gamma + beta).tanh()
            loss = loss + ((h @ w2.T + b2) * cotangent).sum() / WORLD  # DDP takes the mean
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True)), buffers


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(case) for case in CASES])
def test_gradients_and_buffers_are_those_computed_by_hand(results, case):
    passes, broadcast, dtype = CASES[case]
    expected, buffers = by_hand(passes, broadcast)
    # Sums of 20 products of size 1, through two layers, and 1/σ ≤ 3: 1e2 roundings to eps/2.
    tolerance = 50 * torch.finfo(dtype).eps
    for rank in range(WORLD):
        gradients, left = results[rank][case]
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient.double(), expected[name], rtol=tolerance, atol=tolerance
            )
        for name, value in zip(("1.running_mean", "1.running_var"), buffers[rank], strict=True):
            torch.testing.assert_close(left[name].double(), value, rtol=tolerance, atol=tolerance)
        assert left["1.num_batches_tracked"] == sum(PASSES[passes])


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[3]))
    leave()
