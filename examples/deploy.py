"""For inference: batch norm folded into the convolutions, verified, and exported."""

import torch
from torch import nn

from batchnorm import BatchNorm, fold

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, bias=False), BatchNorm(16, activation="relu"),
    nn.Conv2d(16, 16, 3, bias=False), BatchNorm(16), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
)  # fmt: skip
for _ in range(20):
    model(torch.randn(16, 3, 16, 16))
example = torch.randn(2, 3, 16, 16)

folded = fold(model.eval(), example)
print(folded.fold_report)
program = torch.export.export(folded, (example,))
exported = program.module()(example)
print(f"exported and original differ by {(exported - model(example)).abs().max():.0e}")
