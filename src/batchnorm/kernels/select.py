"""Which kernels serve this call, and why. The only place that knows all of them.

`native` and `triton` serve whole calls, forward and backward, running update included: `whole`
finds them. What they leave comes here in parts, and this module chooses among the others.

The names of backends travel from a forward pass to its backward pass, so that both compute from
statistics of the same kind.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import aten, blocked, calls, native, reference, triton
from batchnorm.kernels.reference import Gradients
from batchnorm.moments import (
    Axes,
    Moments,
    Pool,
    accumulation_dtype,
    channel_axis,
    expand_mask,
)

#: Characters in a line of a backend that is printed.
COLUMNS = 80


@dataclass(frozen=True)
class Backend:
    """One implementation of the kernels, as `batchnorm.backends()` reports it; print it to read it.

    Attributes:
        name: what to call it.
        available: whether it can serve here.
        serves: which calls it gets.
        reason: why it serves those only, or is not available.
    """

    name: str
    available: bool
    serves: str
    reason: str

    def __str__(self) -> str:
        state = "serves" if self.available else "not available; would serve"
        return textwrap.fill(
            f"{self.name}: {state} {self.serves}. Why: {self.reason}.",
            COLUMNS,
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )


def backends() -> tuple[Backend, ...]:
    """What is built, what is used for which calls, and why not for others.

    In this order: the first that can serve a call does.

    Example:
        >>> import batchnorm
        >>> [backend.name for backend in batchnorm.backends()]
        ['native', 'triton', 'aten', 'reference']
        >>> print(batchnorm.backends()[-1])
        reference: serves everything else: any device, dtype, layout and mask, ...
    """
    disabled = os.environ.get("BATCHNORM_DISABLE", "").split(",")
    unknown = ", ".join(repr(name) for name in disabled if name not in ("", "native", "triton"))
    # Told with both that it could have been meant for.
    typo = f"; BATCHNORM_DISABLE names {unknown}, expected native or triton" if unknown else ""
    devices, way = _triton()
    return (
        Backend(
            "native",
            native.MISSING is None,
            "eager calls on the CPU: float32, float64, float16 and bfloat16, any layout, channel "
            "axis and mask, activation and residual fused",
            (
                native.MISSING
                or f"C++ kernels, here with {native.INSTRUCTIONS[native.LEVELS - 1]} instructions; "
                "what is compiled, exported or transformed must be operations that torch sees "
                "through"
            )
            + typo,
        ),
        Backend(
            "triton",
            triton.missing() is None,
            f"eager and compiled calls on {devices}: float32, float16 and bfloat16, any layout, "
            "channel axis and mask, activation and residual fused; but not compiled training with "
            "virtual_batch_size, renorm or process_group",
            (triton.missing() or way) + typo,
        ),
        Backend(
            "aten",
            True,
            "what native leaves of contiguous float32 on the CPU, channel_dim=1, no mask, no "
            f"transform or compilation, |mean| <= {aten.MAX_OFFSET:g} σ in every channel, at most "
            f"{aten.MAX_DENSE_COUNT} values per channel in (N, C) input, backward at most "
            f"{aten.MAX_PLANE} values per plane; and evaluation in exported graphs, as one node",
            "torch's kernels lose precision in proportion to |mean|/σ, and to the number of values "
            "that they sum one after the other",
        ),
        Backend(
            "reference",
            True,
            "everything else: any device, dtype, layout and mask, torch.func, torch.compile",
            "float64 accumulation in plain torch, block by block where the call is large: right "
            "everywhere, fused nowhere",
        ),
    )


def _triton() -> tuple[str, str]:
    """Where its kernels run, and how."""
    if not triton.INTERPRETED:
        capability = ".".join(map(str, triton.CAPABILITY))
        devices = f"CUDA GPUs of compute capability {capability} or later"
        return devices, "one or two passes over memory"
    way = "TRITON_INTERPRET=1 has Triton's interpreter run them, for tests: right, and very slow"
    if native.MISSING is None:
        way += "; eager calls on the CPU go to native first, unless BATCHNORM_DISABLE=native"
    return "the CPU and CUDA GPUs", way


def whole(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Any:
    """The kernels that may serve this call as a whole (they ask the rest themselves), or None."""
    if native.serves(x, weight, bias, residual):
        return native
    return triton if triton.serves(x, weight, bias, residual) else None


def eager(tensor: Tensor) -> bool:
    """Whether operations on this tensor are done as they are called, on real memory.

    They are not while a program is recorded, in torch.func's transforms, on meta and fake tensors.
    """
    return (
        not recorded()
        # Of any tensor of the call: a weight may be batched where x is not. No public name exists
        # for this question; torch's own autograd.Function asks it so.
        and not torch._C._are_functorch_transforms_active()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type != "meta"
        # grad(…, is_grads_batched=True) and gradcheck have a vmap of their own.
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


def concrete(tensor: Tensor) -> bool:
    """Whether the tensor's values can be read here and now.

    On an accelerator they cannot: reading stalls the program until the device has caught up.
    """
    return tensor.device.type == "cpu" and eager(tensor)


def recorded() -> bool:
    """Whether the operations themselves are the result: compilation, export, torch.jit.trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def exported() -> bool:
    """Whether the operations are recorded for another runtime: torch.export, torch.jit.trace."""
    # Not torch.compiler.is_exporting(), which torch 2.11 compiled takes for true.
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()  # type: ignore[attr-defined]


