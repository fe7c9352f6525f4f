"""Ranks that share statistics: layers and data that they have, and their processes.

A test file that starts processes is their program, too: it ends in a call of `serve`.
"""

import datetime as dt
import sys
from pathlib import Path

import torch
from torch import distributed

from batchnorm import BatchNorm, Renorm
from processes import launch, leave

AT_ONCE = Renorm(1.5, 0.3, r_steps=(0, 0), d_steps=(0, 0))

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

STEPS = 2


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


def serve(*suites, timeout_s=60, all_stay=True):
    """Be one of the processes, `python FILE RANK WORLD FOLDER SUITE …`: run the suite so named.

    Where some leave before the end (not all_stay), nothing is taken down together.
    """
    rank, world, folder, name, *arguments = sys.argv[1:]
    rank, world = int(rank), int(world)
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=dt.timedelta(seconds=timeout_s),
    )
    (run,) = (suite for suite in suites if suite.__name__ == name)
    torch.save(run(rank, world, *arguments), Path(folder) / f"{name}{rank}.pt")
    if all_stay:
        distributed.destroy_process_group()
    leave()


def results_of(script, folder, world, suite, *arguments, statuses=None):
    """What the script's suite gave on each rank that lived."""
    done = launch(script, world, folder, suite, *arguments)
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
