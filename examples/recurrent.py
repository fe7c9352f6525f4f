"""An LSTM with batch normalization: statistics of each step, sequences of many lengths."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from batchnorm import BatchNormLSTM

torch.manual_seed(0)


class Counter(nn.Module):
    """Whether more of a sequence's numbers are positive than negative."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = BatchNormLSTM(1, 16, max_length=12, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """From x, (N, L, 1), and where its sequences go on, (N, L)."""
        _, (h, _) = self.lstm(x, mask=mask)
        return self.head(h[-1])


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences, mask, classes."""
    x = torch.randn(size, 12, 1)
    mask = torch.arange(12) < torch.randint(3, 13, (size, 1))
    return x, mask, ((x.sign()[..., 0] * mask).sum(1) > 0).long()


model = Counter()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(150):
    x, mask, y = batch(64)
    optimizer.zero_grad()
    cross_entropy(model(x, mask), y).backward()
    optimizer.step()
x, mask, y = batch(2000)
with torch.no_grad():
    right = model.eval()(x, mask).argmax(1) == y
print(f"right in evaluation: {right.float().mean():.0%}")
