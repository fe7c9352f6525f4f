"""save_memory beside checkpointing, where what is done again must find what was so at first."""

import contextlib

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm, Renorm, bank, save_memory
from batchnorm.bench.allocations import allocations
from saving import SIZE, convolutions, same

pytestmark = pytest.mark.usefixtures("kernels")


def network(kind):
    torch.manual_seed(0)
    renorm = Renorm(2.0, 1.0, r_steps=(0, 1), d_steps=(0, 1)) if kind == "renorm" else None
    model = nn.Sequential(nn.Linear(8, 8), BatchNorm(8, renorm=renorm), nn.Linear(8, 8))
    for _ in range(5):
        model(torch.randn(16, 8) * 2 + 1)
    other = bank(model, "other", affine=True)
    with torch.no_grad():
        model[1].banks["other"].weight.mul_(3.0)
    return model, other if kind == "bank" else contextlib.nullcontext()


#: What is around the forward pass, and around both.
AROUND = {
    "save_memory": (save_memory, None),
    "save_memory around all": (None, save_memory),
    "both": (save_memory, save_memory),
    "save_on_cpu": (lambda _: save_on_cpu(), None),
    "save_on_cpu around all": (None, lambda _: save_on_cpu()),
}


def inner(model, x, reentrant):
    return checkpoint(model, x, use_reentrant=reentrant)


def once(model, x, reentrant):
    return model(x) if reentrant is None else inner(model, x, reentrant)


def nested(model, x, reentrant):
    return model(x) if reentrant is None else inner(lambda x: inner(model, x, not reentrant), x,
                                                    reentrant)  # fmt: skip


def saving(model, x, reentrant):
    def forward(x):
        with save_memory(model):
            return model(x)

    return model(x) if reentrant is None else inner(forward, x, reentrant)


# Within a checkpoint that watches what is saved, or other hooks, the block steps aside.
@pytest.mark.filterwarnings("ignore:save_memory does nothing here")
@pytest.mark.parametrize("kind", ["bank", "renorm"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("call", [once, nested, saving])
def test_what_is_done_again_is_as_at_first(kind, reentrant, around, call):
    of_forward, of_all = AROUND[around]
    results = []
    for how in (None, reentrant):
        model, other = network(kind)
        leaf = torch.randn(16, 8).requires_grad_()
        with contextlib.ExitStack() as stack:
            if of_all and how is not None:
                stack.enter_context(of_all(model))
            with contextlib.ExitStack() as block:
                if of_forward and how is not None:
                    block.enter_context(of_forward(model))
                block.enter_context(other)
                y = call(model, leaf, how)
            torch.manual_seed(3)
            y.backward(torch.randn(y.shape))
        parameters = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([leaf.grad, *parameters, *model.buffers()])
    assert same(*results)


@pytest.mark.filterwarnings("ignore:save_memory does nothing here")
def test_a_block_within_a_checkpoint_does_not_undo_it():
    model = nn.Sequential(*(convolutions(activation="relu")[:-1] for _ in range(3)))
    x = torch.randn(6, 8, 9, 7).requires_grad_()

    def saving(part, x):
        with save_memory(part):
            return part(x)

    def forward(call):
        for part in model:
            nonlocal y
            y = checkpoint(call, part, y, use_reentrant=False, preserve_rng_state=False)
        return y

    held = []
    for call in (lambda part, x: part(x), saving):
        y = x
        held.append(allocations(lambda call=call: forward(call)).held)
    # The input of each but the first, which was there before, and the last one's output.
    assert held[0] == held[1] < 3 * SIZE + 1024


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_usual_pass_of_the_same_data_is_not_mistaken_for_the_first(reentrant):
    """By the layer's own, in the block, after the one by the bank."""
    results = []
    for how in (None, reentrant):
        model, other = network("bank")
        leaf = torch.randn(16, 8).requires_grad_()
        with save_memory(model):
            with other:
                y = once(model, leaf, how)
            usual = model(leaf.detach())
            (y.square().sum() + usual.sum()).backward()
        results.append([leaf.grad, *(p.grad for p in model.parameters())])
    assert same(*results)


def test_a_pass_without_gradients_is_of_the_other_kind():
    results = []
    for how in (None, False):
        model, other = network("bank")
        leaf = torch.randn(16, 8).requires_grad_()
        with save_memory(model):
            with other:
                y = once(model, leaf, how)
            with torch.no_grad():
                model(leaf)
        y.square().sum().backward()
        results.append([leaf.grad, *(p.grad for p in model.parameters())])
    assert same(*(filter(torch.is_tensor, grads) for grads in results))
