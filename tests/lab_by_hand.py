"""Networks and training of the lab's experiments in torch's own parts, to check runs against."""

import itertools

import torch
from torch import nn
from torch.nn.functional import batch_norm

from batchnorm.lab.training import ORDER_OFFSET


class Groups(nn.Module):
    """Normalizes groups of samples one after the other; running statistics of the whole batch."""

    def __init__(self, channels, size):
        super().__init__()
        self.size = size
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )
        self.whole = nn.BatchNorm2d(channels)

    def forward(self, x):
        images = x if x.dim() == 4 else x[:, :, None, None]
        if self.training:
            self.whole(images.detach())
            y = torch.cat(
                [
                    batch_norm(part, None, None, self.weight, self.bias, True)
                    for part in images.split(self.size)
                ]
            )
        else:
            mean, var = self.whole.running_mean, self.whole.running_var
            y = batch_norm(images, mean, var, self.weight, self.bias)
        return y.reshape(x.shape)


def mlp(sizes, norm, seed):
    """He's draws; `norm(channels)` before each ReLU, or None; the head has half the variance."""
    draws = torch.Generator().manual_seed(seed)
    layers = []
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        head = index == len(sizes) - 2
        linear = nn.Linear(fan_in, fan_out)
        std = ((1 if head else 2) / fan_in) ** 0.5
        with torch.no_grad():
            linear.weight.copy_(torch.empty_like(linear.weight).normal_(generator=draws) * std)
            linear.bias.zero_()
        made = None if head else norm(fan_out)
        if made is not None:
            linear.bias = None
        layers += [linear, *([] if made is None else [made]), *([] if head else [nn.ReLU()])]
    return nn.Sequential(*layers)


def train(net, x, y, *, rate, steps, batch, seed, momentum=0.9, decay=True):
    """SGD by torch's optimizer and, with `decay`, its cosine schedule; return the losses."""
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(ORDER_OFFSET + seed)
    net.train()
    losses, rows = [], []
    for _ in range(steps):
        if len(rows) < batch:
            rows = torch.randperm(len(x), generator=order).tolist()
        now, rows = rows[:batch], rows[batch:]
        optimizer.zero_grad()
        loss = nn.CrossEntropyLoss()(net(x[now]), y[now])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if decay:
            schedule.step()
    return losses


def error(net, data, *, images=False):
    """The share of test rows that come out wrong in evaluation."""
    x = torch.from_numpy(data.x_test)
    net.eval()
    with torch.no_grad():
        guess = net(x[:, None] if images else x.flatten(1)).argmax(1)
    return (guess != torch.from_numpy(data.y_test)).double().mean().item()
