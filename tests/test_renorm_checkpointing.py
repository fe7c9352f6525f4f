"""Batch Renormalization and checkpointing: counted once, with the first pass's correction."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm, InputError, Renorm
from renorm_limits import AT_ONCE, close

pytestmark = pytest.mark.usefixtures("kernels")


def recalled(layer):
    return [once for recall in (layer._corrections or {}).values() for once in recall.passes]


def network(size=None):
    torch.manual_seed(1)
    options = {"virtual_batch_size": size, "renorm": Renorm(3.0, 2.0, **AT_ONCE)}
    return nn.Sequential(
        nn.Linear(3, 4), BatchNorm(4, **options), nn.Tanh(), BatchNorm(4, **options), nn.Tanh()
    ).double()


def batches(number):
    torch.manual_seed(2)
    return [(torch.randn(6, 3).double() * 4 + k, torch.randn(6, 4).double()) for k in range(number)]


def train(net, run, schedule):
    """Gradients of x and of the parameters, by steps of several micro-batches each."""
    gradients = []
    data = batches(3)
    for step in schedule:
        outputs, leaves = [], []
        for k in step:
            leaves.append(data[k][0].clone().requires_grad_())
            outputs.append((run(leaves[-1]), data[k][1]))
        sum((y * dy).sum() for y, dy in outputs).backward()
        gradients += [leaf.grad for leaf in leaves] + [p.grad.clone() for p in net.parameters()]
    return gradients


SCHEDULES = {
    "one by one": [[0], [1], [2]],
    "all before the backward pass": [[0, 1, 2], [2, 1]],
    "a batch of an earlier step again": [[0], [0], [1], [0]],
    "a batch twice in a step": [[0, 1, 0], [0, 0]],
}


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_checkpointing_counts_once_and_has_the_first_passes_correction(schedule, reentrant, size):
    plain, net = network(size), network(size)
    steps = SCHEDULES[schedule]
    want = train(plain, plain, steps)
    got = train(net, functools.partial(checkpoint, net, use_reentrant=reentrant), steps)
    torch.testing.assert_close(got, want, **close)
    torch.testing.assert_close(net.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert net[1].num_batches_tracked == sum(map(len, steps))


def test_a_kept_graph_is_recomputed_with_the_same_correction_again():
    data = batches(2)
    results = []
    for checkpointed in (False, True):
        net = network()
        run = functools.partial(checkpoint, net, use_reentrant=False) if checkpointed else net
        leaf = data[0][0].clone().requires_grad_()
        loss = (run(leaf) * data[0][1]).sum()
        run(data[1][0])  # moves the statistics
        results.append([torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(3)])
    assert torch.equal(results[1][0], results[1][2])
    torch.testing.assert_close(*results, **close)


@pytest.mark.parametrize(
    "values",
    [[(0.5, -0.5), (4.0, -4.0)], [(0.5, -0.5), (2.5, 1.5)]],
    ids=["mean", "variance"],
)
def test_a_batch_of_the_same_moment_is_another_batch(values):
    results = []
    for checkpointed in (False, True):
        bn = BatchNorm(2, renorm=Renorm(3.0, 2.0, **AT_ONCE)).double()
        run = functools.partial(checkpoint, bn, use_reentrant=False) if checkpointed else bn
        dy = torch.arange(8.0).reshape(4, 2).double().sqrt()
        leaves = [torch.tensor([[a, 1.0], [b, -1.0]]).repeat(2, 1).double() for a, b in values]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        for loss in [(run(leaf) * dy).sum() for leaf in leaves]:
            loss.backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*results, **close)


def test_checkpointing_within_checkpointing():
    results = []
    for checkpointed in (False, True):
        net, (x, dy) = network(), batches(1)[0]
        inner = functools.partial(checkpoint, net[:3], use_reentrant=False)
        outer = lambda x, net=net, inner=inner: net[3:](inner(x))  # noqa: E731
        leaf = x.clone().requires_grad_()
        y = checkpoint(outer, leaf, use_reentrant=False) if checkpointed else net(leaf)
        y.backward(dy)
        results.append([leaf.grad, net[0].weight.grad, *net.state_dict().values()])
    torch.testing.assert_close(*results, **close)


def test_what_is_kept_for_checkpointing_is_bounded_and_not_copied():
    bn = BatchNorm(3, renorm=Renorm(**AT_ONCE))
    for _ in range(300):
        bn(torch.randn(4, 3, requires_grad=True))
    assert not recalled(bn)  # nobody will compute these again
    with torch.no_grad():
        for _ in range(300):
            bn(torch.randn(4, 3))
    assert len(recalled(bn)) == 256
    kept = [(once.mean, once.var, *once.fact) for once in recalled(bn)]
    assert not any(t.requires_grad for tensors in kept for t in tensors)
    assert not recalled(copy.deepcopy(bn))


@pytest.mark.parametrize("reentrant", [True, False])
def test_other_passes_over_the_batch_do_not_answer_for_it(reentrant):
    """A pass without gradients, as for a log, between a checkpointed one and its backward pass."""
    x, dy = torch.randn(6, 3, dtype=torch.float64) * 3 + 1, torch.randn(6, 3, dtype=torch.float64)
    gradients = []
    for run in ("plain", "checkpoint"):
        bn = BatchNorm(3, renorm=Renorm(1.2, 0.1, r_steps=(0, 0), d_steps=(0, 0))).double()
        leaf = x.clone().requires_grad_()
        forward = functools.partial(checkpoint, bn, use_reentrant=reentrant)
        y = bn(leaf) if run == "plain" else forward(leaf)
        if not reentrant:  # the other kind's first pass is such a one itself
            with torch.no_grad():
                bn(leaf)
        gradients.append(torch.autograd.grad(y, leaf, dy)[0] if not reentrant else None)
        if reentrant:
            y.backward(dy)
            gradients[-1] = leaf.grad
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


def test_more_passes_than_are_remembered_are_an_error(monkeypatch):
    monkeypatch.setattr("batchnorm.recall.MOST_FORWARDS", 3)
    bn = BatchNorm(3, renorm=Renorm(1.2, 0.1, r_steps=(0, 0), d_steps=(0, 0)))
    leaves = [torch.randn(6, 3, requires_grad=True) for _ in range(4)]
    outputs = [checkpoint(bn, leaf, use_reentrant=False) for leaf in leaves]
    outputs[-1].sum().backward()
    with pytest.raises(InputError, match="3 forward passes"):
        outputs[0].sum().backward()
