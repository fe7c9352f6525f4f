"""What becomes of a layer's weights when a batch norm next to it is folded into them.

In evaluation a batch norm is an affine map of each channel, z = s·y + t with

    s = γ / √(var + eps)        t = β − s·mean

A linear map y = W·x + b (a convolution, a transposed one, a matrix) followed by it is

    z = (s·W)·x + (s·b + t)                     s along the channels that W puts out

and one that follows it, z = W·(s·x + t) + b,

    z = (W·s)·x + (W·t + b)                     s along the channels that W takes in

where W·t is the sum over all taps: exact wherever every output sees every tap, which padding with
zeros and transposed convolutions prevent unless t = 0. A batch norm itself is a map with the weight
γ and the bias β in this sense. All is computed in float64, and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.tools.folding.kinds import Kind, known


@dataclass(frozen=True)
class Affine:
    """z = scale·y + shift, for each channel; float64."""

    scale: Tensor
    shift: Tensor


@dataclass
class Weights:
    """W and b of a layer, on the way to new ones; float64."""

    kind: Kind
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, layer: Any) -> Weights:
        """As they are now."""
        weight, bias = layer.weight, layer.bias
        if weight is None:  # a batch norm without
            weight = torch.ones_like(layer.running_mean)
        return cls(
            known(layer),
            _wide(weight),
            None if bias is None else _wide(bias),
        )

    def then(self, after: Affine) -> Weights:
        """Followed by an affine map."""
        weight, bias = self._scaled(after.scale, first=not self._transposed), after.shift
        if self.bias is not None:
            bias = bias + self.bias * after.scale
        return Weights(self.kind, weight, bias)

    def following(self, before: Affine) -> Weights:
        """After an affine map."""
        weight, bias = self._scaled(before.scale, first=self._transposed), self.bias
        if bool((before.shift != 0).any()):
            # Not for a transposed one: it takes no shift.
            taps = self._scaled(before.shift, first=False)
            shift = taps.flatten(1).sum(1)
            bias = shift if bias is None else bias + shift
        return Weights(self.kind, weight, bias)

    @property
    def _transposed(self) -> bool:
        return self.kind.name == "transposed"

    def _scaled(self, scale: Tensor, *, first: bool) -> Tensor:
        """W with its first axis scaled, or its second, of which each group has its own."""
        if first:
            return self.weight * scale.reshape(-1, *(1,) * (self.weight.dim() - 1))
        groups = self.kind.groups
        rows, columns, *taps = self.weight.shape
        grouped = self.weight.reshape(groups, rows // groups, columns, *taps)
        scale = scale.reshape(groups, 1, columns, *(1,) * len(taps))
        return (grouped * scale).reshape(self.weight.shape)


def _wide(tensor: Tensor) -> Tensor:
    """On the CPU: not every device has float64."""
    return tensor.detach().to("cpu", torch.float64, copy=True)


def affine(layer: Any, weights: Weights) -> Affine:
    """What a batch norm layer is in evaluation, with γ and β as given."""
    mean, var = _wide(layer.running_mean), _wide(layer.running_var)
    scale = weights.weight / (var + layer.eps).sqrt()
    shift = -mean * scale
    return Affine(scale, shift if weights.bias is None else weights.bias + shift)


def put(layer: Any, new: Weights) -> None:
    """Give a layer new parameters; the old ones, which others may share, stay as they are."""
    old: Tensor | None = layer.weight
    like = layer.running_mean if old is None else old
    trains = bool(like.requires_grad)
    for name, value in (("weight", new.weight), ("bias", new.bias)):
        if value is None:
            continue
        own = getattr(layer, name)
        # As the old one lies in memory: channels-last weights stay so.
        pattern = like.detach() if name == "weight" else value
        place = torch.empty_like(pattern, dtype=like.dtype, device=like.device)
        parameter = nn.Parameter(
            place.copy_(value), requires_grad=trains if own is None else own.requires_grad
        )
        layer.register_parameter(name, parameter)
    if new.kind.name == "norm":
        layer.affine = True


def overflows(layer: Any, new: Weights) -> bool:
    """Whether the dtype of a layer cannot hold new weights."""
    old = layer.weight
    dtype = (layer.running_mean if old is None else old).dtype
    most = torch.finfo(dtype).max
    values = (new.weight, new.bias)
    return any(v is not None and bool((v.abs() > most).any()) for v in values)
