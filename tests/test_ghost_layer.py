"""The layer with ghost batches: one running update a step, and evaluation as without groups."""

import pytest
import torch

import oracle
from batchnorm import BatchNorm, batch_norm

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("steps", [0, 1, 10])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_running_update_a_step_and_evaluation_as_without(steps, momentum, dtype):
    bn = BatchNorm(3, momentum=momentum, virtual_batch_size=4)
    mean, var = oracle.wide(torch.zeros(3)), oracle.wide(torch.ones(3))
    for step in range(steps):
        # Groups whose means differ: the variance of all is more than the mean of theirs.
        x = torch.randn(10, 3, 5) + torch.arange(10).reshape(10, 1, 1)
        x = x.to(dtype)
        bn(x)
        f = oracle.forward(x)
        mean, var = oracle.running(mean, var, f, 1 / (step + 1) if momentum is None else momentum)
    assert bn.num_batches_tracked == steps
    # Rounded once a step, in float32.
    for got, want in ((bn.running_mean, mean), (bn.running_var, var)):
        assert got.dtype is torch.float32
        assert (abs(oracle.wide(got) - want) <= 2.0**-24 * (steps + 1) * (abs(want) + 1)).all()

    plain = BatchNorm(3)
    plain.load_state_dict(bn.state_dict(), strict=True)
    leaves = [torch.randn(7, 3, 5).to(dtype).requires_grad_() for _ in range(2)]
    leaves[1].data.copy_(leaves[0].data)
    before = {name: value.clone() for name, value in bn.state_dict().items()}
    dy = torch.randn(7, 3, 5).to(dtype)
    results = []
    for layer, leaf in zip((bn.eval(), plain.eval()), leaves, strict=True):
        y = layer(leaf)
        results.append([y, *torch.autograd.grad(y, (leaf, layer.weight, layer.bias), dy)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in bn.state_dict().items())


def test_without_running_statistics_evaluation_has_no_groups():
    bn = BatchNorm(3, track_running_stats=False, virtual_batch_size=2)
    x = torch.randn(8, 3, 5)
    check_against = oracle.step(torch.zeros(8, 3, 5), x, size=2)
    assert (abs(oracle.wide(bn(x)) - check_against["y"].value) <= 8 * 2.0**-24 * 8).all()
    assert torch.equal(bn.eval()(x), batch_norm(x, None, None, bn.weight, bn.bias, True))


def test_a_frozen_layer_has_no_groups():
    from batchnorm import freeze

    bn, x = BatchNorm(3, virtual_batch_size=2), torch.randn(8, 3)
    freeze(bn, affine=False)
    assert torch.equal(bn(x), batch_norm(x, torch.zeros(3), torch.ones(3), bn.weight, bn.bias))
    assert bn.num_batches_tracked == 0


def test_checkpointing_counts_once():
    for reentrant in (True, False):
        net = torch.nn.Sequential(torch.nn.Linear(3, 3), BatchNorm(3, virtual_batch_size=2))
        twin = torch.nn.Sequential(torch.nn.Linear(3, 3), BatchNorm(3, virtual_batch_size=2))
        twin.load_state_dict(net.state_dict())
        x, dy = torch.randn(7, 3)[:6], torch.randn(6, 3)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        twin(leaves[0]).backward(dy)
        y = torch.utils.checkpoint.checkpoint(net, leaves[1], use_reentrant=reentrant)
        y.backward(dy)
        assert torch.equal(leaves[0].grad, leaves[1].grad)
        for name, value in twin.state_dict().items():
            assert torch.equal(net.state_dict()[name], value)
        assert net[1].num_batches_tracked == 1
