"""What a graph keeps, the most memory that a training step takes, and how long it takes.

    python benchmarks/memory.py [--device cuda] [--json FILE]        about three minutes on a CPU

A small ResNet of bottleneck blocks and a small DenseNet: with torch's layers, with ours, within
`save_memory`, and with `torch.utils.checkpoint` around each block. All compute the same step. Bytes
are counted by `saved_tensors_hooks` (each storage once, parameters left out) and by torch's
allocator; times are taken in turns in one run, by the median of the ratios of each round.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm, convert, save_memory
from batchnorm.bench import estimate, measure
from batchnorm.bench.allocations import allocations
from batchnorm.bench.device import stopwatch
from batchnorm.bench.environment import environment

SEED = 0
ROUNDS = 21
#: Of the network that tells what a layer takes of the host: layers, images, their numbers.
TINY = (10, 32, 64)

#: By device: images, their side, channels of a block's narrow part, blocks.
SIZES = {"cpu": (8, 28, 32, 8), "cuda": (128, 56, 64, 8)}
#: Columns of the page in MiB.
BYTES = ("peak_bytes", "held_bytes", "kept_bytes")
SLOPES = {"relu": 0.0, "leaky_relu": 0.01}


class Norm(nn.Module):
    """A batch norm layer with what follows it: fused as in ours, or as one writes it in torch."""

    def __init__(self, channels: int, activation: str | None, ours: bool) -> None:
        super().__init__()
        self.norm: nn.Module
        self.after: nn.Module | None = None
        if ours:
            self.norm = BatchNorm(channels, activation=activation)
        else:
            self.norm = nn.BatchNorm2d(channels)
            if activation is not None:
                self.after = (
                    nn.ReLU(inplace=True)
                    if activation == "relu"
                    else nn.LeakyReLU(SLOPES[activation], inplace=True)
                )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y = activation(BN(x) + residual)."""
        if isinstance(self.norm, BatchNorm) and self.after is None:
            y: Tensor = self.norm(x, residual=residual)
            return y
        y = self.norm(x)
        y = y if residual is None else y + residual
        return y if self.after is None else self.after(y)


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 with four times the channels, and the way around them."""

    def __init__(self, width: int, activation: str, ours: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(4 * width, width, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.third = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.norms = nn.ModuleList(Norm(c * width, activation, ours) for c in (1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        y = self.norms[0](self.first(x))
        y = self.norms[1](self.second(y))
        z: Tensor = self.norms[2](self.third(y), x)
        return z


class Dense(nn.Module):
    """BN, 1×1, BN, 3×3 of all that came before; its channels are added to them."""

    def __init__(self, channels: int, width: int, activation: str, ours: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 4 * width, 1, bias=False)
        self.second = nn.Conv2d(4 * width, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(Norm(c, activation, ours) for c in (channels, 4 * width))

    def forward(self, x: Tensor) -> Tensor:
        """With `width` more channels."""
        y = self.first(self.norms[0](x))
        return torch.cat([x, self.second(self.norms[1](y))], 1)


def network(kind: str, activation: str, ours: bool, width: int, blocks: int) -> nn.Sequential:
    """The blocks between a first convolution and a last."""
    torch.manual_seed(SEED)
    start = 4 * width
    middle: list[nn.Module]
    if kind == "ResNet":
        middle = [Bottleneck(width, activation, ours) for _ in range(blocks)]
        end = start
    else:
        grow = width // 2
        middle = [Dense(start + i * grow, grow, activation, ours) for i in range(blocks)]
        end = start + blocks * grow
    return nn.Sequential(nn.Conv2d(3, start, 3, padding=1), *middle, nn.Conv2d(end, 8, 1))


@dataclass(frozen=True)
class Contender:
    """A network, what is around its forward pass, and whether its blocks are checkpointed."""

    model: nn.Sequential
    around: Callable[[nn.Module], Any] = lambda _: contextlib.nullcontext()
    checkpointed: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        with self.around(self.model):
            for block in self.model:
                whole = not self.checkpointed or isinstance(block, nn.Conv2d)
                x = block(x) if whole else checkpoint(block, x, use_reentrant=False)
            return x.square().mean()

    def step(self, x: Tensor) -> None:
        """Forward and backward."""
        self.forward(x).backward()


def contenders(kind: str, activation: str, device: str) -> dict[str, Contender]:
    """All of one network, with the same parameters."""
    _, _, width, blocks = SIZES[device]
    theirs = network(kind, activation, False, width, blocks).to(device)
    ours = network(kind, activation, True, width, blocks).to(device)
    ours.load_state_dict(theirs.state_dict())
    found = {
        "torch": Contender(theirs),
        "torch, checkpoint": Contender(copy.deepcopy(theirs), checkpointed=True),
        "ours": Contender(ours),
        "ours, checkpoint": Contender(copy.deepcopy(ours), checkpointed=True),
        "converted, input": Contender(convert(copy.deepcopy(theirs)), save_memory),
        "ours, input": Contender(copy.deepcopy(ours), save_memory),
    }
    if activation == "leaky_relu":
        found["ours, output"] = Contender(
            copy.deepcopy(ours), lambda model: save_memory(model, keep="output")
        )
    return found


def kept(contender: Contender, x: Tensor) -> int | None:
    """What the graph keeps by `saved_tensors_hooks`; None where checkpointing has hooks of its own.

    Within `save_memory`: the same without it, less what it says that it saves.
    """
    if contender.checkpointed:
        return None
    alone = Contender(contender.model)
    with contender.around(contender.model) as savings:
        alone.forward(x)
    return saved_bytes(alone, x) - (savings.bytes if savings is not None else 0)


def saved_bytes(contender: Contender, x: Tensor) -> int:
    """What all operations save, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in contender.model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = contender.forward(x)
    del loss
    return sum(sizes.values())


