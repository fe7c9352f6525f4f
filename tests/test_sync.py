"""Statistics shared by real processes: as if one of them had the batches of all.

Run as a program, this file is one of the processes: `test_sync.py RANK WORLD FOLDER SUITE`.
"""

import contextlib
import copy
import datetime as dt
import functools
import os
import pickle
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import oracle
from batchnorm import (
    ArgumentError,
    BatchNorm,
    BatchNormError,
    InputError,
    Renorm,
    SyncError,
    accumulate_statistics,
    batch_norm,
    forward_together,
    freeze,
)
from batchnorm.kernels import native
from batchnorm.sync import Synchronizer
from processes import launch, leave

AT_ONCE = Renorm(1.5, 0.3, r_steps=(0, 0), d_steps=(0, 0))

#: Samples on each rank: even, uneven, with empty ranks, more ranks than fill a group of samples.
SIZES = {1: [[7]], 2: [[6, 2], [0, 5]], 3: [[5, 0, 3]], 4: [[2, 7, 1, 4]]}

OPTIONS = {
    "plain": {},
    "activation": {"activation": "leaky_relu"},
    "callable": {"activation": torch.tanh},
    "channels last": {"channel_dim": -1},
    "ghost": {"virtual_batch_size": 3},
    "large ghost": {"virtual_batch_size": 6},
    "renorm": {"renorm": AT_ONCE},
    "ghost, renorm": {"virtual_batch_size": 3, "renorm": AT_ONCE, "activation": "relu"},
    "average": {"momentum": None},
    "no affine": {"affine": False},
    "no affine, renorm": {"affine": False, "renorm": AT_ONCE},
}
MASKS = (None, "bool", "weights")
STEPS = 2
CASES = [(name, mask, torch.float64) for name in OPTIONS for mask in MASKS]
CASES += [(name, "bool", torch.float32) for name in ("plain", "ghost", "ghost, renorm")]


def data(samples, channel_dim, dtype, step):
    """x, residual, cotangent, cotangent of the gradient; masks by kind. Of all ranks together."""
    generator = torch.Generator().manual_seed(10 * samples + step)
    shape = (samples, 5, 3) if channel_dim == -1 else (samples, 3, 5)
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    draw[0] = draw[0] * 2 + 5
    weights = torch.rand(samples, 5, generator=generator, dtype=torch.float64)
    masks = {None: None, "bool": weights > 0.3, "weights": weights + 0.2}
    return [t.to(dtype) for t in draw], masks


def layer(name, dtype, group):
    generator = torch.Generator().manual_seed(3)
    bn = BatchNorm(3, dtype=dtype, process_group=group, **OPTIONS[name])
    with torch.no_grad():
        for tensor in (*bn.parameters(), bn.running_mean, bn.running_var):
            tensor.copy_(torch.rand(3, generator=generator) + 0.5)
    return bn


def steps(name, mask_kind, dtype, part, group, samples):
    """What some training steps give: per step y, gradients and second-order ones; buffers; eval."""
    bn = layer(name, dtype, group)
    results = []
    for step in range(STEPS):
        (x, residual, dy, ddx), masks = data(samples, bn.channel_dim, dtype, step)
        mask = masks[mask_kind]
        mask = None if mask is None else mask[part]
        x, residual = (t[part].clone().requires_grad_() for t in (x, residual))
        y = bn(x, mask, residual)
        inputs = [x, residual, *bn.parameters()]
        gradients = torch.autograd.grad(y, inputs, dy[part], retain_graph=True)
        (dx,) = torch.autograd.grad(y, [x], dy[part], create_graph=True)
        second = torch.autograd.grad(dx, [x], ddx[part])
        results.append([t.detach() for t in (y, *gradients, *second)])
    return results, [b.clone() for b in bn.buffers()], bn.eval()(x.detach()).detach()


def equality(rank, world):
    """Every case, with and without the C++ kernels."""
    results = {}
    for sizes in SIZES[world]:
        part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for case in CASES:
            for missing in {native.MISSING, "left out"}:
                native.MISSING, before = missing, native.MISSING
                results[tuple(sizes), case, missing] = steps(*case, part, "world", sum(sizes))
                native.MISSING = before
    return results


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


