"""Fine-tuning: the statistics stay as pretrained, and γ and β have no weight decay."""

import torch
from torch import nn

from batchnorm import BatchNorm, freeze, param_groups

torch.manual_seed(0)
body = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), BatchNorm(8, activation="relu"))
for _ in range(100):  # what pretraining would have done
    body(torch.randn(16, 3, 12, 12))

model = nn.Sequential(body, nn.Flatten(), nn.Linear(800, 2))
freeze(model)  # γ and β, too: affine=False leaves them to be trained
optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05), lr=1e-3)

before = body[1].running_mean.clone()
for _ in range(10):
    x = 5 + torch.randn(2, 3, 12, 12)  # two images, of another kind
    optimizer.zero_grad()
    model.train()(x).square().mean().backward()
    optimizer.step()
print("statistics unchanged:", torch.equal(before, body[1].running_mean))