def recomputing() -> bool:
    """Whether a backward pass is running: activation checkpointing then does forward ones again."""
    # No public name exists for it; torch.utils.checkpoint asks it so.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def recomputed_later() -> bool:
    """Whether this forward pass may be one that activation checkpointing will do again."""
    # It runs the first one without gradients, or keeps its own place for what autograd saves.
    return not torch.compiler.is_compiling() and (
        not torch.is_grad_enabled() or calls.checkpoints()
    )


def blocks(x: Tensor) -> bool:
    """Whether the reference should go through `x` block by block.

    Not where the operations themselves are recorded: under a transform, compilation, or in a
    backward pass that will be differentiated again.
    """
    # eager() first: a symbolic size must not be compared, or a graph would be bound to it.
    large = eager(x) and x.numel() > blocked.block_size(x)
    return large and not torch.is_grad_enabled()  # mutant: only slower without


def transformed(tensor: Tensor) -> bool:
    """Whether a torch.func transform (vmap, grad, jvp, …) is running over this tensor."""
    # Compilation traces through torch.func by other means. No public name exists for the question.
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(
        tensor
    )


#: What a forward pass gives, and its backward pass needs. A plain tuple, which autograd passes on.
#:   y: the output.
#:   count: total weight behind the moments; None if they were given.
#:   mean: per channel, in memory of its own: a later step changes running buffers in place.
#:   var: biased variance, likewise.
#:   invstd: 1/√(var + eps) where the backend's own backward pass wants the very same, or None.
#:   backend: the name of the backend that served.
Forward = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, str]  # mutant: a type


def in_graphs(
    x: Tensor,
    vectors: tuple[Tensor | None, ...],
    residual: Tensor | None,
    eps: float,
    channel_dim: int,
) -> Any:
    """The operators that take this call into a graph of torch.compile, or None."""
    if not torch.compiler.is_compiling() or not (triton.INTERPRETED or x.is_cuda):
        return None
    # Transforms of torch.func take operations apart, and exported graphs go where Triton is not.
    if torch._C._are_functorch_transforms_active() or exported():
        return None
    # Here, because they import parts of the compiler.
    from batchnorm.kernels.triton import operators

    return operators if operators.serves(x, vectors, residual, eps, channel_dim) else None


def _expanded(mask: Tensor | None, x: Tensor, channel_dim: int) -> Tensor | None:
    """The mask in the shape and a dtype that the kernels read."""
    if mask is None:
        return None
    mask = expand_mask(mask, x, channel_dim)
    return mask if mask.dtype in calls.MASKS else mask.double()


def moments(x: Tensor, mask: Tensor | None, channel_dim: Axes) -> Moments:
    """Moments of the elements of `x` that the mask counts."""
    of = blocked.moments if blocks(x) else _moments
    return of(x, mask, channel_dim)


def _moments(x: Tensor, mask: Tensor | None, channel_dim: Axes) -> Moments:
    return Moments.of(x, mask, channel_dim=channel_dim)


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    eps: float,
    activation: str | None,
    channel_dim: Axes,
) -> Tensor:
    """y by these statistics."""
    kernel = blocked.normalize if blocks(x) else reference.normalize
    return kernel(
        x,
        mean,
        var,
        weight,
        bias,
        residual,
        eps=eps,
        activation=activation,
        channel_dim=channel_dim,
    )


