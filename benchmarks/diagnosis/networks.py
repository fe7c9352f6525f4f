"""The networks of the corpus: small, and of many kinds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm


def mlp(norm: Any = nn.BatchNorm1d, depth: int = 2, width: int = 64) -> nn.Sequential:
    """Dense layers."""
    layers: list[nn.Module] = []
    for k in range(depth):
        fan_in = 64 if k == 0 else width
        layers += [nn.Linear(fan_in, width, bias=False), norm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def cnn(norm: Any = nn.BatchNorm2d, widths: tuple[int, ...] = (8, 16)) -> nn.Sequential:
    """Convolutions and a dense layer."""
    layers: list[nn.Module] = []
    for fan_in, width in zip((1, *widths), widths, strict=False):
        layers += [nn.Conv2d(fan_in, width, 3, padding=1, bias=False), norm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))


def sequence(norm: Any = nn.BatchNorm1d) -> nn.Sequential:
    """Convolutions along an image's lines."""
    return nn.Sequential(
        *(nn.Conv1d(8, 32, 3, padding=1, bias=False), norm(32), nn.ReLU()),
        *(nn.Conv1d(32, 32, 3, padding=1, bias=False), norm(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def depthwise() -> nn.Sequential:
    """Convolutions of single channels, and across them."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    )


class Residual(nn.Module):
    """A residual network; its blocks may be checkpointed, or share one layer."""

    def __init__(self, norm: Any = nn.BatchNorm2d, blocks: int = 2, **how: Any) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = norm(16)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(16, 16, 3, padding=1, bias=False), norm(16), nn.ReLU()),
                *(nn.Conv2d(16, 16, 3, padding=1, bias=False), norm(16)),
            )
            for _ in range(blocks)
        )
        if how.get("zero"):
            for block in self.blocks:
                nn.init.zeros_(block[-1].weight)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classes' scores."""
        x = self.norm(self.stem(x)).relu()
        for block in self.blocks:
            if self.how.get("checkpoint") and self.training:
                branch = checkpoint(block, x, use_reentrant=False)
            else:
                branch = block(x)
            x = (x + branch).relu()
        return self.head(x.mean((2, 3)))


class Tokens(nn.Module):
    """Sequences of tokens of different lengths, with and without telling the layer."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.embedding = nn.Embedding(50, 16)
        self.position = nn.Parameter(0.1 * torch.randn(16, 16))
        self.mix = nn.Linear(16, 32, bias=False)
        self.norm = BatchNorm(32, channel_dim=-1)
        self.head = nn.Linear(32, 10)

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        """Classes' scores."""
        x = self.norm(self.mix(self.embedding(ids) + self.position), mask if self.masked else None)
        weights = mask[..., None].float()
        return self.head((x.relu() * weights).sum(1) / weights.sum(1))


class Rows(nn.Module):
    """The same with all tokens as rows of a dense batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.mix = nn.Linear(16, 32, bias=False)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        """Classes' scores."""
        x = self.norm(self.mix(self.embedding(ids)).flatten(0, 1)).relu()
        weights = mask[..., None].float()
        return self.head((x.unflatten(0, ids.shape) * weights).sum(1) / weights.sum(1))


class TwoDomains(nn.Module):
    """One layer for images and their negatives, or a layer of each."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.one, self.two = (nn.Linear(64, 32, bias=False) for _ in range(2))
        self.norm = nn.BatchNorm1d(32)
        self.other = self.norm if shared else nn.BatchNorm1d(32)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classes' scores."""
        a, b = self.norm(self.one(x)), self.other(self.two(3 - 4 * x))
        return self.head(torch.cat([a, b], 1).relu())


class Generator(nn.Module):
    """Images from noise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(8, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()),
            *(nn.Unflatten(1, (16, 2, 2)), nn.ConvTranspose2d(16, 8, 2, 2, bias=False)),
            *(nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 1, 2, 2), nn.Sigmoid()),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Images."""
        return self.net(z)


def hugging_face(name: str) -> nn.Module:
    """An architecture of transformers', small and with random weights."""
    import transformers

    small: dict[str, dict[str, Any]] = {
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "RegNet": {
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "groups_width": 8,
        },
        "MobileNetV1": {"depth_multiplier": 0.25, "min_depth": 4, "image_size": 32},
    }
    options = small[name] | {"num_channels": 1, "num_labels": 10}
    if name == "ResNet":
        options |= {"layer_type": "basic", "downsample_in_first_stage": False}
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def wide(model: nn.Module, batch: Any) -> Any:
    """Images four times as wide and high, for networks that halve them often."""
    return model(functional.interpolate(batch[0], scale_factor=4)).logits
