"""Time the C++ operators alone: no layer, no autograd, no other contender.

    python benchmarks/kernel_times.py 32x64x56x56 --fusion bn+add+relu --threads 1

The times in LOG.md were taken like this. Each line is the lowest of 40 loops of 20 ms: what the
kernel can do, not what it usually does. The same tensors are used in every call, so what fits into
a cache is found there, and outputs lie where the ones before them lay. `batchnorm bench` has the
times of calls as a user makes them.
"""

import argparse
import time
from collections.abc import Callable

import torch

from batchnorm.bench.cases import FUSIONS
from batchnorm.kernels import calls, native

LOOPS, LOOP_S = 40, 0.02

EPS, MOMENTUM = 1e-5, 0.1


def lowest(call: Callable[[], object]) -> float:
    """Return the lowest time of a call in microseconds."""

    def loop(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    loop(1)
    calls = max(1, round(LOOP_S / loop(1)))
    return min(loop(calls) for _ in range(LOOPS)) * 1e6


def operators(
    shape: list[int], dtype: torch.dtype, fusion: str, channels_last: bool
) -> dict[str, Callable[[], object]]:
    """Return the calls to time, by name."""
    generator = torch.Generator().manual_seed(0)

    def data() -> torch.Tensor:
        tensor = torch.randn(shape, generator=generator).to(dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor

    x, dy, other = data(), data(), data()
    weight, bias = torch.ones(shape[1]), torch.zeros(shape[1])
    mean, var, counter = torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(0)
    activation = calls.ACTIVATIONS[None if fusion == "bn" else "relu"]
    residual = other if "add" in fusion else None

    def forward(flags: int) -> tuple[torch.Tensor, torch.Tensor, float, int]:
        buffers = mean, var, counter, MOMENTUM
        flags |= activation
        return native.forward(x, weight, bias, residual, None, *buffers, EPS, 1, flags)

    training = calls.TRAINING | calls.KEEP
    y, statistics, count, served = forward(training)
    if served == calls.NOT_SERVED:
        raise SystemExit(f"expected tensors that the C++ kernels serve, got {dtype} {shape}.")
    wanted = calls.TRAINING | calls.WANT_X | calls.WANT_PARAMETERS | activation
    wanted |= calls.WANT_RESIDUAL if residual is not None else 0
    saved = (
        y if residual is not None else None
    )  # the sign of z; without a residual it is recomputed

    def backward() -> object:
        given = statistics, weight, bias, None, None, count
        return native.backward(dy, x, saved, *given, EPS, 1, wanted)

    return {
        "forward": lambda: forward(training),
        "backward": backward,
        "evaluation": lambda: forward(0),
    }


def main() -> None:
    """Print a line for each operator."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", help="such as 32x64x56x56; channels are on axis 1")
    parser.add_argument("--fusion", choices=FUSIONS, default=FUSIONS[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    if native.MISSING:
        raise SystemExit(f"There are no C++ kernels here: {native.MISSING}.")
    torch.set_num_threads(given.threads)
    shape = [int(size) for size in given.shape.split("x")]
    dtype = getattr(torch, given.dtype)
    with torch.no_grad():
        calls = operators(shape, dtype, given.fusion, given.channels_last)
        for name, call in calls.items():
            print(f"{name:<10} {lowest(call):9.1f} µs")  # noqa: T201


if __name__ == "__main__":
    main()
