"""Shared statistics in whole models: DDP, FSDP, sub-groups, checkpointing, tools, compilation."""

import copy
import pickle

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from batchnorm import (
    ArgumentError,
    BatchNorm,
    accumulate_statistics,
    batch_norm,
    forward_together,
    freeze,
)
from sync_ranks import STEPS, close, data, layer, results_of, serve


def network(group):
    torch.manual_seed(0)
    bn = BatchNorm(4, process_group=group)
    return nn.Sequential(nn.Linear(1, 4), bn, nn.Tanh(), nn.Linear(4, 2)).double()


def network_data(world):
    return torch.randn(6 * world, 1, generator=torch.Generator().manual_seed(1)).double()


def state(model):
    """Gradients, or zeros, and buffers."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [*gradients, *(b.clone() for b in model.buffers())]


def networks(rank, world):
    """Models around it: DDP with two forward passes, sub-groups, checkpointing, accumulation."""
    results = {}
    model = DistributedDataParallel(network("world"))
    x = network_data(world)
    mine = x[rank::world]
    (model(mine[:4]).sin().mean() + model(mine[4:]).cos().mean()).backward()
    results["ddp"] = state(model.module)

    pairs = [distributed.new_group([0, 1]), distributed.new_group([2, 3])] if world == 4 else []
    if pairs:
        model = network(pairs[rank // 2])
        model(mine).sin().sum().backward()
        results["pairs"] = state(model)
        with pytest.raises(ArgumentError, match="process group"):
            BatchNorm(4, process_group=pairs[1 - rank // 2])

    for reentrant in (True, False):
        model = network("world")
        leaf = mine.clone().requires_grad_()
        checkpoint(model, leaf, use_reentrant=reentrant).sin().sum().backward()
        results["checkpoint", reentrant] = [*state(model), leaf.grad]

    model = network("world")
    with accumulate_statistics(model):
        for part in mine.split(3):
            model(part)
    results["accumulate"] = state(model)

    model = network("world")
    leaf = mine.clone().requires_grad_()
    outputs = forward_together(model, leaf.split([5, 1]))
    sum(y.sin().sum() for y in outputs).backward()
    results["together"] = [*state(model), leaf.grad]

    bn = layer("plain", torch.float64, "world")
    y = batch_norm(mine.expand(6, 3), None, None, bn.weight, training=True, process_group="world")
    results["function"] = [y.detach()]

    bn.eval()(mine.expand(6, 3))  # needs nobody
    freeze(bn.train())
    if rank == 0:
        bn(mine.expand(6, 3))  # nor does this
    copied = copy.deepcopy(bn)
    assert copied.process_group == "world"
    bn.process_group = distributed.group.WORLD
    assert copy.deepcopy(bn).process_group is distributed.group.WORLD
    assert pickle.loads(pickle.dumps(bn)).process_group == "world"
    if pairs:
        bn.process_group = pairs[rank // 2]
        assert copy.deepcopy(bn).process_group is pairs[rank // 2]
        with pytest.raises(ArgumentError, match="state_dict"):
            pickle.dumps(bn)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_in_networks(tmp_path, world):
    ranks = results_of(__file__, tmp_path, world, "networks")
    x = network_data(world)

    def check(name, expected, rank=0, count=None):
        for ours, theirs in zip(ranks[rank][name][:count], expected[:count], strict=True):
            close(ours, theirs, torch.float64, name)

    model = network(None)
    halves = [
        torch.cat([x[r::world][part] for r in range(world)]) for part in (slice(4), slice(4, 6))
    ]
    (model(halves[0]).sin().mean() + model(halves[1]).cos().mean()).backward()
    for rank in range(world):
        check("ddp", state(model), rank)

    for pair in range(world // 4 * 2):
        model = network(None)
        model(torch.cat([x[r::world] for r in (2 * pair, 2 * pair + 1)])).sin().sum().backward()
        theirs = state(model)
        members = [ranks[2 * pair]["pairs"], ranks[2 * pair + 1]["pairs"]]
        for index, value in enumerate(theirs):
            parameter = index < len(list(model.parameters()))
            ours = [member[index] for member in members]
            close(sum(ours) if parameter else ours[0], value, torch.float64, "pairs")

    model = network(None)
    leaf = x.clone().requires_grad_()
    model(leaf).sin().sum().backward()
    parameters = len(list(model.parameters()))
    for name in (("checkpoint", True), ("checkpoint", False), "together"):
        for index, theirs in enumerate(state(model)):
            ours = [rank[name][index] for rank in ranks]
            close(sum(ours) if index < parameters else ours[0], theirs, torch.float64, name)
        for rank in range(world):
            close(ranks[rank][name][-1], leaf.grad[rank::world], torch.float64, name)

    model = network(None)
    with torch.no_grad():
        model(x)
    check("accumulate", state(model))

    bn = layer("plain", torch.float64, None)
    whole = torch.cat([x[rank::world] for rank in range(world)]).expand(-1, 3)
    y = batch_norm(whole, None, None, bn.weight, training=True)
    close(torch.cat([rank["function"][0] for rank in ranks]), y.detach(), torch.float64, "function")


def compiled(rank, world):
    """The same numbers in one graph, forward and backward, as uncompiled."""
    results = {}
    for name in ("plain", "activation", "renorm"):
        torch._dynamo.reset()
        outcomes = []
        for compile_it in (False, True):
            bn = layer(name, torch.float32, "world")
            run = torch.compile(bn, fullgraph=True, backend="aot_eager") if compile_it else bn
            for step in range(STEPS):
                (x, residual, dy, _), _ = data(4 + rank, 1, torch.float32, step)
                x.requires_grad_()
                y = run(x, None, residual)
                gradients = torch.autograd.grad(y, [x, *bn.parameters()], dy)
            outcomes.append([y.detach(), *gradients, *bn.buffers()])
        results[name] = outcomes
    return results


@pytest.mark.slow
def test_compiled(tmp_path):
    for rank in results_of(__file__, tmp_path, 2, "compiled"):
        for name, (plain, compiled_ones) in rank.items():
            for ours, theirs in zip(compiled_ones, plain, strict=True):
                close(ours, theirs, torch.float32, name)


def sharded(rank, world):
    """FSDP2: three steps of SGD."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x = network("world"), network_data(world)
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, x[rank::world])
    full = model.state_dict().items()
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for k, v in full}


def train(model, x):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).sin().mean().backward()
        optimizer.step()


def test_fully_sharded(tmp_path):
    ranks = results_of(__file__, tmp_path, 2, "sharded")
    model = network(None)
    train(model, network_data(2))
    for rank in ranks:
        for name, theirs in model.state_dict().items():
            close(rank[name], theirs, torch.float64, name)


if __name__ == "__main__":
    serve(networks, compiled, sharded)