def rows(device: str) -> list[dict[str, Any]]:
    """Every network by every contender."""
    number, side, _, _ = SIZES[device]
    found = []
    for kind, activation in (("ResNet", "relu"), ("DenseNet", "relu"), ("ResNet", "leaky_relu")):
        x = torch.randn(number, 3, side, side, device=device)
        all_ = contenders(kind, activation, device)
        agree(all_, x)  # and gradients have their memory from here on
        sizes = {name: row(contender, x, device) for name, contender in all_.items()}
        times = measure.rounds(
            {name: partial(contender.step, x) for name, contender in all_.items()},
            ROUNDS,
            seed=SEED,
            # Of the processor, which others' work is not in; a GPU works beside it.
            clock=time.process_time,
            stopwatch=stopwatch(device),  # on a CPU, the clock
        )
        for name, size in sizes.items():
            ratios = estimate.ratios(times[name].seconds, times["torch"].seconds)
            found.append(
                {"network": kind, "activation": activation, "contender": name, **size}
                | {"ms": times[name].us / 1e3, "ratio": statistics.median(ratios)}
                | {"interval": estimate.interval(ratios)}
            )
    return found


def host() -> dict[str, dict[str, Any]]:
    """What `save_memory` takes of the host for a layer, by `keep`: in steps of a tiny network."""
    layers, number, width = TINY
    torch.manual_seed(SEED)
    middle = (
        (nn.Linear(width, width), BatchNorm(width, activation="leaky_relu")) for _ in range(layers)
    )
    model = nn.Sequential(*(layer for block in middle for layer in block), nn.Linear(width, 8))
    x = torch.randn(number, width)
    all_ = {"usual": Contender(model)} | {
        keep: Contender(copy.deepcopy(model), partial(save_memory, keep=keep))
        for keep in ("input", "output")
    }
    times = measure.rounds(
        {name: partial(contender.step, x) for name, contender in all_.items()},
        ROUNDS,
        seed=SEED,
        clock=time.process_time,
    )
    usual = times.pop("usual").seconds
    found = {}
    for keep, time_ in times.items():
        ratios = estimate.ratios(time_.seconds, usual)
        more = statistics.median(a - b for a, b in zip(time_.seconds, usual, strict=True))
        found[keep] = {
            "layer_us": more * 1e6 / layers,
            "ratio": statistics.median(ratios),
            "interval": estimate.interval(ratios),
        }
    return found


def row(contender: Contender, x: Tensor, device: str) -> dict[str, Any]:
    """The bytes of one."""
    forward = allocations(partial(contender.forward, x), device)
    step = allocations(partial(contender.step, x), device)
    return {
        "input_bytes": x.nbytes,
        "kept_bytes": kept(contender, x),
        "held_bytes": forward.held,
        "peak_bytes": step.peak,
    }


