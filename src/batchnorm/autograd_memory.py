"""What makes a layer's output again from its input, or its input from its output.

For `tools.memory`, which lets a graph keep one of the two. Both are read off the node of the graph
that a layer's call has made, and are calls of the kernels that served it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from batchnorm.autograd import EagerBatchNormFunction
from batchnorm.autograd_kernels import KernelFunction
from batchnorm.kernels import aten, calls, select
from batchnorm.kernels.reference import LEAKY_SLOPE

Make = Callable[..., Tensor]
"""One of a layer's two tensors, made from the other (and the output from a residual, too)."""

#: An input is made again only in channels where |β/γ| + |mean|/σ is at most this: there x̂ gets an
#: error of so many roundings of a value of size 1, which is three bits of what the dtype holds. A
#: choice; trained networks have most channels below 4.
LIMIT = 8.0

#: And where |γ| is at least this (float32 loses digits below 1e-37, and some devices below 1e-38
#: everything), which leaves y and σ/γ room to be of any usual size.
LEAST_GAMMA = 1e-30

#: What is lost beside a variance of 1.
_NO_EPS = 1e-30


class Call(NamedTuple):
    """A layer's call, as its node tells it: what it normalised by, what comes after.

    Attributes:
        backend: whose kernels served it, by the name that `backends` has for them.
        kernels: those, if they serve whole calls.
        mean: of each channel, or of each group's channels one after the other.
        var: biased variance, likewise.
        weight: γ or None, a copy: an optimizer may change it before the backward pass.
        bias: β or None, likewise.
        n: weight behind the statistics, or None where they are constants.
        eps: added to the variance.
        activation: the fused one.
        channel_dim: the axis of the channels.
        group: samples in a group that has its own statistics, or 0.
        masked: whether there was a mask.
    """

    backend: str
    kernels: Any
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    n: float | Tensor | None
    eps: float
    activation: str | None
    channel_dim: int
    group: int
    masked: bool


def call_of(y: Tensor, x: Tensor, bias: Tensor | None) -> Call | None:
    """What the node of a layer's output says; None: another operation made it, or not of this x.

    `bias` is the layer's β, which not every node keeps.
    """
    node: Any = y.grad_fn
    kind = getattr(node, "_forward_cls", None)
    if kind is KernelFunction:
        saved, weight, _, _, mask, statistics = node.saved_tensors
        count, eps, channel_dim, _ = node.options
        if statistics.shape[1] != x.shape[channel_dim]:  # those of all groups stand behind
            statistics = statistics[:, : -x.shape[channel_dim]]
        kernels, group = node.kernels, node.flags >> calls.GROUP_BIT
        activation = calls.ACTIVATION_NAMES[node.flags & calls.ACTIVATION]
        n = count if node.flags & calls.TRAINING else None
        mean, var = statistics
    elif kind is EagerBatchNormFunction:
        saved, weight, _, mask, count, mean, var, _ = node.saved_tensors
        kernels, group, n = None, 0, count
        eps, activation, channel_dim = node.eps, node.activation, node.channel_dim
    else:
        return None
    if any(of(saved) != of(x) for of in (Tensor.data_ptr, Tensor.size, Tensor.stride)):
        return None
    weight, bias = (None if v is None else v.detach().clone() for v in (weight, bias))
    masked = mask is not None
    served = node.backend, kernels
    return Call(*served, mean, var, weight, bias, n, eps, activation, channel_dim, group, masked)


