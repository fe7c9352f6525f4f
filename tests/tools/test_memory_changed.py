"""What save_memory must not take for a layer's output: tensors changed meanwhile, or unusual."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional

from batchnorm import (
    BatchNorm,
    save_memory,
)
from saving import BOTH, same, step

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("hostile", [float("nan"), float("inf"), 1e15])
@BOTH
def test_hostile_values(keep, hostile):
    model, x = BatchNorm(8, activation="leaky_relu"), torch.randn(64, 8)
    model = nn.Sequential(model, nn.Linear(8, 3))
    x[3, 2] = hostile
    with pytest.warns() if hostile != 1e15 else contextlib.nullcontext():
        expected, _ = step(model, x)
    with pytest.warns() if hostile != 1e15 else contextlib.nullcontext():
        found, saved = step(model, x, keep)
    if keep == "input":
        assert same(found, expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert saved.bytes > 0


@pytest.mark.parametrize("change", ["before", "after"])
@BOTH
def test_an_output_that_is_changed_in_place(keep, change):
    bn, linear = BatchNorm(4), nn.Linear(4, 3)
    x = torch.randn(8, 4, requires_grad=True)
    with save_memory(nn.Sequential(bn), keep) as saved:
        y = bn(x)
        if change == "before":
            y.mul_(2)
        z = linear(y)
        with torch.no_grad():
            if change == "after":
                y.mul_(3)
    if keep == "output" and change == "after":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()
        return
    assert saved.bytes == (0 if change == "before" else x.nbytes)
    dy = torch.randn(8, 3)
    found = torch.autograd.grad(z, (x, linear.weight), dy)
    plain = linear(bn(x) * 2 if change == "before" else bn(x))
    expected = torch.autograd.grad(plain, (x, linear.weight), dy)
    assert same(found, expected)


@pytest.mark.parametrize("activate", [torch.relu, torch.relu_, torch.nn.functional.silu])
def test_an_activation_of_what_was_changed_behind_autograd(activate):
    bn, linear = BatchNorm(4), nn.Linear(4, 3)
    x, dy = torch.randn(8, 4, requires_grad=True), torch.randn(8, 3)
    results = []
    for around in (contextlib.nullcontext(), save_memory(nn.Sequential(bn))):
        with around as saved:
            y = bn(x)
            with torch.no_grad():
                y.clamp_(-1, 1)
            y = activate(y)
            z = linear(y)
        results.append(torch.autograd.grad(z, (x, linear.weight), dy))
    assert same(*results)
    assert saved.bytes == 0


@pytest.mark.parametrize(
    "activate", [torch.relu, torch.nn.functional.silu, torch.clone], ids=["relu", "silu", "clone"]
)
def test_an_activation_changed_behind_autograd(activate):
    # Of a ReLU's result that is an error with or without, where the ReLU's gradient is asked for.
    bn, linear, dy = BatchNorm(4), nn.Linear(4, 3), torch.randn(8, 3)
    x = torch.randn(8, 4, requires_grad=True)
    for gone in (True, False):
        results = []
        for around in (contextlib.nullcontext(), save_memory(nn.Sequential(bn))):
            with around:
                y = before = bn(x)
                y = activate(y)
                if gone:
                    del before
                with torch.no_grad():
                    y.mul_(3)
                z = linear(y)
            results.append(torch.autograd.grad(z, linear.weight, dy))
        assert same(*results)


#: Each that `save_memory` makes again.
ACTIVATIONS = {
    "ReLU": functional.relu,
    "leaky ReLU": functional.leaky_relu,
    "leaky ReLU in place": functional.leaky_relu_,
    "SiLU": functional.silu,
    "GELU": functional.gelu,
    "ReLU6": functional.relu6,
    "Hardswish": functional.hardswish,
    "copy": torch.clone,
}


def both_ways(forward, bn, leaf):
    """The gradient of a leaf, without save_memory and within; and what was saved."""
    results = []
    for around in (contextlib.nullcontext(), save_memory(nn.Sequential(bn))):
        with around as saved:
            z = forward()
        results.append(torch.autograd.grad(z.square().sum(), leaf))
    return *results, saved


@pytest.mark.parametrize("activate", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("by", ["no_grad", "detach"])
@pytest.mark.parametrize("gone", [True, False])
def test_an_activation_whose_result_is_changed_behind_autograd(activate, by, gone):
    bn, linear = BatchNorm(4), nn.Linear(4, 3)
    x = torch.randn(8, 4, requires_grad=True)

    def forward():
        y = bn(x)
        a = activate(y)
        if gone:
            del y
        if by == "detach":
            a.detach().clamp_(max=0.5)
        else:
            with torch.no_grad():
                a.clamp_(max=0.5)
        return linear(a)

    usual, found, _ = both_ways(forward, bn, linear.weight)
    assert same(found, usual)


@pytest.mark.parametrize("activate", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("gone", [True, False])
def test_an_activation_of_what_was_saved_and_then_changed(activate, gone):
    bn, linear, other = BatchNorm(4), nn.Linear(4, 3), nn.Linear(4, 3)
    x = torch.randn(8, 4, requires_grad=True)

    def forward():
        y = bn(x)
        other(y.detach())
        with torch.no_grad():
            y.mul_(2)
        a = activate(y)
        if gone:
            del y
        return linear(a)

    usual, found, _ = both_ways(forward, bn, linear.weight)
    assert same(found, usual)


@pytest.mark.parametrize("last", [torch.clone, functional.gelu])
def test_an_activation_of_what_another_saved_before_the_change(last):
    bn, linear, first = BatchNorm(4), nn.Linear(4, 3), []
    x = torch.randn(8, 4, requires_grad=True)

    def forward():
        y = bn(x)
        first.append(functional.silu(y))
        with torch.no_grad():
            y.mul_(3)
        z = last(y)
        del y
        return linear(z)

    usual, found, _ = both_ways(forward, bn, linear.weight)
    assert same(found, usual)


def test_an_activation_that_other_hooks_have_watched():
    bn, linear, other = BatchNorm(4), nn.Linear(4, 3), nn.Linear(4, 3)
    x = torch.randn(8, 4, requires_grad=True)

    def forward():
        y = bn(x)
        other(y)
        with torch.no_grad():
            y.mul_(3)
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda copy: copy):
            a = functional.silu(y)
        del y
        return linear(a)

    usual, found, _ = both_ways(forward, bn, linear.weight)
    assert same(found, usual)


def test_conjugates_and_negatives_of_one_storage():
    z = torch.randn(8, 4, dtype=torch.complex64)
    complex_, real = torch.randn_like(z).requires_grad_(), torch.randn(8, 4, requires_grad=True)

    def forward():
        whole = z * complex_ + z.conj() * complex_.square()
        return whole.abs() + z.imag * real + z.conj().imag * real.square()

    usual, found, _ = both_ways(forward, BatchNorm(4), (complex_, real))
    assert same(map(torch.view_as_real, found[:1]), map(torch.view_as_real, usual[:1]))
    assert same(found[1:], usual[1:])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_of_other_kinds():
    model, x = nn.Sequential(nn.Linear(4, 6), BatchNorm(6), nn.Linear(6, 6)), torch.randn(8, 4)
    weight = torch.randn(6, requires_grad=True)
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)])

    def forward():
        y = torch.func.vmap(lambda row: (row * weight).sin())(model(x))
        return y.sum() + torch.sparse.mm(torch.eye(8).to_sparse(), y).square().sum()

    leaves = (*model.parameters(), weight)
    expected = torch.autograd.grad(forward(), leaves)
    with save_memory(model) as saved:
        loss = forward()
        padded = (nested.requires_grad_() * 2).sin().to_padded_tensor(0.0)
    assert same(torch.autograd.grad(loss, leaves), expected)
    padded.sum().backward()
    found, dy = [], torch.randn(5, 8, 6)
    for around in (contextlib.nullcontext(), save_memory(model)):
        with around:
            y = model(x).sin()
            found.append(torch.autograd.grad(y, leaves[:-1], dy, is_grads_batched=True,
                                             create_graph=True))  # fmt: skip
    for ours, usual in zip(*found, strict=True):
        torch.testing.assert_close(ours, usual)
    assert saved.layers == {"1": 8 * 6 * 4}


def test_an_activation_of_a_part_in_place():
    bn, linear = BatchNorm(4), nn.Linear(4, 3)
    x, dy = torch.randn(8, 4, requires_grad=True), torch.randn(8, 3)
    results = []
    for around in (contextlib.nullcontext(), save_memory(nn.Sequential(bn))):
        with around as saved:
            y = bn(x)
            y[:, :2].relu_()
            z = linear(y)
        results.append(torch.autograd.grad(z, (x, linear.weight), dy))
    assert same(*results)
    assert saved.bytes == 0


def test_a_copy_in_another_layout():
    bn = BatchNorm(4)
    x, dy = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randn(2, 4, 3, 5)
    results = []
    for around in (contextlib.nullcontext(), save_memory(nn.Sequential(bn))):
        with around as saved:
            z = bn(x).clone(memory_format=torch.channels_last).sigmoid_().exp()
        results.append(torch.autograd.grad(z, x, dy))
    assert same(*results)
    assert saved.bytes == 0


def test_what_is_saved_and_then_changed_is_told_as_without():
    # torch asks this only of what no hooks have packed.
    model, x = nn.Sequential(BatchNorm(4)), torch.randn(8, 4, requires_grad=True)
    with save_memory(model):
        h = x * 1
        z = h.exp()
        y = model(z)
    with torch.no_grad():
        z.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@BOTH
def test_an_optimizer_may_step_in_between(keep):
    # A copy of β is kept; γ, which the layer itself saves, may not change, as without.
    bn, linear = BatchNorm(4, activation="leaky_relu"), nn.Linear(4, 3)
    x, dy = torch.randn(8, 4, requires_grad=True), torch.randn(8, 3)
    expected = torch.autograd.grad(linear(bn(x)), (x, linear.weight), dy)
    with save_memory(nn.Sequential(bn), keep):
        z = linear(bn(x))
    bn.bias.data.add_(100.0)  # autograd does not see it
    found = torch.autograd.grad(z, (x, linear.weight), dy)
    if keep == "input":
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)
    else:
        torch.testing.assert_close(found[1], expected[1])
