"""Micro-batches that count as one batch: outputs and gradients of the large one, exactly."""

import copy

import torch
from torch import nn

from batchnorm import BatchNorm, forward_together

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 50), BatchNorm(50), nn.ReLU(), nn.Linear(50, 1)).double()
large = copy.deepcopy(model)
x, y = torch.randn(32, 10).double(), torch.randn(32, 1).double()

outputs = forward_together(model, list(x.split(8)))
(torch.cat(outputs) - y).square().mean().backward()

(large(x) - y).square().mean().backward()
apart = max(
    float((a.grad - b.grad).abs().max())
    for a, b in zip(model.parameters(), large.parameters(), strict=True)
)
print(f"gradients of 4 batches of 8 and of one of 32 differ by {apart:.0e}")