class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def disagreements(rank, world):
    """The message of each; every rank gets one, and nothing has changed."""
    f32, f64 = torch.float32, torch.float64
    other = bool(rank)
    results = {}

    def told(name, bn, x, mask=None):
        before = copy.deepcopy(bn.state_dict())
        with pytest.raises(BatchNormError) as caught:
            bn(x, mask)
        results[name] = type(caught.value).__name__, str(caught.value)
        for key, value in bn.state_dict().items():
            assert torch.equal(value, before[key])

    channels = 3 + rank
    told("channels", BatchNorm(channels, process_group="world"), torch.randn(4, channels))
    dtype = f64 if other else f32
    told("dtype", BatchNorm(3, process_group="world", dtype=dtype), torch.randn(4, 3, dtype=dtype))
    size = 2 if other else None
    told("ghost", BatchNorm(3, process_group="world", virtual_batch_size=size), torch.randn(4, 3))
    renorm = AT_ONCE if other else None
    told("renorm", BatchNorm(3, process_group="world", renorm=renorm), torch.randn(4, 3))
    for later in (False, True):
        bn = BatchNorm(3, process_group="world")
        if later:
            bn(torch.randn(4, 3))
            told("dtype later", bn, torch.randn(4, 3, dtype=dtype))
        told(f"gradient, {later}", bn, torch.randn(4, 3, requires_grad=other))
    ghost = BatchNorm(3, process_group="world", virtual_batch_size=3)
    ghost(torch.randn(4, 3))
    counted = BatchNorm(3, process_group="world")
    counted(torch.randn(4, 3))
    if other:  # as if it had been in eval() for a while
        counted._sync.calls -= 1
    told("calls", counted, torch.randn(4, 3))
    told("dtype later, ghost", ghost, torch.randn(4, 3, dtype=dtype))
    told("one value", BatchNorm(3, process_group="world"), torch.randn(rank, 3))
    told("one in a group", ghost, torch.randn(2, 3))
    mask = torch.zeros(4, dtype=torch.bool)
    mask[0] = other
    told("masked", BatchNorm(3, process_group="world"), torch.randn(4, 3), mask)

    bn, x = BatchNorm(3, process_group="world"), torch.randn(4, 3, requires_grad=True)
    with torch.set_grad_enabled(other):
        told("gradient mode", bn, x)
    network_of_one = nn.Sequential(BatchNorm(3, process_group="world"))
    together = functools.partial(forward_together, network_of_one)
    run, given = (together, [x]) if other else (network_of_one, x)
    with pytest.raises(SyncError, match="same forward_together"):
        run(given)

    # Who is watched computes otherwise, and sends the same.
    y = bn(x).sin().sum()
    with Watched() if other else contextlib.nullcontext():
        y.backward()

    bn = BatchNorm(3, process_group="world")
    bn(torch.randn(0, 3))  # empty everywhere: no step
    assert bn.num_batches_tracked == 0
    bn(torch.randn(4, 3), torch.full((4,), other))  # all masked here: a step
    assert bn.num_batches_tracked == 1
    return results


def absence(rank, world, how):
    """One process is not there: (seconds, message) of the other."""
    bn = BatchNorm(3, process_group="world")
    x = torch.randn(4, 3, requires_grad=True)
    y = bn(x)
    if how == "eval" and rank == 1:
        bn.eval()
    before = copy.deepcopy(bn.state_dict())
    if how == "dies before backward" and rank == 1:
        os._exit(7)
    if how != "dies before backward":
        y.sin().sum().backward()
    if how == "dies before forward" and rank == 1:
        os._exit(7)
    start = time.monotonic()

    def go_on():
        if how == "dies before backward":
            y.sin().sum().backward()
        while True:  # the rank in eval is told by what it does next
            bn(x).sin().sum().backward()
            time.sleep(0.1)

    with pytest.raises(SyncError) as caught:
        go_on()
    for key, value in bn.state_dict().items():
        assert torch.equal(value, before[key]) or how == "dies before backward"
    if rank == 0:
        time.sleep(3)  # it keeps the store, in which the other will look
    return time.monotonic() - start, str(caught.value)


