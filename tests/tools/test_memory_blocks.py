"""Blocks of save_memory one within the other, within other hooks, within compiled code; again."""

from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm, save_memory
from batchnorm.kernels import calls
from saving import BOTH, SIZE, convolutions, same, step

pytestmark = pytest.mark.usefixtures("kernels")


@BOTH
def test_an_activation_within_another_block(keep):
    bn, other, linear = nn.Sequential(BatchNorm(4)), nn.Sequential(BatchNorm(4)), nn.Linear(4, 3)
    x, dy = torch.randn(8, 4, requires_grad=True), torch.randn(8, 3)
    expected = torch.autograd.grad(linear(bn(x).relu()), (x, linear.weight), dy)
    with save_memory(bn) as outer:
        y = bn(x)
        with save_memory(other, keep) as inner:
            z = linear(y.relu())
    assert same(torch.autograd.grad(z, (x, linear.weight), dy), expected)
    # One of the same `keep` sees what the outer one's layers are asked for.
    assert (outer.bytes, inner.bytes) == (x.nbytes if keep == "input" else 0, 0)


@BOTH
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_blocks_of_two_models(keep, order):
    """As a GAN has: whatever the order in which they open and close."""
    generator, discriminator = (convolutions(activation="leaky_relu") for _ in range(2))
    with torch.no_grad():  # so that inputs can be made
        for layer in (*generator, *discriminator):
            if isinstance(layer, BatchNorm):
                layer.reset_parameters()
    middle, x = nn.Conv2d(2, 8, 1), torch.randn(6, 8, 9, 7)
    both = nn.ModuleList([generator, middle, discriminator])
    results = []
    for how in ("alone", "together"):
        leaf = x.clone().requires_grad_()
        blocks = [save_memory(both, keep)]
        if how == "together":
            blocks = [save_memory(generator, keep), save_memory(discriminator, keep)]
        opened = [block.__enter__() for block in blocks]
        y = discriminator(middle(generator(leaf)))
        for i in order[: len(blocks)] if len(blocks) > 1 else (0,):
            blocks[i].__exit__(None, None, None)
        torch.manual_seed(7)
        results.append(torch.autograd.grad(y, (leaf, *both.parameters()), torch.randn(y.shape)))
        if how == "together":
            assert [saved.bytes for saved in opened] == [3 * SIZE, 3 * SIZE]
            assert all(saved.layers == dict.fromkeys("135", SIZE) for saved in opened)
            assert all(saved.reasons == {} for saved in opened)
    assert same(*results)
    assert generator[1]._watched is None
    assert calls.hooks() is None


def test_blocks_of_two_models_that_keep_different_tensors():
    first, second = (convolutions(activation="leaky_relu") for _ in range(2))
    x = torch.randn(6, 8, 9, 7)
    with save_memory(first) as outer, save_memory(second, "output") as inner:
        first(x)
        second(x)
    assert outer.bytes == 0 < inner.bytes
    assert all("another save_memory block" in reason for reason in outer.reasons.values())


def test_other_hooks_around_keep_what_they_have():
    model, x = convolutions(activation="relu"), torch.randn(6, 8, 9, 7)
    expected, _ = step(model, x)
    seen = []
    for inner in (False, True):
        seen.append([])
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen[-1].append(tuple(t.shape)) or t.detach(), lambda t: t
        )
        with hooks:
            if not inner:
                step(model, x)
                continue
            with pytest.warns(UserWarning, match="Enter save_memory first") as told:
                found, saved = step(model, x, "input")
            assert len(told) == 1
            assert Path(told[0].filename).name == "saving.py"  # where the block is
    assert same(found, expected)
    assert seen[0] == seen[1] != []
    assert saved.bytes == 0
    assert saved.reasons.keys() == saved.layers.keys()
    assert all("around the block" in reason for reason in saved.reasons.values())
    with save_memory(model) as saved:
        model(x)
    assert saved.bytes == 3 * SIZE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("made", ["inside", "outside"])
def test_a_block_within_compiled_code_does_nothing(whole, made):
    model, x = convolutions(activation="relu"), torch.randn(6, 8, 9, 7)
    leaves, dy = list(model.parameters()), torch.randn(6, 2, 9, 7)
    block = save_memory(model)

    def forward(x):
        with save_memory(model) if made == "inside" else block as saved:
            y = model(x)
        return y, saved.bytes

    torch._dynamo.reset()
    expected = torch.compile(model, backend="aot_eager")(x)
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=whole)
    if whole and made == "outside":  # which no context manager may be
        with pytest.raises(torch._dynamo.exc.Unsupported, match="created outside the compiled"):
            compiled(x)
    else:
        found, number = compiled(x)
        results = [torch.autograd.grad(y, leaves, dy) for y in (found, expected)]
        assert same(*results)
        assert number == 0
    assert model[1]._watched is None
    assert calls.hooks() is None


def test_blocks_that_close_in_another_order():
    model, x = convolutions(), torch.randn(6, 8, 9, 7)
    first, second, third = (save_memory(model) for _ in range(3))
    for block in (first, second, third):
        block.__enter__()
    own = model[1]._watched
    for block in (second, first):
        block.__exit__(None, None, None)
        assert model[1]._watched is own
    third.__exit__(None, None, None)
    assert model[1]._watched is None
    expected, _ = step(model, x)
    found, saved = step(model, x, "input")
    assert same(found, expected)
    assert saved.bytes == 3 * SIZE


def test_a_block_serves_as_often_as_wanted():
    model, x = convolutions(), torch.randn(6, 8, 9, 7)
    block, found = save_memory(model), []
    for _ in range(2):
        with block as saved:
            model(x)
        found.append(saved)
    with block as outer, block as inner:
        model(x)
    assert [s.bytes for s in (*found, outer, inner)] == [3 * SIZE, 3 * SIZE, 0, 3 * SIZE]
    assert model[1]._watched is None
    assert calls.hooks() is None

    @block
    def decorated():
        assert model[1]._watched is not None
        return model(x)

    assert same([decorated()], [model(x)])
    assert model[1]._watched is None
