"""forward_together and what is around it: contexts, checkpointing, other tools, copies, memory."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm, accumulate_statistics, bank, forward_together
from micro_batches import FULL, SPLIT, Block, Named, close, data, together

pytestmark = pytest.mark.usefixtures("kernels", "no_thread_stays")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    model, x = Block(), data()
    twin = copy.deepcopy(model)
    with context():
        y = together(model, x, None)
        assert not y.requires_grad
        close([y], [twin(x)], 1e-12)
    close(model.buffers(), twin.buffers(), 1e-12)


def test_autocast():
    """The surroundings of the call are those of each micro-batch."""
    model = nn.Sequential(nn.Linear(2, 3), BatchNorm(3))
    twin, x, cotangent = copy.deepcopy(model), torch.randn(12, 2), torch.randn(12, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.cat(forward_together(model, x.split(SPLIT)))
        expected = twin(x)
    (y.float() * cotangent).sum().backward()
    assert y.dtype is expected.dtype is torch.bfloat16
    assert model[0].weight.grad.dtype is torch.float32
    # One rounding to bfloat16 of the same numbers, below 4.
    torch.testing.assert_close(y, expected, rtol=2.0**-7, atol=0)
    close(model.buffers(), twin.buffers(), 1e-6)
    # Twelve terms of size 4, whose factors bfloat16 rounded by 2⁻⁹ of their sizes.
    exact = nn.Sequential(nn.Linear(2, 3), BatchNorm(3)).double()
    exact.load_state_dict(twin.double().state_dict())
    exact(x.double()).backward(cotangent.double())
    for name, parameter in model.named_parameters():
        expected = exact.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=0, atol=0.2)


def test_default_device():
    """What a model makes itself, it makes where the caller's would be made."""
    model = Named()
    devices = []

    def step(net, part):
        devices.append(torch.empty(1).device.type)
        return net(part)

    batches = torch.randn(8, 3, dtype=torch.float64).split(4)
    with torch.device("meta"):
        forward_together(model, batches, step=step)
    assert devices == ["meta", "meta"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_counts_once(reentrant):
    model, x = Block(), data()
    twin = copy.deepcopy(model)
    results = []
    for net, function in (
        (model, lambda leaf: checkpoint(together, model, leaf, None, use_reentrant=reentrant)),
        (twin, twin),
    ):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        y.backward(cotangent)
        results.append((y, leaf.grad, *(p.grad for p in net.parameters())))
    close(*results, 1e-10)
    close(model.buffers(), twin.buffers(), 1e-12)


def test_within_an_accumulation_all_goes_to_it():
    """One update by this large batch and what else came."""
    model = nn.Sequential(BatchNorm(3, dtype=torch.float64))
    x = torch.randn(20, 3, dtype=torch.float64) + torch.arange(20)[:, None]
    twin = copy.deepcopy(model)
    with accumulate_statistics(model):
        forward_together(model, x[:12].split(SPLIT))
        model(x[12:])
        assert model[0].num_batches_tracked == 0
    twin(x)
    close(model.buffers(), twin.buffers(), 1e-12)


def test_within_a_bank():
    model = nn.Sequential(BatchNorm(3, dtype=torch.float64))
    fake = bank(model, "fake", affine=True)
    with torch.no_grad():
        model[0].banks.fake.weight.fill_(3)
    twin, x = copy.deepcopy(model), torch.randn(12, 3, dtype=torch.float64)
    with fake:
        y = torch.cat(forward_together(model, x.split(SPLIT)))
    with bank(twin, "fake", affine=True):
        close([y], [twin(x)], 1e-12)
    close(model.buffers(), twin.buffers(), 1e-12)
    assert [int(k.num_batches_tracked) for k in (model[0], model[0].banks.fake)] == [0, 1]


def test_a_copy_made_within_is_on_its_own():
    """Whose threads, locks and micro-batches are no part of the model."""
    model, copies = nn.Sequential(BatchNorm(3)), []

    def step(net, part):
        copies.append(copy.deepcopy(net))
        return net(part)

    forward_together(model, torch.randn(12, 3).split(SPLIT), step=step)
    copies[0](torch.randn(6, 3))
    assert copies[0][0].num_batches_tracked == 1


@pytest.mark.parametrize("offload", [False, True])
def test_graph_is_freed(offload):
    """A layer with renorm remembers forward passes for checkpointing: not these, and no graph."""
    model = nn.Sequential(BatchNorm(3, renorm=FULL))
    x = torch.randn(12, 3, requires_grad=True)
    outputs = forward_together(model, (x * 2).split(SPLIT), offload=offload)
    nodes, ahead = set(), [y.grad_fn for y in outputs]
    while ahead:
        node = ahead.pop()
        nodes.add(node)
        ahead += [other for other, _ in node.next_functions if other not in {None, *nodes}]
    ours = [weakref.ref(node) for node in nodes if "Moments" in node.name()]
    assert len(ours) == 3
    del outputs, nodes, node
    gc.collect()
    assert [reference() for reference in ours] == [None] * 3
