"""The kernels as one differentiable operation, to any order, forward and reverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.kernels import reference, select
from batchnorm.moments import Axes, Moments, Pool, channel_axis, expand_mask


class BatchNormFunction(torch.autograd.Function):
    """The kernels as one differentiable operation, with the outputs of `select.Forward`.

    By the batch's own moments; by a mean and variance given, which are constants; or, with a count
    too, by moments in which x has its share, as others may have theirs: gradients go through them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        count: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        activation: str | None,
        channel_dim: Axes,
        pool: Pool | None,  # noqa: ARG004
    ) -> tuple[Any, ...]:
        given = None if mean is None or var is None else (mean, var)
        options: Any = {"eps": eps, "activation": activation}
        if count is not None and given is not None:
            y = select.normalize(
                x, *given, weight, bias, residual, channel_dim=channel_dim, **options
            )
            return y, None, None, None, None, "reference"
        channel = channel_axis(channel_dim)
        return select.forward(
            x, mask, given, weight, bias, residual, channel_dim=channel, **options
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> Any:
        x, weight, bias, residual, mask, count, mean, var, *options = inputs
        ctx.eps, ctx.activation, ctx.channel_dim, ctx.pool = options
        y, *statistics, invstd, ctx.backend = output
        # Lists, not generators: Dynamo cannot pass a generator on.
        ctx.mark_non_differentiable(*[t for t in (*statistics, invstd) if t is not None])
        if count is None:
            count, mean, var = statistics
        ctx.set_materialize_grads(False)
        ctx.output_dtype = y.dtype
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias, residual)]
        # The activation's slope is told from the sign of y; without one y need not be kept alive.
        saved = x, weight, None if ctx.activation is None else y, mask, count, mean, var, invstd
        ctx.save_for_backward(*saved)
        return saved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        if dy is None:
            return (None,) * 12
        x, weight, y, mask, count, mean, var, invstd = ctx.saved_tensors
        backend = ctx.backend
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Someone will differentiate these gradients: they must be functions of x, not of
            # the numbers that the forward pass saved.
            backend, mean, var = _reference_statistics(ctx, x, mask, count, mean, var)
        out = select.backward(
            backend,
            dy,
            x,
            y,
            mask,
            count,
            mean,
            var,
            invstd,
            weight,
            eps=ctx.eps,
            activation=ctx.activation,
            channel_dim=ctx.channel_dim,
            # As all kernels: others may serve another process.
            pool=ctx.pool if ctx.needs_input_grad[0] else None,
            wanted=ctx.needs_input_grad[:4],
        )
        wanted = zip(out, ctx.dtypes, ctx.needs_input_grad, strict=False)
        return (*(g.to(dtype) if needed else None for g, dtype, needed in wanted), *(None,) * 8)


class DualBatchNormFunction(BatchNormFunction):
    """The same with forward-mode differentiation, which Dynamo refuses to trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        # The very same: vmap keeps one list for both.
        ctx.save_for_forward(*BatchNormFunction.setup_context(ctx, inputs, output))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        # torch runs this with forward-mode differentiation off, at outer levels too: the derivative
        # of a derivative would silently be wrong (2.13: a Function for x³ has a Hessian of zero).
        # So on again, and this level's own tangents taken off. No public name exists for that.
        with forward_ad._set_fwd_grad_enabled(True):
            x, weight, y, mask, count, mean, var, _ = map(_primal, ctx.saved_tensors)
            _, mean, var = _reference_statistics(ctx, x, mask, count, mean, var)
            weights = None if mask is None else expand_mask(mask, x, ctx.channel_dim).to(mean.dtype)
            y_dot = reference.tangent(
                x,
                y,
                weights,
                count,
                mean,
                var,
                weight,
                tangents[:4],
                eps=ctx.eps,
                activation=ctx.activation,
                channel_dim=ctx.channel_dim,
                pool=ctx.pool,
            )
        return y_dot.to(ctx.output_dtype), None, None, None, None, None


class EagerBatchNormFunction(torch.autograd.Function):
    """The same where no torch.func transform is running.

    Those need a separate `setup_context`, for which torch binds the arguments by `inspect` at each
    call: measured 60 µs of a forward pass of 140 µs on (60, 100).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Any, ...]:
        output = BatchNormFunction.forward(*inputs)
        DualBatchNormFunction.setup_context(ctx, inputs, output)
        return output

    backward = BatchNormFunction.backward
    jvp = DualBatchNormFunction.jvp


def function() -> Callable[..., Any]:
    """The form of the operation that what is running can take."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        # A trace keeps a Function as a call into Python; so it gets the operations inside.
        return BatchNormFunction.forward
    if torch.compiler.is_compiling():
        return BatchNormFunction.apply
    # No public name exists for this question; torch's own Function.apply asks it so.
    if torch._C._are_functorch_transforms_active():
        return DualBatchNormFunction.apply
    return EagerBatchNormFunction.apply


def _primal(tensor: Any) -> Any:
    return None if tensor is None else forward_ad.unpack_dual(tensor).primal


def _reference_statistics(
    ctx: Any, x: Tensor, mask: Tensor | None, count: Tensor | None, mean: Tensor, var: Tensor
) -> tuple[str, Tensor, Tensor]:
    """The statistics as differentiable functions of x, or as they are if they are constants."""
    if count is not None:
        moments = Moments.of(x, mask, channel_dim=ctx.channel_dim)
        if ctx.pool is not None:
            moments, _ = ctx.pool.merge(moments)
        mean, var = moments.mean, moments.normalizing_variance()
    return "reference", mean, var
