"""Where usual implementations of batch normalization answer wrongly: each case run, beside ours.

    python benchmarks/peers.py [--json FILE]        some seconds; needs '.[interop]'

Every case is a question whose right answer is known beforehand. What the others answer, and what
we do, is what came out when they ran. A test holds that they are still wrong and that we are not:
where somebody mends something, the row has to go.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import torch
import torch.fx.experimental.optimization as fx
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm, fold, freeze, recalibrate
from batchnorm.bench.environment import environment

SEED = 0

Answer = float | str


@dataclass(frozen=True)
class Case:
    """A question, put to somebody else's code and to ours."""

    question: str
    right: Answer
    ask: Callable[[Any], Answer]
    peer: str
    theirs: Any
    ours: Any
    within: float = 0.0

    def answers(self) -> tuple[Answer, Answer]:
        """Theirs and ours."""
        answers = []
        for whom in (self.theirs, self.ours):
            torch.manual_seed(SEED)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # ours warns of NaN, torch of what it decomposes
                answers.append(self.ask(whom))
        return answers[0], answers[1]

    def is_right(self, answer: Answer) -> bool:
        """Whether an answer is near enough."""
        if isinstance(answer, str) or isinstance(self.right, str):
            return answer == self.right
        return abs(answer - self.right) <= self.within


def outcome(act: Callable[[], Any]) -> str:
    """What is raised, or that it works."""
    try:
        act()
    except Exception as error:
        return f"raises {type(error).__name__}"
    return "works"


def counted_of_one_sample(make: Any) -> int:
    """How many batches a layer has counted that has refused the only one."""
    layer = make(3)
    outcome(lambda: layer(torch.randn(1, 3)))
    return int(layer.num_batches_tracked)


def variance_after_nan(make: Any) -> float:
    """The running variance after 100 batches, one value of which is NaN."""
    layer = make(1)
    for step in range(100):
        x = torch.randn(64, 1)
        if step == 50:
            x[0] = math.nan
        layer(x)
    return float(layer.running_var)


def deviation_of_padded(normalize: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The deviation of an output, padding left out."""
    mask = torch.arange(100) < torch.tensor([100, 40, 20, 5])[:, None]
    x = (3 + torch.randn(4, 8, 100)) * mask[:, None]
    return float(normalize(x, mask).movedim(1, -1)[mask].std(correction=0))


def error_about_10_000(make: Any) -> float:
    """The largest error of a channels-last output, against float64."""
    x = (1e4 + torch.randn(8, 16, 14, 14)).contiguous(memory_format=torch.channels_last)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0, keepdim=True)
    true = (x.double() - mean) / (var + 1e-5).sqrt()
    return float((make(16)(x).double() - true).abs().max())


def deviation_about_10_000(normalize: Callable[[Tensor], Any]) -> float:
    """The deviation that is farthest from 1, of three channels of an output."""
    y = torch.as_tensor(normalize(1e4 + torch.randn(64, 3))).detach().double()
    return max(y.std(0, correction=0).tolist(), key=lambda deviation: abs(deviation - 1))


def by_ours(x: Tensor) -> Tensor:
    """Normalized by ours."""
    return BatchNorm(3)(x)


def by_keras(x: Tensor) -> Any:
    """Normalized by Keras's layer."""
    import keras

    return keras.layers.BatchNormalization()(x, training=True)


def by_flax(x: Tensor) -> Any:
    """Normalized by Flax's layer."""
    import flax.linen
    import jax
    import numpy as np

    layer = flax.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(SEED), x.numpy())
    return np.array(layer.apply(variables, x.numpy(), mutable=["batch_stats"])[0])


def counted_when_checkpointed(make: Any) -> int:
    """How many batches a layer has counted of one, whose activations are computed again."""
    layer = make(3)
    y = checkpoint(layer, torch.randn(8, 3, requires_grad=True), use_reentrant=False)
    y.sum().backward()
    return int(layer.num_batches_tracked)


def compiled_whole(make: Any) -> str:
    """Whether `momentum=None` can be in a graph."""
    torch.compiler.reset()
    layer = torch.compile(make(3, momentum=None), fullgraph=True, backend="eager")
    return outcome(lambda: layer(torch.randn(8, 3)))


def mean_in_bfloat16(make: Any) -> float:
    """The running mean of 200 batches about 100, in a model of bfloat16."""
    layer = make(1).bfloat16()
    for _ in range(200):
        layer(100 + torch.randn(64, 1, dtype=torch.bfloat16))
    return float(layer.running_mean)


def uneven() -> list[Tensor]:
    """Batches whose means differ, the last one smaller: what a loader gives without shuffling."""
    generator = torch.Generator().manual_seed(SEED)
    sizes, means = (8, 8, 8, 8, 2), (0, 10, 20, 30, 100)
    return [
        mean + torch.randn(size, 1, generator=generator)
        for size, mean in zip(sizes, means, strict=True)
    ]


def variance_of_uneven(estimate: Callable[[nn.Module, list[Tensor]], Any]) -> float:
    """The running variance that an estimator finds, over that of all the data."""
    model, batches = nn.Sequential(nn.BatchNorm1d(1)), uneven()
    estimate(model, batches)
    return float(model[0].running_var / torch.cat(batches).var())


def moved_after_freezing(stop: Callable[[nn.Module], Any]) -> float:
    """How far a running mean moves that was frozen, when the model goes on in train()."""
    model = nn.Sequential(nn.BatchNorm1d(1))
    stop(model)
    model.train()(10 + torch.randn(64, 1))
    return float(model[0].running_mean)


