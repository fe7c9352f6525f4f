"""Good in training, bad in evaluation: which layer, why, and how to mend it."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from batchnorm import BatchNorm, diagnose, recalibrate

torch.manual_seed(0)
x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
x, y = x.float() / 16, y.long()
order = torch.randperm(len(x))
(x, x_test), (y, y_test) = (part[order].split((1297, 500)) for part in (x, y))

# A momentum so small that the running statistics never get away from where they start.
model = nn.Sequential(
    nn.Linear(64, 100, bias=False), BatchNorm(100, momentum=1e-3), nn.ReLU(), nn.Linear(100, 10)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
for _ in range(200):
    rows = torch.randint(len(x), (64,))
    optimizer.zero_grad()
    cross_entropy(model(x[rows]), y[rows]).backward()
    optimizer.step()


def accuracy() -> str:
    """Of the test rows, in evaluation."""
    with torch.no_grad():
        return f"{(model.eval()(x_test).argmax(1) == y_test).float().mean():.0%}"


batches = list(x[torch.randperm(len(x))].split(64))
before = accuracy()
for finding in diagnose(model, batches).findings:
    print(finding)
recalibrate(model, batches)
print(f"test accuracy in eval(): {before} before, {accuracy()} after recalibrate()")
