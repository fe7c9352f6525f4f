"""torch's own CPU kernels, for the plain float32 cases in which they are right.

They accumulate well but compute y = x·α + (β − mean·α) in float32, so the error of y grows with the
offset ρ = |mean|/σ: about 2u·ρ·|γ| with u = 2⁻²⁴. And where the channels are the fastest axis, the
sums over the batch run in float32 one after the other, so their error grows with the batch as well.
Both limits below are checked per call; what exceeds them goes to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels.reference import ACTIVATIONS, Gradients, activation_slope, inverse_std

#: Largest |mean|/σ served. 2u·ρ = 2e-6 at 16, four times what rounding x itself to float32 has cost
#: already. Layers after a ReLU or a sigmoid see offsets of 1 to 10, and should not leave these
#: kernels. Measured: error of the mean in σ 2e-7 at ρ = 4 and 1.7e-6 at ρ = 32, (8, 64, 28, 28).
MAX_OFFSET = 16.0

#: Most values per channel summed one after the other in float32, the dense (N, C) layout.
#: Measured error of the mean in σ at ρ = 8: 9e-7 for 64 values, 9e-6 for 4096; the variance's
#: relative error: 1e-7 and 1.1e-6. 1024 keeps both near the 2e-6 above.
MAX_DENSE_COUNT = 1024


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
    """Whether evaluation can be left as torch's one operation in a compiled or exported graph.

    Exporters turn that operation into the BatchNormalization node of their format, and Inductor
    decomposes it into centred arithmetic of its own.
    """
    dtypes = {t.dtype for t in others if t is not None}
    return channel_dim % x.dim() == 1 and (
        dtypes == {x.dtype} or (dtypes == {torch.float32} and x.dtype.itemsize == 2)
    )


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, float32."""
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    return mean, var


def accurate(mean: Tensor, var: Tensor, eps: float) -> bool:
    """Whether these statistics are finite and the offset small enough for `normalize`."""
    # (4σ)² − mean², whose least and greatest say it all: NaN passes neither comparison, and an
    # infinite variance not the second.
    least, greatest = (var + eps).mul_(MAX_OFFSET**2).addcmul_(mean, mean, value=-1).aminmax()
    return bool(least >= 0) and bool(greatest < torch.inf)


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
) -> Tensor:
    """As the reference's function of this name."""
    z = torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)
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
    weight: Tensor | None,
    *,
    constant: bool,
    eps: float,
    activation: str | None,
) -> Gradients:
    """As the reference's function of this name; `constant` says that the moments are given."""
    dz = activation_slope(dy, y, activation)
    dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
        dz, x, weight, mean, var, mean, inverse_std(var, eps), not constant, eps, [True] * 3
    )
    return Gradients(dx, d_weight, d_bias, dz)
