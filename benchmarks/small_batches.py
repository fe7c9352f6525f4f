"""What ghost batches, renormalization and shared statistics cost, against what they replace.

    python benchmarks/small_batches.py [--json FILE]        about two minutes on two cores

Everything is timed in turns in one run, by the median of the ratios of each round. Shared
statistics run in two processes over gloo, one thread each, against the algorithm of torch's
SyncBatchNorm, which refuses the CPU: it is stated here again in torch's operations. Messages are
counted as they are sent, and timed by themselves for the model of many processes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from batchnorm import BatchNorm, Renorm
from batchnorm.bench import estimate, measure
from batchnorm.bench.environment import environment
from batchnorm.sync import Synchronizer

SEED = 0
ROUNDS = 15
WORLD = 2

#: (shape, samples in a group): 16 groups each.
GROUPED = (
    ((64, 64, 56, 56), 4),
    ((64, 256, 14, 14), 4),
    ((32, 512, 7, 7), 2),
    ((128, 32, 8, 8), 8),
    ((2048, 64), 128),
)
SHARED = ((16, 64, 56, 56), (16, 256, 14, 14), (16, 512, 7, 7), (64, 64))

#: Processes of the model, and channels.
PROCESSES = tuple(2**k for k in range(1, 13))
CHANNELS = (64, 512, 2048)


class ChunkLoop(nn.Module):
    """Ghost batches as they are usually written: torch's layer on each piece, one after another."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each piece by its own statistics; update the running ones once for each."""
        return torch.cat([self.layer(piece) for piece in x.split(self.size)])


