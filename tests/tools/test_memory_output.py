"""save_memory, keep="output", of inputs that are views: what it says is what it saves."""

import copy

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm, save_memory
from batchnorm.bench.allocations import allocations
from saving import step

pytestmark = pytest.mark.usefixtures("kernels")


class Views(nn.Module):
    """A layer whose input is a view of what others save other views of, or do not."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.start, self.wide = nn.Linear(64, 64), nn.Linear(64, 128)
        self.bn, self.end = BatchNorm(64), nn.Linear(64, 64)

    def forward(self, x):
        if self.kind == "half":
            a, b = self.wide(x).chunk(2, 1)
            return self.end(self.bn(a)) + b
        h = self.start(x)
        other = h.view(2, -1, 64)
        if self.kind == "before":
            other = other.square().view(-1, 64)
            return self.end(self.bn(h.view(-1, 64))) + other
        y = self.end(self.bn(h.view(-1, 64)))
        return y + other.square().view(-1, 64) if self.kind == "after" else y


@pytest.mark.parametrize("kind", ["alone", "half", "before", "after"])
def test_what_it_says_is_what_it_saves(kind):
    model, x, saved = Views(kind), torch.randn(512, 64), None

    def forward():
        nonlocal saved
        with save_memory(model, "output") as saved:
            return model(x)

    usual, found = allocations(lambda: model(x)), allocations(forward)
    assert saved.bytes == (x.nbytes if kind == "alone" else 0)
    # Besides, γ and β: a few numbers a channel.
    assert abs(usual.held - found.held - saved.bytes) <= 5 * 64 * 8
    reason = {"alone": None, "half": "its input is a part of a larger tensor"}
    assert saved.reasons.get("bn") == reason.get(kind, "its input is kept anyway")
    for a, b in zip(step(model, x)[0], step(model, x, "output")[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_view_of_another_version_is_not_the_input():
    bn, linear = BatchNorm(4), nn.Linear(4, 3)
    x = torch.randn(8, 4)
    results = []
    for keep in (None, "output"):
        leaf, layer = x.clone().requires_grad_(), copy.deepcopy(bn)
        with torch.no_grad():
            layer.bias.fill_(0.5)
        h = leaf * 1
        if keep is None:
            results.append(torch.autograd.grad(linear(layer(h)).square().sum(), leaf))
            continue
        with save_memory(nn.Sequential(layer), keep):
            z = linear(layer(h)).square().sum()
            with torch.no_grad():
                h.zero_()
            other = h.view(4, 8) * h.view(4, 8)
        assert other is not None  # which keeps the view
        # Without, it is an error; made from the output, it is as it was.
        results.append(torch.autograd.grad(z, leaf))
    torch.testing.assert_close(*results)
