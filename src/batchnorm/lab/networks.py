"""The networks that experiments share: a multilayer perceptron and residual networks.

Every weight is drawn from the generator given, so that two arms that draw the same shapes in the
same order begin with the same weights; layers that only one arm has draw nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from batchnorm import BatchNorm

Norm = Callable[[int], nn.Module | None]
"""Makes the normalization for so many channels; None: there is none, and the layer has a bias."""

Activation = Callable[[], nn.Module]

#: Channels of the residual network's stages; each but the first halves the image.
STAGES = (16, 32, 64)


def nothing(channels: int) -> None:
    """No normalization."""


def dense(
    fan_in: int, fan_out: int, generator: torch.Generator, *, gain: float = 2.0, bias: bool = True
) -> nn.Linear:
    """A layer with normal weights of variance gain / fan-in (He's, by default) and zero bias."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out, bias=bias)
    nn.init.normal_(layer.weight, std=math.sqrt(gain / fan_in), generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def mlp(
    sizes: Sequence[int],
    norm: Norm,
    generator: torch.Generator,
    *,
    activation: Activation = nn.ReLU,
    gain: float = 2.0,
) -> nn.Sequential:
    """Dense layers with normalization before the activation, and a dense head.

    Args:
        sizes: of the input, the hidden layers and the output.
        norm: of the hidden layers.
        generator: of the weights.
        activation: of the hidden layers.
        gain: see `dense`.
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes[:-1]):
        normalization = norm(fan_out)
        layers.append(dense(fan_in, fan_out, generator, gain=gain, bias=normalization is None))
        layers += [] if normalization is None else [normalization]
        layers.append(activation())
    return nn.Sequential(*layers, dense(sizes[-2], sizes[-1], generator, gain=1.0))


def convolution(
    fan_in: int, fan_out: int, generator: torch.Generator, *, size: int = 3, stride: int = 1,
    bias: bool = False,
) -> nn.Conv2d:  # fmt: skip
    """A convolution that keeps the image's size (by its stride), with He's normal weights."""
    layer: nn.Conv2d = nn.utils.skip_init(
        nn.Conv2d, fan_in, fan_out, size, stride=stride, padding=size // 2, bias=bias
    )
    std = math.sqrt(2 / (fan_in * size * size))
    nn.init.normal_(layer.weight, std=std, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _normalized(
    fan_in: int, fan_out: int, norm: Norm, generator: torch.Generator, **options: int
) -> list[nn.Module]:
    normalization = norm(fan_out)
    layer = convolution(fan_in, fan_out, generator, bias=normalization is None, **options)
    return [layer] if normalization is None else [layer, normalization]


class Block(nn.Module):
    """relu(shortcut(x) + branch(x)): two convolutions in the branch."""

    def __init__(
        self, fan_in: int, fan_out: int, stride: int, norm: Norm, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *_normalized(fan_in, fan_out, norm, generator, stride=stride),
            nn.ReLU(),
            *_normalized(fan_out, fan_out, norm, generator),
        )
        same = fan_in == fan_out and stride == 1
        self.shortcut = nn.Sequential(
            *([] if same else _normalized(fan_in, fan_out, norm, generator, size=1, stride=stride))
        )

    def forward(self, x: Tensor) -> Tensor:
        """The rectified sum."""
        y: Tensor = (self.shortcut(x) + self.branch(x)).relu()
        return y


def resnet(
    channels: int, classes: int, norm: Norm, generator: torch.Generator, *, blocks: int = 1
) -> nn.Sequential:
    """A residual network for images of (channels, height, width), as He et al. 2016 have for CIFAR.

    Args:
        channels: of the images.
        classes: of the output.
        norm: after every convolution.
        generator: of the weights.
        blocks: in each of the three stages.
    """
    layers: list[nn.Module] = [*_normalized(channels, STAGES[0], norm, generator), nn.ReLU()]
    before = STAGES[0]
    for stage, width in enumerate(STAGES):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(Block(before, width, stride, norm, generator))
            before = width
    head = dense(before, classes, generator, gain=1.0)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


class DenseBlock(nn.Module):
    """relu(x + BN(W·relu(BN(V·x)))), fused where the layer can.

    Args:
        width: of input and output.
        generator: of the weights.
        last: γ of the second normalization at the start.
    """

    def __init__(self, width: int, generator: torch.Generator, *, last: float = 1.0) -> None:
        super().__init__()
        self.first = dense(width, width, generator, bias=False)
        self.inner = BatchNorm(width, activation="relu")
        self.second = dense(width, width, generator, bias=False)
        self.outer = BatchNorm(width, activation="relu")
        nn.init.constant_(self.outer.weight, last)

    def forward(self, x: Tensor) -> Tensor:
        """The rectified sum."""
        y: Tensor = self.outer(self.second(self.inner(self.first(x))), residual=x)
        return y


def residual_mlp(
    sizes: tuple[int, int, int], blocks: int, generator: torch.Generator, *, last: float = 1.0
) -> nn.Sequential:
    """A dense layer with normalization and ReLU, dense residual blocks, and a dense head.

    Args:
        sizes: of the input, the blocks and the output.
        blocks: how many.
        generator: of the weights.
        last: see `DenseBlock`.
    """
    fan_in, width, classes = sizes
    stem = dense(fan_in, width, generator, bias=False), BatchNorm(width, activation="relu")
    body = [DenseBlock(width, generator, last=last) for _ in range(blocks)]
    return nn.Sequential(*stem, *body, dense(width, classes, generator, gain=1.0))
