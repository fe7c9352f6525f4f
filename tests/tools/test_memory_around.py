"""save_memory with what else goes on around a model, and what it leaves alone."""

import contextlib
import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm import (
    ArgumentError,
    BatchNorm,
    BatchNormLSTM,
    Renorm,
    accumulate_statistics,
    bank,
    forward_together,
    save_memory,
)
from batchnorm.tools import graph
from saving import BOTH, SIZE, convolutions, same, step

pytestmark = pytest.mark.usefixtures("kernels")


@BOTH
def test_second_derivatives(keep):
    model = nn.Sequential(
        nn.Linear(4, 6), BatchNorm(6, activation="leaky_relu"), nn.Linear(6, 6), BatchNorm(6),
        nn.SiLU(), nn.Linear(6, 1),
    ).double()  # fmt: skip
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    dy, results = torch.randn(9, 1, dtype=torch.float64), []
    leaves = [x, *(p for p in model.parameters() if p is not model[5].bias)]
    for around in (contextlib.nullcontext(), save_memory(model, keep)):
        with around as saved:
            y = model(x)
        (gradient,) = torch.autograd.grad(y, x, dy, create_graph=True)
        grads = torch.autograd.grad(gradient.square().sum(), leaves, materialize_grads=True)
        results.append(grads)
    assert saved.bytes > 0
    assert max(float(g.abs().max()) for g in results[0]) > 0.01
    if keep == "input":
        assert same(*results)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@BOTH
def test_nothing_outlives_the_graph(keep):
    model, x = convolutions(nn.LeakyReLU()), torch.randn(6, 8, 9, 7)
    gc.collect()
    gc.disable()
    try:
        held = []
        hook = model[0].register_forward_hook(lambda *call: held.append(weakref.ref(call[2])))
        with save_memory(model, keep) as saved:
            keeper = model[1]._watched.keeper
            loss = model(x).sum()
            loss.backward()
            assert saved.bytes > 0
            del loss
            assert held[0]() is None
            assert len(keeper.ties) == len(keeper.kept) == 0
            unused = model(x)
            assert len(keeper.ties) > 0
            del unused
            assert len(keeper.ties) == len(keeper.kept) == 0
        hook.remove()
        assert model[1]._watched is None
        alive = weakref.ref(keeper)
        del keeper
        assert alive() is None
    finally:
        gc.enable()


@BOTH
def test_what_saves_nothing_says_so_and_works_as_usual(keep):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.residual = BatchNorm(4, activation="leaky_relu")
            self.renorm = BatchNorm(4, renorm=Renorm(2.0, 1.0))
            self.function = BatchNorm(4, activation=torch.tanh)
            self.chained = BatchNorm(4)
            self.last = BatchNorm(4)
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = self.linear(self.residual(x, residual=x + 1))
            y = self.linear(self.renorm(y))
            y = self.linear(self.function(y))
            return self.last(self.chained(self.linear(y))) + 1

    model, x = Block(), torch.randn(8, 4)
    for _ in range(3):
        model(torch.randn(8, 4))
    expected, _ = step(model, x)
    found, saved = step(model, x, keep)
    if keep == "input":
        assert same(found, expected)
    reasons = saved.reasons
    assert "residual" in reasons["residual"]
    assert "renorm" in reasons["renorm"]
    assert "function" in reasons["function"]
    assert saved.layers["chained"] == x.nbytes
    assert "last" in reasons
    assert saved.bytes == x.nbytes
    assert f"last: 0 ({reasons['last']})" in str(saved)
    assert str(saved).startswith("128 bytes not kept")


def test_checkpointing_goes_first():
    model, x = convolutions(activation="relu"), torch.randn(6, 8, 9, 7)
    expected, _ = step(model, x)
    for reentrant in (False, True):
        twin, leaf = copy.deepcopy(model), x.clone().requires_grad_()
        with save_memory(twin) as saved:
            y = checkpoint(twin, leaf, use_reentrant=reentrant)
        torch.manual_seed(7)
        y.backward(torch.randn(y.shape))
        found = [y.detach(), leaf.grad, *(p.grad for p in twin.parameters()), *twin.buffers()]
        assert same(found, expected)
        assert saved.bytes == 0
        if not reentrant:
            assert "checkpointing" in saved.reasons["1"]


def test_within_a_checkpoint():
    model, x = convolutions(activation="relu"), torch.randn(6, 8, 9, 7)

    def part(x):
        with save_memory(model) as saved:
            y = model(x)
        assert saved.bytes == 0
        return y

    expected, _ = step(model, x)
    leaf = x.clone().requires_grad_()
    with pytest.warns(UserWarning, match="save_memory does nothing here"):
        y = checkpoint(part, leaf, use_reentrant=False)
    torch.manual_seed(7)
    with pytest.warns(UserWarning, match="save_memory does nothing here"):
        y.backward(torch.randn(y.shape))
    parameters = [p.grad for p in model.parameters()]
    assert same([y.detach(), leaf.grad, *parameters, *model.buffers()], expected)


