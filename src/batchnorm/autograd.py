"""The kernels as one differentiable operation, to any order, forward and reverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.kernels import native, reference, select
from batchnorm.moments import Moments, expand_mask


class BatchNormFunction(torch.autograd.Function):
    """The kernels as one differentiable operation, with the outputs of `select.Forward`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        activation: str | None,
        channel_dim: int,
    ) -> select.Forward:
        return select.forward(
            x,
            mask,
            None if mean is None or var is None else (mean, var),
            weight,
            bias,
            residual,
            eps=eps,
            activation=activation,
            channel_dim=channel_dim,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> Any:
        x, weight, bias, residual, mask, _, _, ctx.eps, ctx.activation, ctx.channel_dim = inputs
        y, count, mean, var, invstd, ctx.backend = output
        # Lists, not generators: Dynamo cannot pass a generator on.
        ctx.mark_non_differentiable(*[t for t in (count, mean, var, invstd) if t is not None])
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
            return (None,) * 10
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
        )
        wanted = zip(out, ctx.dtypes, ctx.needs_input_grad, strict=False)
        return (*(g.to(dtype) if needed else None for g, dtype, needed in wanted), *(None,) * 6)


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


class NotServedError(Exception):
    """The C++ kernels leave this call to others, and have changed nothing."""


class NativeFunction(torch.autograd.Function):
    """The C++ kernels, running update included: eager calls on the CPU only.

    The arguments after `residual`, packed because each one that autograd sees costs time: the mask
    (with a channel axis of size 1), running mean and variance, counter, momentum, eps, activation,
    channel axis, training, and whether the running update is to come later; then a list that gets
    what that needs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, int]:
        *arguments, kept = options
        y, statistics, count, refused = native.forward(x, weight, bias, residual, *arguments)
        if refused == native.NOT_SERVED:
            raise NotServedError
        mask, _, _, _, _, eps, activation, channel_dim, training, _ = arguments
        kept += (statistics, count)
        ctx.set_materialize_grads(False)
        ctx.backend = "native"
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.options = count, eps, activation, channel_dim, training
        # z's sign is computed again from x; with a residual, which is not kept, it is told from y.
        ctx.save_for_backward(
            x,
            weight,
            bias if activation else None,
            y if activation and residual is not None else None,
            mask,
            statistics,
        )
        return y, refused

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None = None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 5
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled() or not native.serves_gradient(dy):
            # Someone will differentiate these gradients, or a torch.func transform is running.
            out = _differentiable_gradients(ctx, dy)
            return (*(g if needed else None for g, needed in zip(out, needs, strict=False)), None)
        x, weight, bias, y, mask, statistics = ctx.saved_tensors
        dx, dz, d_weight, d_bias, served = native.backward(
            dy,
            x,
            y,
            statistics,
            weight,
            bias,
            mask,
            *ctx.options,
            needs[0],
            needs[3],
            needs[1] or needs[2],
        )
        if served == native.NOT_SERVED:  # a hook has brought back other tensors than were saved
            out = _differentiable_gradients(ctx, dy)
            return (*(g if needed else None for g, needed in zip(out, needs, strict=False)), None)
        if needs[3] and dz is None:
            dz = dy
        return dx, d_weight if needs[1] else None, d_bias if needs[2] else None, dz, None


def _differentiable_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    """NativeFunction's gradients as functions of its inputs, by the reference."""
    x, weight, bias, y, mask, statistics = ctx.saved_tensors
    _, eps, code, channel_dim, training = ctx.options
    activation = native.ACTIVATION_NAMES[code]
    mean, var = statistics
    total = None
    weights = None if mask is None else mask.to(mean.dtype)
    if training:
        moments = Moments.of(
            x, None if mask is None else mask.squeeze(channel_dim), channel_dim=channel_dim
        )
        mean, var, total = moments.mean, moments.variance(), moments.count
    if activation is not None and y is None:
        with torch.no_grad():
            y = reference.normalize(
                x,
                mean,
                var,
                weight,
                bias,
                None,
                eps=eps,
                activation=activation,
                channel_dim=channel_dim,
            )
    out = reference.backward(
        dy,
        x,
        y,
        weights,
        total,
        mean,
        var,
        weight,
        eps=eps,
        activation=activation,
        channel_dim=channel_dim,
    )
    dtypes = x.dtype, x.dtype if weight is None else weight.dtype, ctx.bias_dtype, dy.dtype
    wanted = (out.x, out.weight, out.bias, out.z)
    return tuple(g.to(dtype) for g, dtype in zip(wanted, dtypes, strict=True))


def native_step(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    options: tuple[Any, ...],
    kept: list[Any],
) -> tuple[Tensor, int] | None:
    """NativeFunction, or its kernels alone where nobody asks for gradients; None: not served.

    `kept` gets the statistics and their count.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        try:
            y, refused = NativeFunction.apply(x, weight, bias, residual, (*options, kept))
        except (NotServedError, NotImplementedError):
            # The second: one of the tensors is on a device, or of a kind, that has no such kernels.
            return None
        return y, refused
    try:
        y, *of_batch, refused = native.forward(x, weight, bias, residual, *options)
    except NotImplementedError:
        return None
    kept += of_batch
    return None if refused == native.NOT_SERVED else (y, refused)


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
        mean, var = moments.mean, moments.variance()
    return "reference", mean, var
