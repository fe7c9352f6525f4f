"""torch's own CPU kernels, for the plain float32 cases in which they are right.

They compute y = x·α + (β − mean·α) in float32, so the error of y grows with the offset
ρ = |mean|/σ: about 2u·ρ·|γ| with u = 2⁻²⁴. Where the channels are the fastest axis, they sum over
the batch in float32, one value after the other; in the backward pass they sum so over each plane:
the error grows with the number of values. The limits below are checked per call; what exceeds them
goes to the reference. What is served is torch's own result, to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels.reference import ACTIVATIONS, Gradients, activation_slope

#: Largest |mean|/σ served. 2u·ρ = 2e-6 at 16, four times what rounding x itself to float32 has cost
#: already. Layers after a ReLU or a sigmoid see offsets of 1 to 10, and should not leave these
#: kernels. Measured: error of the mean in σ 2e-7 at ρ = 4 and 1.7e-6 at ρ = 32, (8, 64, 28, 28).
MAX_OFFSET = 16.0

#: Most values per channel summed one after the other in float32, the dense (N, C) layout.
#: Measured error of the mean in σ at ρ = 8: 9e-7 for 64 values, 9e-6 for 4096; the variance's
#: relative error: 1e-7 and 1.1e-6. 1024 keeps both near the 2e-6 above.
MAX_DENSE_COUNT = 1024

#: Most values of a plane (what follows the channel axis) summed one after the other in float32 by
#: the backward pass. Measured error of dβ for a constant dy, the worst case, relative: 7 u for
#: 56 · 56, 39 u for 112 · 112, 1640 u for 512 · 512.
MAX_PLANE = 4096


def serves(x: Tensor, *others: Tensor | None, channel_dim: int) -> bool:
    """Whether shape, dtype and layout of this call are ones these kernels are right for."""
    values = x.shape[0] * (x.numel() // max(x.shape[0] * x.shape[1], 1))
    dense = values == x.shape[0] or x.shape[1] == 1
    return (
        channel_dim % x.dim() == 1
        and values > 0
        and (not dense or values <= MAX_DENSE_COUNT)
        and all(
            t is None or (t.device.type == "cpu" and t.dtype is torch.float32 and t.is_contiguous())
            for t in (x, *others)
        )
    )


def exports(x: Tensor, *others: Tensor | None, channel_dim: int) -> bool:
    """Whether evaluation can be left as torch's one operation in an exported graph.

    Exporters turn that operation into the BatchNormalization node of their format, which is worth
    more to them than the digits that it loses where the running mean is many σ from zero.
    """
    dtypes = {t.dtype for t in others if t is not None}
    return channel_dim % x.dim() == 1 and (
        dtypes == {x.dtype} or (dtypes == {torch.float32} and x.dtype.itemsize == 2)
    )


def backward_serves(x: Tensor) -> bool:
    """Whether the backward pass is right for a call that the forward pass was right for."""
    return x.numel() <= MAX_PLANE * x.shape[0] * x.shape[1]


def train(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """γ·x̂ + β by the batch's statistics; its mean, biased variance and 1/√(var + eps)."""
    # With momentum 1 the running variance is the batch's, unbiased: 1/invstd² − eps would lose it
    # where var is much smaller than eps.
    mean, unbiased = x.new_zeros(2, x.shape[1]).unbind()
    z, mean, invstd = torch.native_batch_norm(x, weight, bias, mean, unbiased, True, 1.0, eps)
    count = x.numel() // x.shape[1]
    return z, mean, unbiased * ((count - 1) / count), invstd


def accurate(mean: Tensor, var: Tensor) -> bool:
    """Whether these statistics are finite and the offset within what is served."""
    # (ρσ)² − mean², whose least and greatest say it all: NaN passes neither comparison, and an
    # infinite variance not the second. Against σ itself, not √(var + eps): else a channel with a
    # tiny spread would lose it in the rounding of its mean.
    least, greatest = (var * MAX_OFFSET**2).addcmul_(mean, mean, value=-1).aminmax()
    return bool(least >= 0) and bool(greatest < torch.inf)


def evaluate(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """γ·x̂ + β by the statistics given."""
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)


def finish(z: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """Activation(z + residual), in the memory of z where it can be."""
    if residual is not None:
        z = z.add_(residual) if z.dtype == residual.dtype else z + residual
    if activation == "relu":
        return z.relu_()
    if activation == "leaky_relu":
        return torch.nn.functional.leaky_relu_(z, ACTIVATIONS[activation])
    return z


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    invstd: Tensor | None,
    weight: Tensor | None,
    *,
    eps: float,
    activation: str | None,
) -> Gradients:
    """As the reference's function of this name; without `invstd` the moments are constants."""
    dz = activation_slope(dy, y, activation)
    dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
        dz, x, weight, mean, var, mean, invstd, invstd is not None, eps, [True] * 3
    )
    return Gradients(dx, d_weight, d_bias, dz)
