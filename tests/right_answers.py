"""Right answers that are written otherwise than the solutions: each must pass."""

RIGHT = [
    (1, """
import torch
def forward(x, gamma, beta, eps=1e-5):
    var, mean = torch.var_mean(x, dim=0, unbiased=False, keepdim=True)
    return torch.addcmul(beta, gamma * torch.rsqrt(var + eps), x - mean)
"""),
    (1, """
def forward(x, gamma, beta, eps=1e-5):
    wide = x.double()
    wide = (wide - wide.mean(0)) / (wide.var(0, correction=0) + eps).sqrt()
    return (gamma * wide + beta).to(x.dtype)
"""),
    (1, """
def forward(x, gamma, beta, eps=1e-5):
    scale = gamma / ((x * x).mean(0) - x.mean(0) ** 2 + eps) ** 0.5
    return x * scale + (beta - x.mean(0) * scale)
"""),
    (2, """
def update(running_mean, running_var, x, momentum=0.1):
    x = x.detach().transpose(0, 1).flatten(1)
    running_mean.lerp_(x.mean(1), momentum)
    running_var.lerp_(x.var(1), momentum)
    return running_mean, running_var
"""),
    (2, """
import torch
def update(running_mean, running_var, x, momentum=0.1):
    with torch.no_grad():
        axes = tuple(set(range(x.dim())) - {1})
        m = x.numel() / x.size(1)
        mean = x.mean(axes, keepdim=True)
        var = ((x - mean) ** 2).sum(axes) / (m - 1)
        running_mean[:] = (1 - momentum) * running_mean + momentum * mean.squeeze()
        running_var.copy_(running_var - momentum * (running_var - var))
"""),
    (3, """
import torch
from torch import nn
class BatchNorm(nn.Module):
    def __init__(self, features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.eps, self.momentum = eps, momentum
    def forward(self, x):
        if x.size(1) != len(self.weight):
            raise ValueError("channels")
        x = x.transpose(1, -1)
        flat = x.reshape(-1, x.size(-1))
        mean, var = self.running_mean, self.running_var
        if self.training:
            if len(flat) == 1:
                raise ValueError("one value")
            mean, var = flat.mean(0), flat.var(0, unbiased=False)
            old, new = 1 - self.momentum, self.momentum
            self.running_mean = old * self.running_mean + new * mean.detach()
            self.running_var = old * self.running_var + new * flat.detach().var(0)
        y = (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias
        return y.transpose(1, -1)
"""),
    (4, """
import torch
def fold(weight, bias, mean, var, gamma, beta, eps=1e-5):
    a = torch.diag(gamma * (var + eps).rsqrt())
    new = (a @ weight.flatten(1)).view_as(weight)
    return [new, a @ ((0 if bias is None else bias) - mean) + beta]
"""),
    (5, """
def variance(x):
    return ((x - x.mean(0)) ** 2).mean(0)
"""),
    (5, """
def variance(x):
    d = x - x[0]
    return (d * d).mean(0) - d.mean(0) ** 2
"""),
    (5, """
import torch
def variance(x):
    mean, m2 = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for n, row in enumerate(x, start=1):
        d = row - mean
        mean = mean + d / n
        m2 = m2 + d * (row - mean)
    return m2 / len(x)
"""),
    (6, """
import torch
from batchnorm import Moments
def merge(a, b):
    both = [Moments(torch.tensor(n).double(), mean, m2) for n, mean, m2 in (a, b)]
    both = Moments.merge_all(both)
    return both.count, both.mean, both.m2
"""),
    (6, """
def merge(a, b):
    if a[0] == 0:
        return b
    if b[0] == 0:
        return a
    n, d = a[0] + b[0], a[1] - b[1]
    return n, (a[0] * a[1] + b[0] * b[1]) / n, a[2] + b[2] + d * d * (a[0] * b[0]) / n
"""),
    (7, """
import torch
def pooled(batches):
    every = torch.cat(list(batches))
    return every.mean(0), every.var(0)
"""),
    (8, """
import torch
def ghost(x, size, eps=1e-5):
    y = torch.zeros_like(x)
    for first in range(0, len(x), size):
        group = x[first : first + size]
        y[first : first + size] = torch.nn.functional.batch_norm(
            group, None, None, training=True, eps=eps
        )
    return y
"""),
    (9, """
def statistics(x, mask):
    kept = x.movedim(1, -1)[mask]
    return kept.mean(0), kept.var(0, unbiased=False)
"""),
    (9, """
def statistics(x, mask):
    out, n = ~mask[:, None], mask.sum()
    x = x.masked_fill(out, 0)
    mean = x.sum(dim=(0, 2)) / n
    return mean, ((x - mean[:, None]).masked_fill(out, 0) ** 2).sum(dim=(0, 2)) / n
"""),
    (10, """
def backward(dy, x, gamma, eps=1e-5):
    m = len(x)
    s = (((x - x.mean(0)) ** 2).mean(0) + eps) ** 0.5
    x_hat = (x - x.mean(0)) / s
    dbeta, dgamma = dy.sum(0), (dy * x_hat).sum(0)
    return gamma / (m * s) * (m * dy - dbeta - x_hat * dgamma), dgamma, dbeta
"""),
]  # fmt: skip
