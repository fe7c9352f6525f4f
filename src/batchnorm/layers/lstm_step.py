"""A step of a normalised LSTM: in torch's operations, or as one node of autograd.

    a = BN(z) + x              i, f, o = σ(a_i), σ(a_f), σ(a_o)        g = tanh(a_g)
    c = f ⊙ c' + i ⊙ g         t = tanh(BN(c))                         h = o ⊙ t

In torch's operations that is some fifteen nodes, and at usual sizes autograd takes longer to record
and to walk them than the arithmetic takes. As one node, around the C++ kernels, with δ for the
gradient of what it stands before and BNᵀ for the backward pass of a normalization:

    δc += BNᵀ(δh ⊙ o ⊙ (1 − t²))        δc' = δc ⊙ f        δz = BNᵀ(δa)        δx = δa
    δa = (δc ⊙ g ⊙ i(1 − i), δc ⊙ c' ⊙ f(1 − f), δc ⊙ i ⊙ (1 − g²), δh ⊙ t ⊙ o(1 − o))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from batchnorm.autograd_kernels import NotServedError
from batchnorm.kernels import calls
from batchnorm.layers.steps import ByFunction, Steps

Step = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From which step it is, z, x and c' to h and c."""

_sigmoid_backward = torch.ops.aten.sigmoid_backward.default
_tanh_backward = torch.ops.aten.tanh_backward.default


def step_of(hidden: Steps | None, cell: Steps | None, x: Tensor, c: Tensor) -> Step:
    """How to take the steps of a batch of sequences, of which x and c are like those to come.

    `hidden` and `cell` normalise z and c; None for what is not normalised.
    """
    if (
        isinstance(hidden, ByFunction)
        and isinstance(cell, ByFunction)
        and hidden.serves(x, c)
        and cell.serves(c, c)
        and not torch.is_autocast_enabled("cpu")
    ):
        return partial(_one_node, hidden, cell)
    return partial(_by_operations, hidden, cell)


def _by_operations(
    hidden: Steps | None, cell: Steps | None, step: int, z: Tensor, x: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    a = z + x if hidden is None else hidden.at(step, z, x)
    return _gated(a, c, (lambda c: c) if cell is None else partial(cell.at, step))


def _gated(a: Tensor, c: Tensor, normalize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    i, f, g, o = a.chunk(4, 1)
    c = torch.addcmul(i.sigmoid() * g.tanh(), f.sigmoid(), c)
    return o.sigmoid() * normalize(c).tanh(), c


def _one_node(
    hidden: ByFunction, cell: ByFunction, step: int, z: Tensor, x: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    parameters = hidden.weight, hidden.bias, cell.weight, cell.bias
    try:
        h, c = _Node.apply(z, x, c, *parameters, hidden, cell, step)
    except (NotServedError, NotImplementedError):
        # The second: a buffer is on a device, or of a kind, that has no such kernels.
        return _by_operations(hidden, cell, step, z, x, c)
    return h, c


class _Node(torch.autograd.Function):
    """The step, from z, x, c', γ and β of the hidden state's normalization and of the cell's."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        z, x, c_before, *parameters, hidden, cell, step = inputs
        # If the cell is refused nothing must have been changed.
        gates, ctx.of_hidden = hidden.forward(step, z, x, later=True)
        i, f, g, o = gates.chunk(4, 1)
        gates[:, : 2 * c_before.shape[1]].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        c = torch.addcmul(i * g, f, c_before)
        t, ctx.of_cell = cell.forward(step, c)
        hidden.keep(step, ctx.of_hidden)
        t.tanh_()
        ctx.norms = hidden, cell
        ctx.save_for_backward(z, x, c_before, *parameters, gates, c, t)
        return o * t, c

    @staticmethod
    def backward(ctx: Any, dh: Tensor, dc: Tensor) -> tuple[Any, ...]:
        # As KernelFunction's: someone may differentiate these gradients.
        if not torch.is_grad_enabled() and all(map(calls.serves_gradient, (dh, dc))):
            try:
                found = _gradients(ctx, dh, dc)
            except NotServedError:
                pass
            else:
                wanted = zip(found, ctx.needs_input_grad, strict=False)
                return *(d if needed else None for d, needed in wanted), None, None, None
        return _differentiable_gradients(ctx, dh, dc)


def _gradients(ctx: Any, dh: Tensor, dc: Tensor) -> tuple[Tensor, ...]:
    z, _, c_before, gamma_h, _, gamma_c, _, gates, c, t = ctx.saved_tensors
    hidden, cell = ctx.norms
    i, f, g, o = gates.chunk(4, 1)
    of_c, of_gamma_c, of_beta_c = cell.backward(_tanh_backward(dh * o, t), c, gamma_c, *ctx.of_cell)
    dc = dc + of_c
    of_gates = (
        _sigmoid_backward(dc * g, i),
        _sigmoid_backward(dc * c_before, f),
        _tanh_backward(dc * i, g),
        _sigmoid_backward(dh * t, o),
    )
    da = torch.cat(of_gates, 1)
    dz, of_gamma_h, of_beta_h = hidden.backward(da, z, gamma_h, *ctx.of_hidden)
    return dz, da, dc * f, of_gamma_h, of_beta_h, of_gamma_c, of_beta_c


def _differentiable_gradients(ctx: Any, dh: Tensor, dc: Tensor) -> tuple[Any, ...]:
    """The node's gradients as functions of its inputs: by torch's operations, once more."""
    needs = ctx.needs_input_grad
    hidden, cell = ctx.norms
    with torch.enable_grad():
        # z and c come from earlier steps, of the same γ and β, whose own nodes see to these: behind
        # views the way back through them is not taken here.
        inputs: Any = [None if of is None else of.view_as(of) for of in ctx.saved_tensors[:7]]
        z, x, c, gamma_h, beta_h, gamma_c, beta_c = inputs
        a = hidden.again(z, x, gamma_h, beta_h, *ctx.of_hidden)
        outputs = _gated(a, c, lambda c: cell.again(c, None, gamma_c, beta_c, *ctx.of_cell))
    wanted = [tensor for tensor, needed in zip(inputs, needs, strict=False) if needed]
    create = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(outputs, wanted, (dh, dc), create_graph=create))
    return tuple(next(found) if needed else None for needed in needs)