def output_again(call: Call) -> Make:
    """y from x and the residual: the very same bits, by the kernels that made it first."""

    @torch.no_grad()  # mutant: only slower without
    def make(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return _normalize(x, residual, call)

    return make


def input_again(call: Call, x: Tensor, y: Tensor) -> tuple[Make, int] | str:
    """x from y = φ(γ·x̂ + β), and how many bytes of x that takes besides; or why it cannot be made.

        x = mean + σ·x̂        x̂ = (φ⁻¹(y) − β)/γ        σ = √(var + eps)

    y is z = γ·x̂ + β rounded, at most u·(|γ x̂| + |β|) from it, and x is rounded again. So in x̂ the
    error is some u·(2·|x̂| + |β/γ| + |mean|/σ). Of channels where the last two are more than `LIMIT`
    together, γ = 0 among them, x itself is kept; so it is where y has overflowed, or may have. That
    is for |γ|·√n + |β| beyond the dtype, as |x̂| ≤ √n of n elements by whose moments it is made: so
    by constant statistics, with a mask, or by groups (which would be more than C channels), nothing
    is made.

    Which channels those are is read back from a device once a call.
    """
    if call.activation == "relu":
        return "ReLU has no inverse"
    if call.n is None:
        return "it does not normalise by its batch (evaluation, frozen): x̂ may be of any size"
    if call.masked:
        return "it has a mask: what that leaves out may be of any size"
    if call.group:
        return "it has ghost batches"
    wide = call.mean.dtype
    one = torch.ones_like(call.mean)
    gamma = one if call.weight is None else call.weight.to(wide)
    beta = torch.zeros_like(one) if call.bias is None else call.bias.to(wide)
    sigma = (call.var + call.eps).sqrt()
    limits = torch.finfo(y.dtype)
    slope = 1.0 if call.activation is None else LEAKY_SLOPE
    # float16 loses digits below its `tiny`, which usual values come near; no device drops them all.
    least = max(LEAST_GAMMA, 2 * limits.tiny / slope if y.dtype is torch.float16 else 0.0)
    narrow = x.dtype if x.dtype is torch.float64 else torch.float32  # of the scale below
    kept = ~(  # not the reverse: NaN is kept
        (beta.abs() / gamma.abs() + call.mean.abs() / sigma <= LIMIT)
        & (gamma.abs() >= least)
        & (gamma.abs() * call.n**0.5 + beta.abs() < limits.max)
        & (sigma / gamma.abs() < torch.finfo(narrow).max)
    )
    where = kept.nonzero().flatten()
    if len(where) == len(kept):
        return f"in no channel is |β/γ| + |mean|/σ at most {LIMIT:g} and γ·x̂ + β a usual number"
    values = x.detach().index_select(call.channel_dim, where)
    # The same kernels once more: mean β, variance 1, and σ/γ and the mean in place of γ and β.
    scale, beta = torch.where(kept, one, sigma / gamma), torch.where(kept, 0.0, beta)
    back = call._replace(
        backend=call.backend if call.kernels else "reference",
        mean=beta,
        var=one,
        weight=scale.to(narrow),
        bias=call.mean.to(narrow),
        eps=_NO_EPS,
        activation=None,
    )

    @torch.no_grad()  # mutant: only slower without
    def make(y: Tensor) -> Tensor:
        z = y if call.activation is None else leaky_relu(y, 1 / slope)
        made = _normalize(z, None, back)
        return made.index_copy_(call.channel_dim, where, values) if len(where) else made

    return make, values.nbytes + where.nbytes


def _normalize(x: Tensor, residual: Tensor | None, call: Call) -> Tensor:
    mean, var = call.mean.contiguous(), call.var.contiguous()
    if call.backend == "aten":
        # Its training and its evaluation may differ in the last bit.
        z = (
            aten.evaluate(x, mean, var, call.weight, call.bias, call.eps)
            if call.n is None
            else aten.train(x, call.weight, call.bias, call.eps)[0]
        )
        return aten.finish(z, residual, call.activation)
    if call.kernels is None:
        return select.normalize(
            *(x, mean, var, call.weight, call.bias, residual),
            eps=call.eps,
            activation=call.activation,
            channel_dim=call.channel_dim,
        )
    flags = calls.ACTIVATIONS[call.activation] | call.group << calls.GROUP_BIT
    y: Tensor
    y, *_, refused = call.kernels.forward(
        *(x, call.weight, call.bias, residual, None, mean, var, None, 0.0),
        *(call.eps, call.channel_dim, flags),
    )
    if refused == calls.NOT_SERVED:
        raise RuntimeError(
            f"the kernels made this of {x.dtype} {tuple(x.shape)} once, and now do not: has a "
            "hook changed what the graph keeps?"
        )
    return y
