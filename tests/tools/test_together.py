"""forward_together is the large batch: outputs, gradients of any order, statistics."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import oracle
from batchnorm import BatchNorm, forward_together, freeze
from micro_batches import FULL, SPLIT, Block, Named, buffers, close, data, together, unchanged

pytestmark = pytest.mark.usefixtures("kernels", "no_thread_stays")


def run(model, batch, how, second_order=True):
    """Outputs, gradients of everything and gradients of a gradient, buffers."""
    x, mask = batch
    x = x.clone().requires_grad_()
    y = how(model, x, mask)
    generator = torch.Generator().manual_seed(5)
    cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    first = torch.autograd.grad(y, leaves, cotangent, create_graph=second_order)
    results = [y, *first]
    if second_order:
        vectors = [
            torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g.dtype)
            for g in first
        ]
        total = sum((g * v).sum() for g, v in zip(first, vectors, strict=True))
        results += torch.autograd.grad(total, leaves)
    return [r.detach() for r in (*results, *(b.double() for b in model.buffers()))]


def whole(model, x, mask):
    return model(x, mask)


MASKS = {
    "all": None,
    "bool": torch.rand(sum(SPLIT), 5, generator=torch.Generator().manual_seed(0)) > 0.3,
    "weights": torch.rand(sum(SPLIT), 5, generator=torch.Generator().manual_seed(0)) * 3,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"renorm": FULL, "again": False}, {"bias": False}],
    ids=["plain", "average", "renorm", "no bias"],
)
def test_is_the_large_batch(options, mask):
    """To second order, in float64: 1e-10 is a thousand times what the sums round by."""
    model = Block(**options)
    twin, batch = copy.deepcopy(model), (data(), mask)
    close(run(model, batch, together), run(twin, batch, whole), 1e-10)
    assert model.first.num_batches_tracked == 1
    assert model.twice.num_batches_tracked == (2 if model.again else 1)


def test_float32():
    """As near to float64 as the large batch is, within a few roundings of values up to 20."""
    model, batch = Block(torch.float32), (data(torch.float32), MASKS["bool"])
    exact = run(copy.deepcopy(model).double(), (batch[0].double(), batch[1]), whole, False)
    for got, expected in zip(run(model, batch, together, False), exact, strict=True):
        size = max(1, float(expected.abs().max()))
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6 * size)


def test_values_against_the_oracle():
    layer, x = BatchNorm(3, activation="relu"), torch.randn(12, 3, 4) + 1e4
    residual, dy = torch.randn(2, 12, 3, 4)
    leaf = x.clone().requires_grad_()
    parts = list(zip(leaf.split(SPLIT), residual.split(SPLIT), strict=True))
    y = torch.cat(forward_together(layer, parts, step=lambda m, p: m(p[0], residual=p[1])))
    f = oracle.forward(x, residual=residual, activation="relu")
    dx, *_ = oracle.backward(dy, x, residual=residual, activation="relu")
    # float64 statistics, results of size 5 and rounded once: 5·2⁻²⁴, and the offset's 1e4·2⁻⁵³.
    assert abs(oracle.wide(y) - f.y).max() < 5e-7
    (got,) = torch.autograd.grad(y, leaf, dy)
    assert abs(oracle.wide(got) - dx).max() < 5e-7
    mean, var = oracle.running(torch.zeros(3), torch.ones(3), f, 0.1)
    assert abs(oracle.wide(layer.running_mean) - mean).max() < 1e3 * 2**-24
    assert abs(oracle.wide(layer.running_var) - var).max() < 2**-24


def test_offload_gives_the_same_bits_and_saves_nothing_twice():
    model, batch = Block(), (data(), None)
    twin = copy.deepcopy(model)
    got = run(model, batch, lambda *args: together(*args, offload=True))
    assert all(torch.equal(g, e) for g, e in zip(got, run(twin, batch, together), strict=True))


def test_gradient_needs_no_more_than_what_asks():
    """γ, β and a residual that want none, x that wants none."""
    model, x = Block(), data()
    for name in ("first.weight", "twice.bias", "lift.weight", "lift.bias"):
        model.get_parameter(name).requires_grad_(False)
    twin = copy.deepcopy(model)
    results = []
    for net, how in ((model, together), (twin, whole)):
        leaves = [p for p in net.parameters() if p.requires_grad]
        y = how(net, x, None)
        cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results.append(torch.autograd.grad(y, leaves, cotangent))
    close(*results, 1e-10)


BATCHES = {
    "tensors": lambda part: part,
    "tuples": lambda part: (part, "a label"),
    "lists": lambda part: [part, "a label"],
    "dicts": lambda part: {"x": part, "scale": 1.0},
}


@pytest.mark.parametrize("wrap", BATCHES.values(), ids=BATCHES)
def test_kinds_of_batches(wrap):
    model, x = Named(), torch.randn(12, 3, dtype=torch.float64)
    twin = copy.deepcopy(model)
    outputs = forward_together(model, (wrap(part) for part in x.split(SPLIT)))
    assert [len(y) for y in outputs] == SPLIT
    close([torch.cat(outputs)], [twin(x)], 1e-14)


def test_packed_sequences():
    layer = BatchNorm(3, dtype=torch.float64)
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (5, 3, 2, 4)]
    packs = [pack_sequence(part, enforce_sorted=False) for part in (sequences[:3], sequences[3:])]
    outputs = forward_together(layer, packs)
    every = torch.cat(sequences)
    expected = (every - every.mean(0)) / (every.var(0, correction=0) + 1e-5).sqrt()
    close([outputs[1].data], [expected[10:]], 1e-14)
    assert torch.equal(outputs[0].batch_sizes, packs[0].batch_sizes)


def test_step_returns_what_it_wants_in_order_and_one_at_a_time():
    model, x = Named(), torch.randn(12, 3, dtype=torch.float64)
    order = []

    def step(net, part):
        order.append(("in", len(part)))
        loss = net(part).square().sum()
        order.append(("out", len(part)))
        return {"loss": loss, "size": len(part)}

    results = forward_together(model, x.split(SPLIT), step=step)
    assert [result["size"] for result in results] == SPLIT
    assert order == [(way, n) for way in ("in", "out") for n in SPLIT]
    # Σ x̂² = n·σ²/(σ² + eps), whatever the split.
    var = x.var(0, correction=0)
    close([sum(r["loss"] for r in results)], [(12 * var / (var + 1e-5)).sum()], 1e-12)


def test_no_and_one_micro_batch():
    model, x = Block(), data()
    before = buffers(model)
    assert forward_together(model, []) == []
    assert unchanged(model, before)
    twin = copy.deepcopy(model)
    close(forward_together(model, [x]), [twin(x)], 1e-12)
    close(model.buffers(), twin.buffers(), 1e-12)


@pytest.mark.filterwarnings("error")
def test_nothing_changes_nothing():
    model = nn.Sequential(BatchNorm(3))
    before = buffers(model)
    (y,) = forward_together(model, [torch.empty(0, 3)])
    assert y.shape == (0, 3)
    assert unchanged(model, before)


def test_evaluation_and_frozen_layers_have_nothing_to_wait_for():
    model, x = Block(), data()
    model.first.eval()
    freeze(model.twice)
    before, twin = buffers(model), copy.deepcopy(model)
    close([together(model, x, None)], [twin(x)], 1e-12)
    assert unchanged(model, before)
