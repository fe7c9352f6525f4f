"""Which kernels serve this call, and why. The only place that knows all of them.

The names of backends travel from a forward pass to its backward pass, so that both compute from
statistics of the same kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.kernels import aten, blocked, reference
from batchnorm.kernels.reference import Gradients
from batchnorm.moments import Moments, accumulation_dtype, expand_mask


@dataclass(frozen=True)
class Backend:
    """One implementation of the kernels, as `batchnorm.backends()` reports it.

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
        return f"{self.name}: {state} {self.serves}. Why: {self.reason}."


def backends() -> tuple[Backend, ...]:
    """What is built, what is used for which calls, and why not for others.

    The first backend that can serve a call does.

    Example:
        >>> import batchnorm
        >>> [backend.name for backend in batchnorm.backends()]
        ['aten', 'reference']
        >>> print(batchnorm.backends()[1])
        reference: serves everything else: any device, dtype, layout and mask, ...
    """
    return (
        Backend(
            "aten",
            True,
            "contiguous float32 on the CPU, channel_dim=1, no mask, no transform or compilation, "
            f"|mean| <= {aten.MAX_OFFSET:g} σ in every channel, "
            f"at most {aten.MAX_DENSE_COUNT} values per channel in (N, C) input",
            "torch's kernels lose precision in proportion to |mean|/σ, and with the batch size "
            "where the channels are the fastest axis",
        ),
        Backend(
            "reference",
            True,
            "everything else: any device, dtype, layout and mask, torch.func, torch.compile",
            "float64 accumulation in plain torch, block by block where the call is large: right "
            "everywhere, fused nowhere",
        ),
    )


def eager(tensor: Tensor) -> bool:
    """Whether operations on this tensor are done as they are called, on real memory.

    They are not while a program is recorded, in torch.func's transforms, on meta and fake tensors.
    """
    return (
        not recorded()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type != "meta"
        and not transformed(tensor)
    )


def concrete(tensor: Tensor) -> bool:
    """Whether the tensor's values can be read here and now.

    On an accelerator they cannot: reading stalls the program until the device has caught up.
    """
    return tensor.device.type == "cpu" and eager(tensor)


def recorded() -> bool:
    """Whether the operations themselves are the result: compilation, export, torch.jit.trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def blocks(x: Tensor) -> bool:
    """Whether the reference should go through `x` block by block.

    Not where the operations themselves are recorded: under a transform, compilation, or in a
    backward pass that will be differentiated again.
    """
    # eager() first: a symbolic size must not be compared, or a graph would be bound to it.
    return eager(x) and x.numel() > blocked.block_size(x) and not torch.is_grad_enabled()


def transformed(tensor: Tensor) -> bool:
    """Whether a torch.func transform (vmap, grad, jvp, …) is running over this tensor."""
    # Compilation traces through torch.func by other means. No public name exists for the question.
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(
        tensor
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
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, str]:
    """Normalise by the moments of `x`, or by the mean and biased variance given.

    Returns:
        y; the count behind the moments, None if they were given; mean and biased variance, in
        memory of their own; the name of the backend that served.
    """
    others = (*(given or ()), weight, bias)
    if mask is None and concrete(x) and aten.serves(x, *others, residual, channel_dim=channel_dim):
        # Copies: a later step changes running buffers in place, and backward needs these values.
        statistics = (given[0].clone(), given[1].clone()) if given else aten.moments(x)
        if aten.accurate(*statistics, eps):
            y = aten.normalize(
                x, *statistics, weight, bias, residual, eps=eps, activation=activation
            )
            count = None if given else torch.tensor(x.numel() / x.shape[1])
            return y, count, *statistics, "aten"
    if given:
        wide = torch.promote_types(accumulation_dtype(x.device), given[0].dtype)
        count, statistics = None, (given[0].to(wide, copy=True), given[1].to(wide, copy=True))
    else:
        moments = (
            blocked.moments(x, mask, channel_dim)
            if blocks(x)
            else Moments.of(x, mask, channel_dim=channel_dim)
        )
        count, statistics = moments.count, (moments.mean, moments.variance())
    if given and mask is None and recorded() and aten.exports(x, *others, channel_dim=channel_dim):
        y = aten.normalize(x, *given, weight, bias, residual, eps=eps, activation=activation)
        return y, count, *statistics, "reference"
    kernel = blocked.normalize if blocks(x) else reference.normalize
    y = kernel(
        x,
        *statistics,
        weight,
        bias,
        residual,
        eps=eps,
        activation=activation,
        channel_dim=channel_dim,
    )
    return y, count, *statistics, "reference"


def backward(
    backend: str,
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    mask: Tensor | None,
    count: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    activation: str | None,
    channel_dim: int,
) -> Gradients:
    """Gradients of `forward`, by the backend that served it."""
    if backend == "aten":
        return aten.backward(
            dy, x, y, mean, var, weight, constant=count is None, eps=eps, activation=activation
        )
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
    )