TIMEOUT_S = 4
SUITES = (equality, networks, compiled, sharded, disagreements, absence)


def main(rank, world, folder, suite, *arguments):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=dt.timedelta(seconds=TIMEOUT_S if suite == "absence" else 60),
    )
    (run,) = (run for run in SUITES if run.__name__ == suite)
    torch.save(run(rank, world, *arguments), Path(folder) / f"{suite}{rank}.pt")
    if suite != "absence":
        distributed.destroy_process_group()


def results_of(folder, world, suite, *arguments, statuses=None):
    """What the suite gave on each rank that lived."""
    done = launch(__file__, world, folder, suite, *arguments)
    for (status, output), expected in zip(done, statuses or [0] * world, strict=True):
        assert status == expected, output
    files = [folder / f"{suite}{rank}.pt" for rank in range(world)]
    return [torch.load(file, weights_only=False) for file in files if file.exists()]


def close(ours, theirs, dtype, what):
    """To 1e-6 relative in float32, as promised; to rounding in float64."""
    scale = max(float(theirs.abs().max()), 1.0) if theirs.numel() else 1.0
    error = float((ours.double() - theirs.double()).abs().max()) if theirs.numel() else 0.0
    assert ours.shape == theirs.shape
    assert error <= scale * (1e-12 if dtype == torch.float64 else 1e-6), (what, error)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_one_process_with_all_batches(tmp_path, world):
    ranks = results_of(tmp_path, world, "equality")
    for key in ranks[0]:
        sizes, case, missing = key
        dtype = case[2]
        whole, buffers, evaluated = steps(*case, slice(None), None, sum(sizes))
        for step, expected in enumerate(whole):
            parts = [rank[key][0][step] for rank in ranks]
            for index, theirs in enumerate(expected):
                ours = [part[index] for part in parts]
                # Those of γ and β are shares.
                shares = 3 <= index < len(expected) - 1
                ours = sum(ours) if shares else torch.cat(ours)
                close(ours, theirs, dtype, (key, step, index))
        for rank in ranks:
            for ours, theirs in zip(rank[key][1], buffers, strict=True):
                close(ours, theirs, dtype, (key, "buffers"))
        if sizes[-1]:
            close(ranks[-1][key][2], evaluated[-sizes[-1] :], dtype, (key, "eval"))
    for sizes in SIZES[world]:
        check_the_oracle(ranks, sizes)


def check_the_oracle(ranks, sizes):
    """The one process above is ours, too; so once against the truth."""
    (x, residual, dy, _), masks = data(sum(sizes), 1, torch.float64, 0)
    bn = layer("activation", torch.float64, None)
    options = {"mask": masks["weights"], "residual": residual, "activation": "leaky_relu"}
    expected = oracle.forward(x, bn.weight, bn.bias, **options)
    gradients = oracle.backward(dy, x, bn.weight, bn.bias, **options)
    key = tuple(sizes), ("activation", "weights", torch.float64), native.MISSING
    y, dx, dz, d_weight, d_bias, _ = zip(*(rank[key][0][0] for rank in ranks), strict=True)
    for ours, theirs in (
        (torch.cat(y), expected.y),
        (torch.cat(dx), gradients[0]),
        (torch.cat(dz), gradients[3]),
        (sum(d_weight), gradients[1]),
        (sum(d_bias), gradients[2]),
    ):
        close(ours, torch.from_numpy(theirs.astype("float64")), torch.float64, key)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_in_networks(tmp_path, world):
    ranks = results_of(tmp_path, world, "networks")
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


@pytest.mark.slow
def test_compiled(tmp_path):
    for rank in results_of(tmp_path, 2, "compiled"):
        for name, (plain, compiled_ones) in rank.items():
            for ours, theirs in zip(compiled_ones, plain, strict=True):
                close(ours, theirs, torch.float32, name)


