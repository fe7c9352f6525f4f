"""Networks and steps for the tests of save_memory."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from batchnorm import (
    BatchNorm,
    save_memory,
)

BOTH = pytest.mark.parametrize("keep", ["input", "output"])


def wild(model):
    """γ and β of every kind: zero, tiny, negative; β far above γ."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, BatchNorm) and layer.weight is not None:
                layer.weight.copy_(torch.randn(layer.num_features))
                layer.weight[:3] = torch.tensor([0.0, 1e-30, -1e-6])
                if layer.bias is not None:
                    layer.bias.copy_(torch.randn(layer.num_features))
                    layer.bias[3] = 1e3
    return model


def convolutions(*after, channels=8, **options):
    layers = []
    for _ in range(3):
        layers.append(nn.Conv2d(channels, channels, 3, padding=1))
        layers += [BatchNorm(channels, **options), *copy.deepcopy(after)]
    return wild(nn.Sequential(*layers, nn.Conv2d(channels, 2, 1)))


def step(model, x, keep=None, dy=None, **forward):
    """Output, gradients and buffers of a training step by a copy; and what was saved."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    with save_memory(model, keep) if keep else contextlib.nullcontext() as saved:
        y = model(x, **forward)
    torch.manual_seed(7)
    y.backward(torch.randn(y.shape, dtype=y.dtype))
    gradients = [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    return [y.detach(), *gradients, *(b.clone() for b in model.buffers())], saved


def same(a, b):
    # Of any bits, NaN too.
    return all(
        p.dtype == q.dtype
        and torch.equal(
            p.contiguous().view(-1).view(torch.uint8), q.contiguous().view(-1).view(torch.uint8)
        )
        for p, q in zip(a, b, strict=True)
    )


#: Bytes of a layer's output below.
SIZE = 6 * 8 * 9 * 7 * 4