def folded_linear(fuse: Callable[[nn.Module, Tensor], nn.Module]) -> float:
    """How far a linear layer and a batch norm over another axis are off once they are fused."""
    norm = nn.BatchNorm1d(6)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    model, x = nn.Sequential(nn.Linear(6, 6), norm).eval(), torch.randn(4, 6, 6)
    with torch.no_grad():
        return float((fuse(model, x)(x) - model(x)).abs().max())


def synchronised(make: Callable[[int], nn.Module]) -> str:
    """Whether processes on CPUs can share statistics."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        return outcome(lambda: make(3)(torch.randn(8, 3)))
    finally:
        distributed.destroy_process_group()


CASES = (
    Case(
        "A batch of one sample was refused. How many batches did the layer count?",
        0, counted_of_one_sample, "torch.nn.BatchNorm1d", nn.BatchNorm1d, BatchNorm,
    ),
    Case(
        "NaN in one of 100 batches of variance 1. The running variance?",
        # Two deviations: 64 values a batch, of whose variances some 19 are averaged.
        1, variance_after_nan, "torch.nn.BatchNorm1d", nn.BatchNorm1d, BatchNorm, within=0.08,
    ),
    Case(
        "Sequences filled up with zeros. The output's deviation where no padding is?",
        1, deviation_of_padded, "torch.nn.BatchNorm1d",  # 1e-3: eps, and rounding
        lambda x, _: nn.BatchNorm1d(8)(x), lambda x, mask: BatchNorm(8)(x, mask=mask), within=1e-3,
    ),
    Case(
        "Mean 10 000, deviation 1, channels-last. The output's largest error?",
        0, error_about_10_000, "torch.nn.BatchNorm2d",  # 1e-6: two roundings of a number up to 5
        nn.BatchNorm2d, BatchNorm, within=1e-6,
    ),
    Case(
        "Mean 10 000, deviation 1, a batch of 64. The output's deviation?",
        1, deviation_about_10_000, "flax.linen.BatchNorm", by_flax, by_ours, within=1e-3,
    ),
    Case(
        "The same question.",
        1, deviation_about_10_000, "keras.layers.BatchNormalization",
        by_keras, by_ours, within=1e-3,
    ),
    Case(
        "One batch, with activation checkpointing. How many did the layer count?",
        1, counted_when_checkpointed, "torch.nn.BatchNorm1d", nn.BatchNorm1d, BatchNorm,
    ),
    Case(
        "`momentum=None` under `torch.compile(fullgraph=True)`?",
        "works", compiled_whole, "torch.nn.BatchNorm1d", nn.BatchNorm1d, BatchNorm,
    ),
    Case(
        "`model.bfloat16()`, 200 batches with mean 100. The running mean?",
        100, mean_in_bfloat16, "torch.nn.BatchNorm1d", nn.BatchNorm1d, BatchNorm, within=0.5,
    ),
    Case(
        "Statistics of batches unlike each other. Their variance, over that of all the data?",
        1, variance_of_uneven, "torch.optim.swa_utils.update_bn",
        lambda model, batches: update_bn(batches, model), recalibrate, within=1e-5,
    ),
    Case(
        "Layers frozen, then `model.train()`. How far does the running mean move?",
        0, moved_after_freezing, "`layer.eval()`", lambda model: model[0].eval(), freeze,
    ),
    Case(
        "`Linear` and batch norm over (N, C, L), fused. The largest error?",
        0, folded_linear, "torch.fx's fuse",
        lambda model, _: fx.fuse(model), fold, within=1e-5,
    ),
    Case(
        "Statistics shared by processes without GPUs?",
        "works", synchronised, "torch.nn.SyncBatchNorm",
        nn.SyncBatchNorm, lambda channels: BatchNorm(channels, process_group="world"),
    ),
)  # fmt: skip


def measure() -> list[dict[str, Any]]:
    """Ask everybody."""
    rows = []
    for case in CASES:
        theirs, ours = case.answers()
        rows.append(
            {"question": case.question, "right": case.right, "peer": case.peer,
             "theirs": written(theirs), "ours": written(ours),
             "right_theirs": case.is_right(theirs), "right_ours": case.is_right(ours)}
        )  # fmt: skip
    return rows


def written(answer: Answer) -> Answer:
    """As JSON can hold it, which has no NaN."""
    return answer if isinstance(answer, str) or math.isfinite(answer) else str(answer)


def said(answer: Answer) -> str:
    """As a page shows it."""
    if isinstance(answer, str):
        return answer
    return f"{answer:.2g}" if abs(answer) < 0.01 else f"{answer:.4g}"


def page(content: dict[str, Any]) -> str:
    """Markdown."""
    where, versions = content["environment"], content["versions"]
    lines = [
        "# What others answer",
        "",
        f"Made by `python benchmarks/peers.py`, {where['date']}: batchnorm {where['batchnorm']} "
        f"({where['commit']}), "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + f", {where['cpu']}, seed {SEED}, CPU.",
        "",
        "Each was used as its documentation says, with its defaults.",
        "",
        "| question | right | who | answer | ours |",
        "|---|---:|---|---:|---:|",
    ]
    for row in content["rows"]:
        right, theirs, ours = (said(row[key]) for key in ("right", "theirs", "ours"))
        lines.append(f"| {row['question']} | {right} | {row['peer']} | {theirs} | {ours} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Ask, print the page, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write; the page goes beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    content = {
        "environment": environment("cpu", SEED),
        "versions": {
            "torch": version("torch"),
            f"keras (on {os.environ['KERAS_BACKEND']})": version("keras"),
            "flax": version("flax"),
        },
        "rows": measure(),
    }
    text = page(content)
    sys.stdout.write(text)
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        arguments.json.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
