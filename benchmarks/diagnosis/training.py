"""A little training, for networks of the corpus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from data import BATCH, batches
from torch import nn
from torch.nn import functional

STEPS = 150


def train(
    model: nn.Module,
    data: list[Any],
    step: Callable[[nn.Module, Any], Any] | None = None,
    lr: float = 0.05,
    steps: int = STEPS,
    optimizer: Any = None,
    ends_low: bool = True,
) -> nn.Module:
    """By stochastic gradient descent with momentum, going round the batches."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    model.train()
    for k in range(steps):
        batch = data[k % len(data)]
        labels = batch["labels"] if isinstance(batch, dict) else batch[1]
        output = (step or default_step)(model, batch)
        optimizer.zero_grad()
        functional.cross_entropy(output, labels).backward()
        optimizer.step()
        if ends_low and steps - k == steps // 3:  # a rate that ends low, as is usual
            for group in optimizer.param_groups:
                group["lr"] *= 0.1
    return model


def default_step(model: nn.Module, batch: Any) -> Any:
    """The batch's input, or its fields."""
    return model(**batch) if isinstance(batch, dict) else model(batch[0])


def train_generator(model: nn.Module, data: list[Any]) -> nn.Module:
    """Toward the batches' mean images."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for k in range(STEPS):
        z, x = data[k % len(data)]
        optimizer.zero_grad()
        (model(z) - x).square().mean().backward()
        optimizer.step()
    return model


def trained(make: Callable[[], nn.Module], shape: tuple[int, ...], **options: Any) -> Any:
    """A healthy model and the batches."""
    data = batches(shape, 16, options.pop("size", BATCH))
    return train(make(), data, **options), data, {}