class TorchSync(torch.autograd.Function):
    """The algorithm of torch.nn.SyncBatchNorm (2.13) in operations that the CPU has.

    Forward: mean and 1/σ of the local batch, gathered with its count in float32 (2C + 1 numbers),
    combined; backward: Σ dy and Σ dy·(x − mean), added over all processes (2C numbers).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        """Normalise by the statistics of all; update the running ones."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        var, mean = torch.var_mean(x, axes, correction=0)
        count = x.new_full((1,), x.numel() // x.shape[1])
        sent = torch.cat([mean, torch.rsqrt(var + layer.eps), count])
        everyones = x.new_empty(distributed.get_world_size(), len(sent))
        _gather(everyones, sent)
        means, inverses, counts = everyones.split([x.shape[1], x.shape[1], 1], 1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        variances = inverses.pow(-2) - layer.eps
        var = ((variances + (means - mean).square()) * counts).sum(0) / total
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(var * (total / (total - 1)), layer.momentum)
        ctx.save_for_backward(x, layer.weight, mean, var, total)
        ctx.eps, ctx.axes = layer.eps, axes
        return torch.batch_norm(
            x, layer.weight, layer.bias, mean, var, False, 0.0, layer.eps, False
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """The gradient of x."""
        x, weight, mean, var, total = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        inverse = torch.rsqrt(var + ctx.eps)
        centred = x - mean.view(shape)
        sums = torch.cat([dy.sum(ctx.axes), (dy * centred).sum(ctx.axes)])
        _counted["all_reduce"].append(sums.numel() * sums.element_size())
        distributed.all_reduce(sums)
        mean_dy, mean_dy_x = (sums / total).chunk(2)
        scale = (mean_dy_x * inverse.square()).view(shape)
        dx = (dy - mean_dy.view(shape) - centred * scale) * (inverse * weight).view(shape)
        return dx, None


_counted: dict[str, list[int]] = {"all_gather": [], "all_reduce": []}


def _gather(everyones: Tensor, sent: Tensor) -> None:
    _counted["all_gather"].append(sent.numel() * sent.element_size())
    distributed.all_gather(list(everyones.unbind()), sent)


def counting(kind: str, send: Callable[[Any, Tensor], Tensor]) -> Any:
    """A method of `Synchronizer` that notes the bytes that this process sends."""

    def counted(self: Synchronizer, values: Tensor) -> Tensor:
        _counted[kind].append(values.numel() * values.element_size())
        return send(self, values)

    return counted


def grouped() -> list[dict[str, Any]]:
    """Ghost batches against a loop, renormalization against plain batch normalization."""
    rows = []
    for shape, size in GROUPED:
        x = torch.randn(shape).requires_grad_()
        dy = torch.randn(shape)
        channels = shape[1]
        torchs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(channels)
        layers = {
            "loop over torch's layer": ChunkLoop(torchs, size),
            "virtual_batch_size": BatchNorm(channels, virtual_batch_size=size),
            "plain": BatchNorm(channels),
            "renorm": BatchNorm(channels, renorm=Renorm()),
        }
        for mode in ("forward", "forward+backward"):
            calls = {name: _call(layer, x, dy, mode) for name, layer in layers.items()}
            times = measure.rounds(calls, ROUNDS, seed=SEED)
            for what, of, against in (
                ("ghost", "virtual_batch_size", "loop over torch's layer"),
                ("ghost", "virtual_batch_size", "plain"),
                ("renorm", "renorm", "plain"),
            ):
                ratios = estimate.ratios(times[against].seconds, times[of].seconds)
                rows.append(
                    {
                        "what": what,
                        "case": "x".join(map(str, shape)),
                        "groups": shape[0] // size,
                        "pass": mode,
                        "peer": against,
                        "ratio": statistics.median(ratios),
                        "interval": estimate.interval(ratios),
                        "ours_us": times[of].us,
                        "peer_us": times[against].us,
                    }
                )
    return rows


def _call(layer: nn.Module, x: Tensor, dy: Tensor, mode: str) -> Callable[[], object]:
    if mode == "forward":
        return torch.no_grad()(lambda: layer(x))
    leaves = (x, *layer.parameters())
    return lambda: torch.autograd.grad(layer(x), leaves, dy)


def shared(rank: int, folder: Path) -> None:
    """One of the processes that share statistics; the first one writes down what it saw."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    Synchronizer._gather = counting("all_gather", Synchronizer._gather)  # type: ignore[method-assign]
    Synchronizer._sum = counting("all_reduce", Synchronizer._sum)  # type: ignore[method-assign]
    torch.manual_seed(rank)
    rows = []
    for shape in SHARED:
        x = torch.randn(shape).requires_grad_()
        dy = torch.randn(shape)
        ours = BatchNorm(shape[1], process_group="world")
        alone = BatchNorm(shape[1])
        theirs = nn.BatchNorm1d(shape[1]) if len(shape) == 2 else nn.BatchNorm2d(shape[1])
        calls = {
            "ours": lambda x=x, dy=dy, m=ours: torch.autograd.grad(m(x), x, dy),
            "torch's algorithm": lambda x=x, dy=dy, m=theirs: torch.autograd.grad(
                TorchSync.apply(x, m), x, dy
            ),
            "ours alone": lambda x=x, dy=dy, m=alone: torch.autograd.grad(m(x), x, dy),
            "torch's layer alone": lambda x=x, dy=dy, m=theirs: torch.autograd.grad(m(x), x, dy),
        }
        torch.testing.assert_close(ours(x), TorchSync.apply(x, theirs), rtol=1e-4, atol=1e-4)
        messages = {}
        for name in ("ours", "torch's algorithm"):
            for sent in _counted.values():
                sent.clear()
            calls[name]()
            messages[name] = {kind: list(sent) for kind, sent in _counted.items()}
        seconds = in_step(calls)
        for peer in ("torch's algorithm", "ours alone", "torch's layer alone"):
            ratios = estimate.ratios(seconds[peer], seconds["ours"])
            rows.append(
                {
                    "what": "sync",
                    "case": "x".join(map(str, shape)),
                    "pass": "forward+backward",
                    "peer": peer,
                    "ratio": statistics.median(ratios),
                    "interval": estimate.interval(ratios),
                    "ours_us": statistics.median(seconds["ours"]) * 1e6,
                    "peer_us": statistics.median(seconds[peer]) * 1e6,
                    "messages": messages["ours"],
                    "peer_messages": messages.get(peer),
                }
            )
    times = message_times()
    if rank == 0:
        (folder / "shared.json").write_text(json.dumps({"rows": rows, "message_us": times}))
    distributed.destroy_process_group()


def in_step(calls: dict[str, Callable[[], object]], loops: int = 8) -> dict[str, list[float]]:
    """Seconds per call in each round. All processes call the same, equally often, in one order."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    shuffle = random.Random(SEED).shuffle  # noqa: S311 - an order, not a secret
    for _ in range(ROUNDS):
        order = list(calls)
        shuffle(order)
        for name in order:
            distributed.barrier()
            start = time.perf_counter()
            for _ in range(loops):
                calls[name]()
            seconds[name].append((time.perf_counter() - start) / loops)
    return seconds


def message_times() -> dict[str, list[list[float]]]:
    """Median microseconds of a message of so many bytes."""
    found: dict[str, list[list[float]]] = {"all_gather": [], "all_reduce": []}
    for doubles in (16, 1024, 16384, 262144, 1048576):
        sent = torch.zeros(doubles, dtype=torch.float64)
        everyones = torch.zeros(WORLD, doubles, dtype=torch.float64)
        for kind, call in (
            ("all_gather", partial(distributed.all_gather, list(everyones.unbind()), sent)),
            ("all_reduce", partial(distributed.all_reduce, sent)),
        ):
            seconds = in_step({kind: call}, loops=4)[kind]
            found[kind].append([sent.nbytes, statistics.median(seconds) * 1e6])
    return found


def line(points: list[list[float]]) -> tuple[float, float]:
    """(µs of a message of no bytes, µs per byte): the lowest size, and the slope of the highest."""
    (_, latency), *_, (n1, t1), (n2, t2) = points
    return latency, (t2 - t1) / (n2 - n1)


def model(message_us: dict[str, list[list[float]]]) -> list[dict[str, float]]:
    """On paper: microseconds of a layer's two messages among many processes.

    From the time α of a short message and β of a byte between two processes, measured here. All
    that the others have must come in when it is gathered: (W − 1)·m·β, whatever the algorithm; in
    rounds that double what is known there are log₂ W of them, each α. Sums take 2·log₂ W·α and
    2·m·β (halving, then doubling). m is 8·(2C + 4) bytes forward and 16·C backward.
    """
    alpha_gather, beta = line(message_us["all_gather"])
    alpha_reduce = line(message_us["all_reduce"])[0] / 2  # two processes take two rounds
    rows = []
    for channels in CHANNELS:
        for world in PROCESSES:
            rounds = math.log2(world)
            gathered = 8 * (2 * channels + 4) * world
            waiting = rounds * alpha_gather
            transfer = gathered * (world - 1) / world * beta
            rows.append(
                {
                    "channels": channels,
                    "processes": world,
                    "gather_bytes": gathered,
                    "gather_rounds_us": waiting,
                    "gather_transfer_us": transfer,
                    "gather_us": waiting + transfer,
                    "reduce_us": 2 * rounds * alpha_reduce + 2 * 16 * channels * beta,
                }
            )
    return rows


def bend(rows: list[dict[str, float]], channels: int) -> float | None:
    """From how many processes on the gathered bytes cost more than the rounds that bring them."""
    worlds = [
        row["processes"]
        for row in rows
        if row["channels"] == channels and row["gather_transfer_us"] > row["gather_rounds_us"]
    ]
    return min(worlds, default=None)


def page(content: dict[str, Any]) -> str:
    """The results as a page."""
    words = [
        "# Small batches: what they cost\n",
        f"Made by `python benchmarks/small_batches.py`, {content['environment']['date']}: torch "
        f"{content['environment']['torch']}, {content['environment']['cpu']}, "
        f"{content['environment']['threads']} threads. Above 1, ours is faster; in brackets, what "
        "holds the true median with 95 % confidence in this run.\n",
    ]
    titles = {
        "ghost": "Ghost batches, 16 groups",
        "renorm": "Renormalization",
        "sync": f"Shared statistics, {WORLD} processes over gloo with one thread each",
    }
    for what, title in titles.items():
        rows = [row for row in content["rows"] if row["what"] == what]
        words.append(f"## {title}\n\n| case | pass | against | ratio | ours | theirs |")
        words.append("|---|---|---|---:|---:|---:|")
        words += [
            f"| {row['case']} | {row['pass']} | {row['peer']} | {row['ratio']:.2f} "
            f"({row['interval'][0]:.2f} to {row['interval'][1]:.2f}) | {row['ours_us']:.0f} µs | "
            f"{row['peer_us']:.0f} µs |"
            for row in rows
        ]
        words.append("")
    words.append("### Messages of a step\n\n| case | | all_gather | all_reduce |")
    words.append("|---|---|---|---|")
    for row in content["rows"]:
        if row.get("peer_messages"):
            for who, sent in (("ours", row["messages"]), (row["peer"], row["peer_messages"])):
                cells = (
                    f"{len(sent[kind])} × {sent[kind][0]} bytes"
                    for kind in ("all_gather", "all_reduce")
                )
                words.append(f"| {row['case']} | {who} | {' | '.join(cells)} |")
    words += [
        "\n### Many processes, on paper\n",
        *(model.__doc__ or "").splitlines()[2:],
        "\n| channels | processes | gathered by each | forward | backward |",
        "|---:|---:|---:|---:|---:|",
    ]
    words += [
        f"| {row['channels']} | {row['processes']} | {row['gather_bytes'] / 1024:,.0f} KB | "
        f"{row['gather_us']:,.0f} µs | {row['reduce_us']:,.0f} µs |"
        for row in content["model"]
    ]
    words.append("")
    for channels in CHANNELS:
        at = content["bends"][str(channels)]
        where = f"from {at:.0f} processes on" if at else "beyond the table"
        words.append(f"- {channels} channels: the bytes cost more than the rounds {where}.")
    return "\n".join(words) + "\n"


def main() -> None:
    """Measure, print the page, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write; the page goes beside it")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    if arguments.rank is not None:
        shared(arguments.rank, arguments.folder)
        return
    rows = grouped()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(  # noqa: S603 - this program
                [sys.executable, __file__, "--rank", str(rank), "--folder", folder]
            )
            for rank in range(WORLD)
        ]
        for process in processes:
            if process.wait() != 0:
                raise SystemExit("one of the processes that share statistics failed")
        found = json.loads((Path(folder) / "shared.json").read_text())
    modelled = model(found["message_us"])
    content = {
        "environment": environment("cpu", SEED),
        "rows": rows + found["rows"],
        "message_us": found["message_us"],
        "model": modelled,
        "bends": {str(channels): bend(modelled, channels) for channels in CHANNELS},
    }
    text = page(content)
    sys.stdout.write(text)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
        arguments.json.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
