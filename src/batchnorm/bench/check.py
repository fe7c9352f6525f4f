"""Whether a result is right: against float64, before anything is timed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.bench.peers import Contender, Problem

#: Elements in float64 at a time, in whole channels: 8 MB a tensor, which a cache may hold, and of
#: channels-last images enough channels to read whole cache lines.
BLOCK = 1 << 20

#: Rounding steps of float32 (2⁻²⁴) that a correct result may be away from the truth, as a part of
#: the tensor's largest value. An element goes through about ten; over the full suite 2.3 steps were
#: the most that ours was off, and 130 torch's, which adds many values one after the other. A term
#: left out is off by thousands.
STEPS = 64


@dataclass(frozen=True)
class Verdict:
    """How far a result is from float64.

    Attributes:
        error: the largest difference in any tensor, as a part of that tensor's largest value.
        bound: what is allowed where the error is nearest to what is allowed, or most beyond it.
        where: the name of that tensor.
    """

    error: float
    bound: float
    where: str

    @property
    def right(self) -> bool:
        """Whether every tensor is within its bound; NaN is not."""
        return self.error <= self.bound


def bound(dtype: torch.dtype) -> float:
    """Return the error allowed: `STEPS` of float32 for computing, one of the dtype for storing.

    >>> bound(torch.float32) < 4e-6, bound(torch.bfloat16) < 0.005
    (True, True)
    """
    unit = torch.finfo(torch.float32).eps / 2
    stored = 0.0 if dtype.itemsize >= 4 else torch.finfo(dtype).eps / 2
    if dtype is torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        stored *= 2  # Triton's interpreter cuts off what a GPU rounds
    return STEPS * unit + stored


def observe(contender: Contender, problem: Problem, mode: str) -> dict[str, Tensor]:
    """Do a pass from the first state on; return everything that it gives, by name."""
    contender.reset(problem, training=mode != "inference")
    residual = problem.residual if contender.add else None
    with torch.set_grad_enabled(mode != "inference"):
        y = contender.expression(problem.x, residual)
    seen = {"y": y.detach()}
    if mode == "forward+backward":
        leaves = contender.leaves(problem)
        gradients = torch.autograd.grad(y, tuple(leaves.values()), problem.dy)
        seen |= {f"d{name}": d for name, d in zip(leaves, gradients, strict=True)}
    if mode != "inference":
        buffers = dict(contender.layer.named_buffers())
        seen |= {name: buffers[name].clone() for name in ("running_mean", "running_var")}
    return seen


def judge(
    seen: Mapping[str, Tensor], problem: Problem, mode: str, fusion: str, *, eps: float = 1e-5
) -> Verdict:
    """Compare with float64, tensor by tensor."""
    worst: dict[str, list[Tensor]] = {}
    for expected, got in _blocks(seen, problem, mode, fusion, eps):
        for name, truth in expected.items():
            largest = worst.setdefault(name, [truth.new_zeros(()), truth.new_zeros(())])
            # torch.maximum keeps NaN.
            largest[0] = torch.maximum(largest[0], (got[name].double() - truth).abs_().amax())
            largest[1] = torch.maximum(largest[1], truth.abs().amax())
    verdicts = [
        Verdict(float(error / size), bound(seen[name].dtype), name)
        for name, (error, size) in worst.items()
    ]
    # NaN first, and then whatever is the furthest from what is allowed.
    return max(verdicts, key=lambda v: (v.error != v.error, v.error / v.bound))


def _blocks(
    seen: Mapping[str, Tensor], problem: Problem, mode: str, fusion: str, eps: float
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Yield the truth and what was seen, some channels at a time."""
    count = problem.x.numel() // problem.x.shape[1]
    channels = max(1, BLOCK // count)
    for start in range(0, problem.x.shape[1], channels):
        # Tensors of one axis are per channel; so is a batch's second axis.
        part = {
            name: tensor.detach().to(problem.x.device).narrow(min(1, tensor.ndim - 1), start, n)
            for name, tensor in {
                **{f"got {name}": tensor for name, tensor in seen.items()},
                **{name: tensor for name, tensor in problem.state.items() if tensor.ndim},
                "x": problem.x,
                "residual": problem.residual,
                "dy": problem.dy,
            }.items()
            for n in [min(channels, problem.x.shape[1] - start)]
        }
        got = {name: part[f"got {name}"] for name in seen}
        yield _truth(part, got["y"], mode, fusion, eps), got


def _truth(
    part: Mapping[str, Tensor], y: Tensor, mode: str, fusion: str, eps: float
) -> dict[str, Tensor]:
    """Batch normalization and its gradients by the formulas, in float64."""
    x = part["x"].double()
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
    weight, bias, mean, var = (
        part[name].double() for name in ("weight", "bias", "running_mean", "running_var")
    )
    expected: dict[str, Tensor] = {}
    if mode != "inference":
        count = x.numel() // x.shape[1]
        old_mean, old_var = mean, var
        mean = x.mean(axes)
        var = (x - mean.view(shape)).square_().mean(axes)
        expected["running_mean"] = 0.9 * old_mean + 0.1 * mean
        expected["running_var"] = 0.9 * old_var + 0.1 * var * count / (count - 1)
    scale = (var + eps).rsqrt()
    x_hat = x.sub_(mean.view(shape)).mul_(scale.view(shape))
    z = x_hat * weight.view(shape) + bias.view(shape)
    if fusion == "bn+add+relu":
        z += part["residual"]
    expected["y"] = z if fusion == "bn" else z.clamp_(min=0)
    if mode == "forward+backward":
        dz = part["dy"].double()
        if fusion != "bn":
            # Where z is within rounding of 0, either side of the kink is right: the gradient must
            # fit the y that was given, and y has been compared.
            dz = dz * (y > 0)
        expected["dbias"] = dz.sum(axes)
        expected["dweight"] = (dz * x_hat).sum(axes)
        if fusion == "bn+add+relu":
            expected["dresidual"] = dz
        n = x.numel() // x.shape[1]
        centred = dz - (expected["dbias"] / n).view(shape)
        centred -= x_hat * (expected["dweight"] / n).view(shape)
        expected["dx"] = centred * (weight * scale).view(shape)
    return expected
