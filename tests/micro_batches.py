"""Models and micro-batches that the tests of forward_together share."""

import torch
from torch import nn

from batchnorm import BatchNorm, Renorm, forward_together

FULL = Renorm(r_max=1.5, d_max=0.5, r_steps=(0, 0), d_steps=(0, 0))
SPLIT = [7, 1, 4]


class Block(nn.Module):
    """Convolutions, with a residual, a mask and one layer that is called twice."""

    def __init__(self, dtype=torch.float64, again=True, **options):
        super().__init__()
        self.again = again
        self.lift = nn.Conv1d(2, 3, 3, padding=1, dtype=dtype)
        self.first = BatchNorm(3, activation="relu", dtype=dtype, **options)
        self.twice = BatchNorm(3, activation=torch.tanh, dtype=dtype, **options)
        self.mix = nn.Conv1d(3, 3, 1, dtype=dtype)
        with torch.no_grad():
            for layer in (self.first, self.twice):
                for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
                    tensor.uniform_(0.5, 1.5)

    def forward(self, x, mask=None):
        h = self.lift(x)
        h = self.first(h, mask, residual=h)
        h = self.twice(self.mix(h), mask)
        return self.twice(self.mix(h), mask) if self.again else h


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = BatchNorm(3, dtype=torch.float64)

    def forward(self, x, scale=1.0):
        return self.bn(x) * scale


def data(dtype=torch.float64):
    return torch.randn(sum(SPLIT), 2, 5, dtype=dtype) * 2 + 1


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def switches(model):
    layers = [m for m in model.modules() if isinstance(m, BatchNorm)]
    return [(m._together, m._collect, m._bank, m.track_running_stats) for m in layers]


def close(got, expected, tolerance):
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance)


def together(model, x, mask, **options):
    parts = zip(x.split(SPLIT), (None,) * 3 if mask is None else mask.split(SPLIT), strict=True)
    step = lambda net, part: net(*part)  # noqa: E731
    return torch.cat(forward_together(model, list(parts), step=step, **options))