def forward(
    x: Tensor,
    mask: Tensor | None,
    given: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    eps: float,
    activation: str | None,
    channel_dim: int,
) -> Forward:
    """Normalise by the moments of `x`, or by the mean and biased variance given, constants."""
    others = (*(given or ()), weight, bias)
    if operators := in_graphs(x, others, residual, eps, channel_dim):
        statistics_of = given or (None, None)
        y, statistics, total = operators.forward(
            *(x, weight, bias, residual, _expanded(mask, x, channel_dim), *statistics_of),
            *(eps, channel_dim, calls.ACTIVATIONS[activation]),
        )
        mean, var = statistics.unbind()
        return y, total if given is None else None, mean, var, None, "triton"
    if mask is None and concrete(x) and aten.serves(x, *others, residual, channel_dim=channel_dim):
        if given is None:
            z, mean, var, invstd = aten.train(x, weight, bias, eps)
            if aten.accurate(mean, var):
                total = x.new_full((), x.numel() // x.shape[1], dtype=torch.float64)
                return aten.finish(z, residual, activation), total, mean, var, invstd, "aten"
        elif aten.accurate(*given):
            mean, var = given[0].clone(), given[1].clone()
            z = aten.evaluate(x, mean, var, weight, bias, eps)
            return aten.finish(z, residual, activation), None, mean, var, None, "aten"
    count: Tensor | None = None
    if given is None:
        found = moments(x, mask, channel_dim)
        # As the kernels have it, where a mask leaves nothing.
        var = found.variance() if mask is None else found.normalizing_variance()
        count, mean = found.count, found.mean
    else:
        wide = torch.promote_types(accumulation_dtype(x.device), given[0].dtype)
        mean, var = given[0].to(wide, copy=True), given[1].to(wide, copy=True)
        if mask is None and exported() and aten.exports(x, *others, channel_dim=channel_dim):
            z = aten.evaluate(x, *given, weight, bias, eps)
            y = aten.finish(z, residual, activation)
            return y, None, mean, var, None, "reference"
    y = normalize(
        x,
        mean,
        var,
        weight,
        bias,
        residual,
        eps=eps,
        activation=activation,
        channel_dim=channel_dim,
    )
    return y, count, mean, var, None, "reference"


def backward(
    backend: str,
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    mask: Tensor | None,
    count: Tensor | None,
    mean: Tensor,
    var: Tensor,
    invstd: Tensor | None,
    weight: Tensor | None,
    *,
    eps: float,
    activation: str | None,
    channel_dim: Axes,
    pool: Pool | None = None,
    wanted: Sequence[bool] = (True, True, True, True),
) -> Gradients:
    """Gradients of `forward`, by the backend that served it where that is right.

    Those of x, γ, β and z that are not `wanted` need not be right.
    """
    if backend == "triton":
        from batchnorm.kernels.triton import operators

        channel = channel_axis(channel_dim)
        flags = calls.ACTIVATIONS[activation]
        flags |= calls.TRAINING if count is not None else 0
        flags |= calls.WANT_X if wanted[0] else 0
        flags |= calls.WANT_PARAMETERS if wanted[1] or wanted[2] else 0
        flags |= calls.WANT_RESIDUAL if wanted[3] else 0
        mask = _expanded(mask, x, channel)
        dx, d_weight, d_bias, dz = operators.backward(
            *(dy, x, None if activation is None else y, torch.stack((mean, var)), weight, mask),
            *(count, eps, channel, flags),
        )
        unchanged = activation is None and mask is None
        return Gradients(dx, d_weight, d_bias, dy if unchanged else dz)
    if backend == "aten":
        if aten.backward_serves(x):
            return aten.backward(
                dy, x, y, mean, var, invstd, weight, eps=eps, activation=activation
            )
        wide = accumulation_dtype(x.device)
        mean, var = mean.to(wide), var.to(wide)
    weights = None if mask is None else expand_mask(mask, x, channel_dim).to(mean.dtype)
    kernel = blocked.backward if blocks(x) else reference.backward
    return kernel(
        dy,
        x,
        y,
        weights,
        count,
        mean,
        var,
        weight,
        eps=eps,
        activation=activation,
        channel_dim=channel_dim,
        pool=pool,
    )