def agree(all_: dict[str, Contender], x: Tensor) -> None:
    """All have the same gradients, but for elements within a rounding of the activation's bend."""
    grads = {}
    for name, contender in all_.items():
        contender.model.zero_grad()
        contender.step(x)
        grads[name] = torch.cat([p.grad.flatten() for p in contender.model.parameters()])
    for name, found in grads.items():
        error = float((found - grads["torch"]).norm() / grads["torch"].norm())
        if not error < 1e-3:
            raise SystemExit(f"expected the gradients of torch's layers, got {name}, {error} off")


def page(content: dict[str, Any]) -> str:
    """The results as a page."""
    where = content["environment"]
    number, side, width, blocks = content["sizes"]
    words = [
        "# Memory: what a training step keeps, its peak, its time\n",
        f"Made by `python benchmarks/memory.py --device {content['device']}`, {where['date']}: "
        f"batchnorm {where['batchnorm']}, commit {where['commit']}, torch {where['torch']}, Python "
        f"{where['python']}, {where['cpu']}, device {where['device']}, {where['threads']} thread"
        f"{'s' * (where['threads'] > 1)} of {where['cores']} cores.\n",
        f"{number} images of {side}×{side}, float32; {blocks} bottleneck blocks of width {width} "
        f"and {4 * width} channels, or {blocks} dense ones that add {width // 2}.\n",
        "Each row is a network by one of these:\n",
        "- *torch*: with torch's layers; *ours*: with `BatchNorm`, the activation and the residual "
        "fused; *converted*: torch's network after `convert`.",
        "- *checkpoint*: `torch.utils.checkpoint` around each block.",
        "- *input*, *output*: within `save_memory`, with this `keep`.\n",
        "And each column:\n",
        "- *Peak*: the most memory at any time of a step, over what there was before (parameters, "
        "their gradients, the images); beside torch's, and in MiB.",
        "- *Time*: of a step, beside that of torch's layers in the same round, the median; *from* "
        "and *to*: what holds the true one with 95 % confidence in this run.",
        "- *Held*: MiB that the allocator has given and not taken back when the forward pass is "
        "done.",
        "- *Kept*: MiB that `saved_tensors_hooks` sees, each storage once, without parameters; "
        "within `save_memory`, which has hooks of its own, the same less what it says that it "
        "saves. Not known (–) where checkpointing has hooks of its own.",
    ]
    for network_, activation in dict.fromkeys(
        (row["network"], row["activation"]) for row in content["rows"]
    ):
        words += [
            f"\n## {network_}, {activation}\n",
            "| | peak | time | from | to | peak, MiB | held | kept |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        group = {
            row["contender"]: row
            for row in content["rows"]
            if (row["network"], row["activation"]) == (network_, activation)
        }
        for name, row in group.items():
            cells = [
                name,
                f"{row['peak_bytes'] / group['torch']['peak_bytes']:.2f}",
                *times(row),
                *("–" if row[of] is None else f"{row[of] / 2**20:.1f}" for of in BYTES),
            ]
            words.append(f"| {' | '.join(cells)} |")
    layers, images, numbers = content["tiny"]
    words += [
        "\n## What it takes of the host\n",
        "The processor's time, forward and backward, of a step on the CPU of a network so small "
        f"that little else takes any: {layers} linear layers, each with a `BatchNorm` after it, "
        f"{images} images of {numbers} numbers. *A layer*: how much more each takes, "
        "the median over the number of layers; hooks in Python, whatever the size of the tensors. "
        "*Step*: the whole step, beside the same without `save_memory`. A GPU with work ahead of "
        "it does not wait for that; one that waits for its host does.\n",
        "| keep | a layer | step | from | to |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {keep} | {row['layer_us']:.0f} µs | {' | '.join(times(row))} |"
            for keep, row in content["host"].items()
        ),
    ]
    return "\n".join(words) + "\n"


def times(row: dict[str, Any]) -> tuple[str, ...]:
    """A ratio, and how sure it is."""
    return tuple(f"{ratio:.2f}" for ratio in (row["ratio"], *row["interval"]))


def main() -> None:
    """Measure, print the page, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=sorted(SIZES), default="cpu")
    parser.add_argument("--json", type=Path, help="where to write; the page goes beside it")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none: measure the CPU with --device cpu")
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    content = {
        "environment": environment(arguments.device, SEED),
        "device": arguments.device,
        "sizes": SIZES[arguments.device],
        "tiny": TINY,
        "host": host(),
        "rows": rows(arguments.device),
    }
    text = page(content)
    sys.stdout.write(text)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
        arguments.json.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
