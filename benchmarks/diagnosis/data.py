"""scikit-learn's handwritten digits as rows, as images and as sequences of lines; and tokens."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

BATCH = 64
DENSE, IMAGE, LINES = (64,), (1, 8, 8), (8, 8)


def digits() -> tuple[Tensor, Tensor]:
    """(1797, 64) with values in [0, 1], and classes."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


def batches(shape: tuple[int, ...], number: int, size: int = BATCH, seed: int = 1) -> list[Any]:
    """(input, class) pairs, drawn at random."""
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(len(x), (size,), generator=generator) for _ in range(number)]
    return [(x[row].reshape(size, *shape), y[row]) for row in rows]


def padded(number: int, size: int = BATCH, seed: int = 1) -> list[Any]:
    """Sequences of 3 to 16 tokens out of 50, padded with token 0: dicts with `ids` and `mask`."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(number):
        lengths = torch.randint(3, 17, (size, 1), generator=generator)
        ids = torch.randint(1, 50, (size, 16), generator=generator)
        mask = torch.arange(16) < lengths
        ids = torch.where(mask, ids, 0)
        found.append({"ids": ids, "mask": mask, "labels": ids.sum(1) % 10})
    return found