def test_autocast():
    model, x = convolutions(activation="relu"), torch.randn(6, 8, 9, 7)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = step(model, x)
        found, saved = step(model, x, "input")
    assert same(found, expected)
    assert saved.layers == {"1": SIZE // 2, "3": SIZE // 2, "5": SIZE // 2}


@pytest.mark.slow
# Dynamo makes an instance of Function whenever it meets an autograd function.
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")
def test_compiled_code_goes_by_its_own_plan():
    model, x = convolutions(activation="relu"), torch.randn(6, 8, 9, 7)
    compiled = torch.compile(model, backend="aot_eager")
    leaves = list(model.parameters())
    torch.manual_seed(0)
    dy = torch.randn(6, 2, 9, 7)
    expected = torch.autograd.grad(compiled(x), leaves, dy)
    with save_memory(model) as saved:
        y = compiled(x)
    assert same(torch.autograd.grad(y, leaves, dy), expected)
    assert saved.bytes == 0


def test_banks_and_blocks_around():
    model, x = convolutions(activation="relu"), torch.randn(6, 8, 9, 7)
    other = bank(model, "other", affine=True)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, BatchNorm):
                layer.banks["other"].bias.add_(1.0)
    with other:
        expected, _ = step(model, x)
        found, saved = step(model, x, "input")
    assert same(found, expected)
    assert saved.bytes == 3 * SIZE
    with accumulate_statistics(model), save_memory(model):
        for micro in x.split(2):
            model(micro).square().sum().backward()
    assert [int(model[i].num_batches_tracked) for i in (1, 3, 5)] == [1, 1, 1]
    with save_memory(model) as outer:
        with save_memory(model) as inner:
            model(x)
        assert (outer.bytes, inner.bytes) == (0, 3 * SIZE)
        assert all("within this one counts" in reason for reason in outer.reasons.values())
        model(x)
        assert outer.bytes == 3 * SIZE


def test_passes_together_save_nothing_and_say_so():
    model, x = convolutions(activation="relu"), torch.randn(6, 8, 9, 7)
    results = []
    for around in (contextlib.nullcontext(), save_memory(model)):
        with around as saved:
            losses = forward_together(model, x.split(2), step=lambda m, b: m(b).square().sum())
        results.append(torch.autograd.grad(sum(losses), list(model.parameters())))
    assert same(*results)
    assert saved.reasons == dict.fromkeys("135", graph.UNSEEN)
    assert "forward_together" in graph.UNSEEN


def test_a_recurrent_network_saves_nothing_and_says_so():
    model, x = BatchNormLSTM(4, 6, max_length=5), torch.randn(5, 8, 4)
    with save_memory(model) as saved:
        y, _ = model(x)
    dy = torch.randn(5, 8, 6)
    found = torch.autograd.grad(y, list(model.parameters()), dy)
    expected = torch.autograd.grad(model(x)[0], list(model.parameters()), dy)
    assert saved.bytes == 0
    assert saved.reasons.keys() == saved.layers.keys()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_another_thread():
    model, x, found = convolutions(), torch.randn(6, 8, 9, 7), []
    expected, _ = step(model, x)
    with save_memory(model) as saved:
        thread = threading.Thread(target=lambda: found.append(step(model, x)[0]))
        # A copy has no block around it; the model itself has.
        thread.start()
        thread.join()
        thread = threading.Thread(target=lambda: model(x))
        thread.start()
        thread.join()
    assert same(found[0], expected)
    assert saved.bytes == 0
    assert all("thread" in reason for reason in saved.reasons.values())


@BOTH
@pytest.mark.parametrize("kind", ["module", "hidden", "of the same input"])
def test_a_function_that_ends_in_another_layer(keep, kind):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            other = BatchNorm(4)
            nn.init.ones_(other.bias)
            after = {
                "module": nn.Sequential(nn.Tanh(), other),
                "hidden": lambda y: other(y.tanh()),
                "of the same input": lambda _: other(self.started),
            }
            self.start, self.end = nn.Linear(4, 4), nn.Linear(4, 4)
            self.bn = BatchNorm(4, activation=after[kind])

        def forward(self, x):
            self.started = self.start(x)
            y = self.end(self.bn(self.started))
            del self.started
            return y

    x, results = torch.randn(8, 4), []
    for how in (None, keep):
        torch.manual_seed(0)
        model = Block()  # a copy's function would be of the first one's layers
        with contextlib.nullcontext() if how is None else save_memory(model, how) as saved:
            y = model(x)
        results.append(torch.autograd.grad(y.square().sum(), model.end.weight))
    torch.testing.assert_close(*results)
    assert saved.layers["bn"] == 0
    assert "a function after" in saved.reasons["bn"]


def test_gradients_are_not_asked_for():
    model, x = convolutions(), torch.randn(6, 8, 9, 7)
    with save_memory(model) as saved:
        with torch.no_grad():
            model(x)
        assert saved.bytes == 0
        assert saved.reasons == dict.fromkeys("135", "no call of it has recorded gradients")
        model(x)
        assert saved.bytes == 3 * SIZE
        with torch.no_grad():
            model(x)
    assert saved.reasons == {}


def test_refusals():
    with pytest.raises(ArgumentError, match='"input" or "output", got \'both\''):
        save_memory(convolutions(), "both")
    mixed = nn.Sequential(BatchNorm(3), nn.BatchNorm1d(3))
    with pytest.raises(ArgumentError, match="convert"):
        save_memory(mixed).__enter__()
    assert mixed[0]._watched is None
    with pytest.raises(ZeroDivisionError), save_memory(nn.Sequential(mixed[0])):
        raise ZeroDivisionError
    assert mixed[0]._watched is None
