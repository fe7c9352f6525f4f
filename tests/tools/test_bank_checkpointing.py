"""Banks and activation checkpointing: what is done again goes by the bank of the first time."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm, InputError, Renorm, accumulate_statistics, bank, freeze

pytestmark = pytest.mark.usefixtures("kernels")

OPTIONS = {
    "plain": {},
    "renorm": {"renorm": Renorm(1.2, 0.1, r_steps=(0, 0), d_steps=(0, 0))},
    "ghost": {"virtual_batch_size": 3},
}


def network(affine, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), BatchNorm(3, **options), nn.Tanh(), BatchNorm(3)).double()
    net(torch.randn(8, 4).double())
    fake = bank(net, "fake", affine=affine)
    with fake:
        net(torch.randn(8, 4).double() * 3 + 2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(0.5, 1.5)
    return net, fake


def run(net, fake, forward):
    """Two passes by the layers' own and two by the bank, in turns; backward when all has ended."""
    torch.manual_seed(1)
    leaves = [torch.randn(8, 4).double().requires_grad_() for _ in range(4)]
    losses = []
    for index, leaf in enumerate(leaves):
        cotangent = torch.randn(8, 3).double()
        if index % 2:
            with fake:
                losses.append((forward(leaf) * cotangent).sum())
        else:
            losses.append((forward(leaf) * cotangent).sum())
    sum(losses).backward()
    return [leaf.grad for leaf in leaves] + [p.grad for p in net.parameters()]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", ["training", "frozen", "evaluation"])
def test_gradients_and_statistics_are_those_without_checkpointing(mode, options, affine, reentrant):
    if mode == "evaluation" and reentrant:
        pytest.skip("documented: an evaluation without gradients is not remembered")
    results = []
    for checkpointed in (False, True):
        net, fake = network(affine, **OPTIONS[options])
        net.train(mode != "evaluation")
        if mode == "frozen":
            freeze(net, affine=False)
        again = functools.partial(checkpoint, net, use_reentrant=reentrant)
        gradients = run(net, fake, again if checkpointed else net)
        results.append([gradients, net.state_dict()])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_one_block_after_the_other_within_one_step(reentrant):
    """Each with its backward pass; the same data, as a first layer may get."""
    x, dy = torch.randn(2, 8, 4).double()[..., :3]
    results = []
    for checkpointed in (False, True):
        net, fake = network(True)
        net = net[1]
        fake = bank(net, "fake", affine=True)
        forward = functools.partial(checkpoint, net, use_reentrant=reentrant)
        for block in (torch.enable_grad(), fake, torch.enable_grad()):
            leaf = x.clone().requires_grad_()
            with block:
                y = forward(leaf) if checkpointed else net(leaf)
            y.backward(dy)
        results.append([leaf.grad, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_same_data_with_two_banks_is_an_error(reentrant):
    net, fake = network(True)
    x = torch.randn(8, 4).double().requires_grad_()
    first = checkpoint(net, x, use_reentrant=reentrant)
    with fake:
        checkpoint(net, x, use_reentrant=reentrant)
    with pytest.raises(InputError, match=r"'1', .*with several \(fake, the layer's own\)"):
        first.sum().backward()


def test_accumulation_takes_in_each_bank_once():
    net, fake = network(True)
    before = [int(keeper.num_batches_tracked) for keeper in (net[1], net[1].banks.fake)]
    with accumulate_statistics(net):
        run(net, fake, functools.partial(checkpoint, net, use_reentrant=False))
    after = [int(keeper.num_batches_tracked) for keeper in (net[1], net[1].banks.fake)]
    assert after == [before[0] + 1, before[1] + 1]


def test_an_evaluation_or_a_layer_without_banks_remembers_nothing():
    net, _ = network(True)
    with torch.no_grad():
        net.eval()(torch.randn(8, 4).double())
    assert net[1]._banked is None
    net, _ = network(False)  # the output does not depend on the bank
    with torch.no_grad():
        net(torch.randn(8, 4).double())
    assert net[1]._banked is None


def test_input_that_does_not_fit_is_told_as_always():
    net, _ = network(True)
    with torch.no_grad(), pytest.raises(InputError, match="expected 3 channels"):
        net[1](torch.randn(8, 5).double())
