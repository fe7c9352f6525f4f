"""The kernels as operators, for the graphs of torch.compile: a call each way, and nothing changed.

The running statistics take the batch in beside them, by operations that the compiler fuses. Where
all sizes are known the compiler looks into the operators and finds the kernels; else, and under
Triton's interpreter, they are opaque, and decide at each call how to cut a tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import calls, triton
from batchnorm.kernels.triton import launch
from batchnorm.kernels.triton.operand import ELEMENTS, served


def serves(
    x: Tensor,
    vectors: tuple[Tensor | None, ...],
    residual: Tensor | None,
    eps: float,
    channel_dim: int,
) -> bool:
    """Whether this call can be an operator in a graph; all that is asked the compiler can see."""
    return (
        torch.compiler.is_compiling()
        and triton.ABSENT is None
        and x.dtype in ELEMENTS
        and (residual is None or residual.dtype in ELEMENTS)
        and (triton.INTERPRETED or _fits(x.device))
        and served(x, None, vectors, eps, channel_dim, 0)
    )


def _fits(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.version.hip is None
        # Not get_device_capability, which the compiler cannot look up.
        and torch.cuda.get_device_properties(device).major >= triton.CAPABILITY[0]
    )


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    channel_dim: int,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, its statistics (mean and biased variance) and their count, 0 of those given."""
    flags = activation | (calls.TRAINING if mean is None else calls.KEEP)
    options: Any = eps, channel_dim, flags
    y, statistics, count, _ = launch.forward(
        *(_dense(x), weight, bias, residual, mask, mean, var, None, 0.0), *options
    )
    assert statistics is not None  # noqa: S101 - for mypy: they were asked for
    if not isinstance(count, Tensor):
        count = x.new_full((), count, dtype=torch.float64)
    return y, statistics, count


def _backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    count: Tensor | None,
    eps: float,
    channel_dim: int,
    flags: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, γ, β and z; empty those not wanted, and z's where it is dy."""
    options: Any = 0.0 if count is None else count, eps, channel_dim, flags
    dx, dz, d_weight, d_bias, _ = launch.backward(
        *(dy, _dense(x), y, statistics, weight, None, mask, None), *options
    )
    first, second, third, fourth = (
        x.new_empty(0) if g is None else g for g in (dx, d_weight, d_bias, dz)
    )
    return first, second, third, fourth


def _dense(x: Tensor) -> Tensor:
    """x without gaps, which is how the outputs will lie."""
    return x if torch.empty_like(x).stride() == x.stride() else x.clone()


def _forward_shapes(
    x: Tensor,
    weight: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    residual: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    channel_dim = others[4]
    statistics = x.new_empty((2, x.shape[channel_dim]), dtype=torch.float64)
    return torch.empty_like(_dense(x), dtype=dtype), statistics, statistics.new_empty(())


def _backward_shapes(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,  # noqa: ARG001
    statistics: Tensor,  # noqa: ARG001
    weight: Tensor | None,
    mask: Tensor | None,
    count: Tensor | None,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    channel_dim: int,
    flags: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = torch.empty_like(_dense(x))
    dtype = torch.float64 if weight is None else weight.dtype
    channels = x.shape[channel_dim] if flags & calls.WANT_PARAMETERS else 0
    changed = flags & calls.WANT_RESIDUAL and (flags & calls.ACTIVATION or mask is not None)
    return (
        like if flags & calls.WANT_X else x.new_empty(0),
        x.new_empty(channels, dtype=dtype if channels else x.dtype),
        x.new_empty(channels, dtype=dtype if channels else x.dtype),
        torch.empty_like(like, dtype=dy.dtype) if changed else x.new_empty(0),
    )


def _operator(
    name: str, call: Callable[..., Any], shapes: Callable[..., Any]
) -> Callable[..., Any]:
    opaque = torch.library.custom_op(f"batchnorm_triton::{name}", call, mutates_args=())
    opaque.register_fake(shapes)
    if triton.INTERPRETED:  # the compiler refuses kernels that are
        return opaque

    @functools.wraps(call)
    def looked_into(*args: Any) -> Any:
        sizes = (size for t in args if isinstance(t, Tensor) for size in t.shape)
        return (opaque if any(isinstance(n, torch.SymInt) for n in sizes) else call)(*args)

    return torch.library.triton_op(
        f"batchnorm_triton::{name}_kernels", looked_into, mutates_args=()
    )


forward = _operator("forward", _forward, _forward_shapes)
backward = _operator("backward", _backward, _backward_shapes)
