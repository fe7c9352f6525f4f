"""Sequences of many lengths in one batch: padding counts nowhere."""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from batchnorm import BatchNorm

torch.manual_seed(0)
sequences = [3 + torch.randn(length, 8) for length in (20, 13, 7, 2)]
x = pad_sequence(sequences, batch_first=True)  # 4 × 20 × 8, zeros behind the ends
lengths = torch.tensor([len(sequence) for sequence in sequences])
mask = torch.arange(x.shape[1]) < lengths[:, None]

norm = BatchNorm(8, channel_dim=-1, momentum=1.0)
norm(x, mask=mask)
theirs = nn.BatchNorm1d(8, momentum=1.0)
theirs(x.transpose(1, 2))
true = torch.cat(sequences).mean(0)
print(f"mean of the data {true[0]:.2f}, ours {norm.running_mean[0]:.2f}, "
      f"with padding {theirs.running_mean[0]:.2f}")  # fmt: skip