def test_fully_sharded(tmp_path):
    ranks = results_of(tmp_path, 2, "sharded")
    model = network(None)
    train(model, network_data(2))
    for rank in ranks:
        for name, theirs in model.state_dict().items():
            close(rank[name], theirs, torch.float64, name)


def test_disagreement_is_told_to_every_rank(tmp_path):
    ranks = results_of(tmp_path, 2, "disagreements")
    names = {
        "channels": "same number of channels .* rank 0: 3, rank 1: 4",
        "dtype": "same dtype .* rank 0: float32, rank 1: float64",
        "ghost": "same virtual_batch_size .* rank 0: None, rank 1: 2",
        "renorm": "same renorm .* rank 0: no, rank 1: yes",
        "gradient, False": "same gradient of the input .* rank 0: not wanted, rank 1: wanted",
        "gradient, True": "same gradient of the input",
        "gradient mode": "same gradient of the input",
        "dtype later": "same dtype",
        "calls": "same number of calls .* rank 0: 2, rank 1: 1",
        "dtype later, ghost": "same dtype",
        "one value": "more than 1 value per channel .* statistics that batches share",
        "one in a group": "each group of virtual_batch_size .* in a group of all",
        "masked": "more than 1 value per channel .* statistics that batches share",
    }
    for rank in ranks:
        assert rank.keys() == names.keys()
        for name, pattern in names.items():
            kind, message = rank[name]
            wanted = InputError if name in ("one value", "one in a group", "masked") else SyncError
            assert kind == wanted.__name__
            assert message.startswith("BatchNorm(")
            assert re.search(pattern, message), message


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies before forward", "dies before backward", "eval"])
def test_absence_is_an_error_within_the_time_out(tmp_path, how):
    statuses = [0, 0 if how == "eval" else 7]
    ranks = results_of(tmp_path, 2, "absence", how, statuses=statuses)
    assert len(ranks) == statuses.count(0)
    for seconds, message in ranks:
        assert seconds < 3 * TIMEOUT_S
        assert "expected all 2 processes" in message
        assert "eval()" in message


def test_under_torchrun(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import torch, torch.distributed as dist\n"
        "from batchnorm import BatchNorm\n"
        "dist.init_process_group('gloo')\n"
        "x = torch.arange(8.0).reshape(4, 2)[dist.get_rank() * 2 :][:2]\n"
        "bn = BatchNorm(2, process_group='world', momentum=1.0)\n"
        "bn(x)\n"
        "assert bn.running_mean.tolist() == [3.0, 4.0], bn.running_mean\n"
        "print('right')\n"
        "dist.destroy_process_group()\n"
        "from processes import leave\n"
        "leave()\n"
    )
    ((status, output),) = launch(program, 2, torchrun=True)
    assert status == 0, output
    assert output.count("right") == 2


def test_alone_in_a_group(tmp_path):
    """The plain layer, by the plain way; and a program's own errors stay what they are."""
    distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        bn, plain, x = BatchNorm(3, process_group="world"), BatchNorm(3), torch.randn(4, 3)
        assert torch.equal(bn(x), plain(x))
        assert bn(x.requires_grad_()).grad_fn.name() == plain(x).grad_fn.name()
        bn.process_group = distributed.group.WORLD
        assert pickle.loads(pickle.dumps(bn)).process_group == "world"

        def mistaken(_):
            raise RuntimeError("No backend type associated with device type cpu")

        sync = Synchronizer(distributed.group.WORLD)
        with pytest.raises(RuntimeError, match="No backend") as caught:
            sync._run(mistaken)
        assert not isinstance(caught.value, SyncError)
        sync.listen()  # nobody is gone
    finally:
        distributed.destroy_process_group()


def test_what_is_no_group():
    for wrong in ("World", 3, -100, object()):
        with pytest.raises(ArgumentError, match="process group"):
            BatchNorm(3, process_group=wrong)
    bn, x = BatchNorm(3, process_group="world"), torch.randn(4, 3)
    torch.testing.assert_close(bn(x), BatchNorm(3)(x))  # nobody to share with
    bn.process_group = "nobody"
    with pytest.raises(ArgumentError, match="process group"):
        bn(x)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
    leave()
