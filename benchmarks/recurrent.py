"""What batch normalization at every step of an LSTM costs.

    python benchmarks/recurrent.py [--json FILE]        about two minutes

`BatchNormLSTM` against the same recurrence without normalization, written as a loop over time in
torch's operations, and against `torch.nn.LSTM`, whose loop is compiled. All are timed in turns in
one run, by the median of the ratios of each round, on one thread, by the time that this process has
the processor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import BatchNormLSTM
from batchnorm.bench import estimate, measure
from batchnorm.bench.environment import environment

SEED = 0
ROUNDS = 41

#: Sequences, steps, channels of the input, channels of the state.
SIZES = (
    (64, 50, 32, 32),
    (64, 50, 32, 128),
    (128, 50, 64, 256),
    (32, 100, 4, 100),
    (60, 16, 4, 32),
)
PASSES = ("forward+backward", "evaluation")


class Loop(nn.Module):
    """An LSTM as one writes it: step by step, nothing normalised."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.of_input = nn.Linear(channels, 4 * hidden)
        self.of_state = nn.Linear(hidden, 4 * hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run over (steps, sequences, channels)."""
        h = c = x.new_zeros(x.shape[1], self.hidden)
        outputs = []
        for now in x:
            i, f, g, o = (self.of_input(now) + self.of_state(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs), (h, c)


def rows() -> list[dict[str, Any]]:
    """Every size and pass: ours against the others, nn.LSTM against the loop."""
    found = []
    for number, length, channels, hidden in SIZES:
        x = torch.randn(length, number, channels)
        dy = torch.randn(length, number, hidden)
        layers = {
            "BatchNormLSTM": BatchNormLSTM(channels, hidden, max_length=length),
            "loop": Loop(channels, hidden),
            "nn.LSTM": nn.LSTM(channels, hidden),
        }
        agree(layers["loop"], layers["nn.LSTM"], x)
        for mode in PASSES:
            calls = {name: call(layer, x, dy, mode) for name, layer in layers.items()}
            times = measure.rounds(calls, ROUNDS, seed=SEED, clock=time.process_time)
            row: dict[str, Any] = {
                "sequences": number,
                "steps": length,
                "channels": channels,
                "hidden": hidden,
                "pass": mode,
                "us_per_step": {name: took.us / length for name, took in times.items()},
            }
            for of, against in (
                ("BatchNormLSTM", "loop"),
                ("BatchNormLSTM", "nn.LSTM"),
                ("nn.LSTM", "loop"),
            ):
                ratios = estimate.ratios(times[of].seconds, times[against].seconds)
                row[f"{of} / {against}"] = {
                    "ratio": statistics.median(ratios),
                    "interval": estimate.interval(ratios),
                }
            found.append(row)
    return found


def call(layer: nn.Module, x: Tensor, dy: Tensor, mode: str) -> Callable[[], object]:
    """A call to time. What is evaluated has been trained."""
    if mode == "evaluation":
        layer.eval()
        return torch.no_grad()(lambda: layer(x))
    layer.train()
    leaves = list(layer.parameters())
    return lambda: torch.autograd.grad(layer(x)[0], leaves, dy)


def agree(loop: nn.Module, lstm: nn.Module, x: Tensor) -> None:
    """The loop computes an LSTM."""
    for part, name in (("of_input", "ih"), ("of_state", "hh")):
        linear = loop.get_submodule(part)
        own = {"weight": f"weight_{name}_l0", "bias": f"bias_{name}_l0"}
        linear.load_state_dict({k: lstm.state_dict()[v] for k, v in own.items()})
    torch.testing.assert_close(loop(x)[0], lstm(x)[0], rtol=1e-4, atol=1e-5)


def page(content: dict[str, Any]) -> str:
    """The results as a page."""
    where = content["environment"]
    words = [
        "# An LSTM with batch normalization: what it costs\n",
        f"Made by `python benchmarks/recurrent.py`, {where['date']}: batchnorm "
        f"{where['batchnorm']}, commit {where['commit']}, torch {where['torch']}, Python "
        f"{where['python']}, {where['cpu']}, one thread of {where['cores']} cores.\n",
        "*Loop* is the same recurrence without normalization, step by step in torch's operations; "
        "`nn.LSTM` is torch's, whose loop is compiled. Ratios are of times, round by round: above "
        "1, the first one is slower; in brackets, what holds the true median with 95 % confidence "
        "in this run. Times are of the processor; how busy others kept it is not in them, but what "
        "they did to its caches is.",
    ]
    for mode in PASSES:
        words += [
            f"\n## {mode.capitalize()}\n",
            "| sequences | steps | channels | H | BatchNormLSTM / loop | BatchNormLSTM / nn.LSTM | "
            "nn.LSTM / loop | µs a step: ours | loop | nn.LSTM |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in content["rows"]:
            if row["pass"] != mode:
                continue
            cells = [str(row[key]) for key in ("sequences", "steps", "channels", "hidden")]
            for key, value in row.items():
                if " / " in key:
                    low, high = value["interval"]
                    cells.append(f"{value['ratio']:.2f} ({low:.2f} to {high:.2f})")
            took = row["us_per_step"]
            cells += [f"{took[name]:.0f}" for name in ("BatchNormLSTM", "loop", "nn.LSTM")]
            words.append(f"| {' | '.join(cells)} |")
    return "\n".join(words) + "\n"


def main() -> None:
    """Measure, print the page, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write; the page goes beside it")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    content = {"environment": environment("cpu", SEED), "rows": rows()}
    text = page(content)
    sys.stdout.write(text)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
        arguments.json.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
