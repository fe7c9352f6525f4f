"""Every kernel once on small tensors, compared with float64: what a memory checker should watch.

    python benchmarks/small_calls.py --device cuda
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 python ... (the same)

A line a call; exit status 1 if a result was wrong. `make gpu` runs it alone and under each of
compute-sanitizer's tools, where every access costs ten to fifty times as much: the shapes are as
small as kernels with edges, tails and several blocks can be, and all that is not ours to do is done
on the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from batchnorm import BatchNorm
from batchnorm.bench import check, peers
from batchnorm.bench.cases import FUSIONS, Case
from batchnorm.bench.peers import Problem

SEED = 0

#: Around the edges of blocks, which are powers of two: one channel and several blocks of them, runs
#: shorter and longer than a block, rows that do not divide.
SHAPES = (
    *((4, 3, 5, 5), (33, 7), (2, 3, 1025), (2, 17, 8, 8)),
    *((129, 130), (3, 5, 9), (6, 130, 3, 3)),
)

DTYPES = (torch.bfloat16, torch.float32)

#: The first of each kind, to see that this file works.
REHEARSED = ((5, 1), (2, 3, 4, 4))


def cases(shapes: tuple[tuple[int, ...], ...]) -> Iterator[Case]:
    """Yield every shape, in every layout that it can have, in every dtype."""
    for shape, dtype in itertools.product(shapes, DTYPES):
        yield Case(shape, dtype)
        if len(shape) == 4:
            yield Case(shape, dtype, channels_last=True)


def by_the_suite(case: Case, on: str) -> Iterator[tuple[str, bool]]:
    """Yield each pass and fusion, and whether we were right."""
    problem = Problem.of(case, "cpu", SEED)
    there = problem.copy(on)
    for fusion, mode in itertools.product(FUSIONS, ("forward+backward", "inference")):
        found = check.observe(peers.ours(case, fusion, on), there, mode)
        seen = {name: tensor.cpu() for name, tensor in found.items()}
        yield f"{mode}, {fusion}", check.judge(seen, problem, mode, fusion).right


def by_options(case: Case, on: str) -> Iterator[tuple[str, bool]]:
    """Yield what the suite leaves out, and whether it is as the CPU has it in float64."""
    problem = Problem.of(case, "cpu", SEED)
    places = case.shape[0], *case.shape[2:]
    mask = torch.arange(math.prod(places)).reshape(places) % 3 > 0

    def results(axis: int, activation: str | None, masked: bool, wide: bool) -> list[Tensor]:
        where, dtype = ("cpu", torch.float64) if wide else (on, None)
        layer = BatchNorm(
            case.shape[1], device=where, dtype=dtype, channel_dim=axis, activation=activation
        )
        layer.load_state_dict(problem.state)
        x, dy = (
            v.detach().movedim(1, axis).contiguous().to(where, dtype)
            for v in (problem.x, problem.dy)
        )
        y = layer(x.requires_grad_(), mask.to(where) if masked else None)
        of_x, *others = torch.autograd.grad(y, (x, *layer.parameters()), dy)
        # Both orders of axes keep the mask's: it has none for the channels.
        return [y.detach(), of_x, *others, layer.running_mean, layer.running_var]  # type: ignore[list-item]

    for axis, activation, masked in (
        (1, "leaky_relu", False),
        (-1, None, False),
        (1, "relu", True),
    ):
        ours, truth = (results(axis, activation, masked, wide) for wide in (False, True))
        apart = [
            float((a.cpu().double() - b).abs().max() / b.abs().max() / check.bound(a.dtype))
            for a, b in zip(ours, truth, strict=True)
        ]
        # Not max, which may pass over NaN.
        yield f"axis {axis}, {activation}, mask {masked}", all(error <= 1 for error in apart)


def main() -> None:
    """Make the calls; say which were wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="two shapes, to see it work")
    given = parser.parse_args()
    # What torch.empty gives is NaN then: an element that no kernel wrote shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    wrong = calls = 0
    for case in cases(REHEARSED if given.rehearse else SHAPES):
        for ask in (by_the_suite, by_options):
            for what, right in ask(case, given.device):
                calls, wrong = calls + 1, wrong + (not right)
                sys.stdout.write(f"{'right' if right else 'WRONG'}: {case.title}, {what}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{calls} calls, {wrong} wrong\n")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
