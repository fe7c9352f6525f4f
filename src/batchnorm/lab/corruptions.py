"""Corrupted images, as the benchmarks ImageNet-C and CIFAR-10-C have them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from batchnorm.errors import ArgumentError

#: Strengths 1 to 5. Noise (its standard deviation), contrast (what is left of it) and brightness
#: (what is added) are ImageNet-C's, for pixels from 0 to 1; the blur's standard deviation in pixels
#: is CIFAR-10-C's, whose images are small, too (both Hendrycks & Dietterich 2019).
STRENGTHS = {
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),
}


def corrupt(
    x: Tensor, kind: str, strength: float, low: float, high: float, generator: torch.Generator
) -> Tensor:
    """Images (rows, channels, height, width), corrupted and cut off at `low` and `high`.

    Strengths of noise and brightness are parts of the distance from `low` to `high`.

    Raises:
        ArgumentError: `kind` is none of `STRENGTHS`.
    """
    reach = high - low
    if kind == "noise":
        x = x + strength * reach * torch.randn(x.shape, generator=generator)
    elif kind == "contrast":
        mean = x.mean((2, 3), keepdim=True)
        x = mean + strength * (x - mean)
    elif kind == "brightness":
        x = x + strength * reach
    elif kind == "blur":
        x = _blurred(x, strength)
    else:
        raise ArgumentError(f"kind: expected one of {', '.join(STRENGTHS)}; got {kind!r}.")
    return x.clamp(low, high)


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """Smoothed by a Gaussian up to two pixels away; the border's pixels go on outside."""
    bell = torch.exp(-torch.arange(-2.0, 3.0).square() / (2 * sigma**2))
    bell /= bell.sum()
    channels = x.shape[1]
    kernel = torch.outer(bell, bell).expand(channels, 1, 5, 5)
    return conv2d(pad(x, (2, 2, 2, 2), mode="replicate"), kernel, groups=channels)
