"""The outline's sample: it runs as it stands with our class, and its five faults are not ours."""

import copy
import gc

import pytest
import torch
from torch import nn

import batchnorm


class Sample(nn.Module):
    """The teaching outline's class, word for word but for its name."""

    def __init__(self, features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.features = features
        self.eps = eps
        self.momentum = momentum
        self.gamma = nn.Parameter(torch.ones(features))
        self.beta = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x):
        assert x.dim() == 2

        if self.training:
            mean, var = torch.mean(x, dim=0), torch.var(x, dim=0)
            self.running_mean.mul_(1 - self.momentum).add_(mean * self.momentum)
            self.running_var.mul_(1 - self.momentum).add_(var * self.momentum)
        else:
            mean, var = self.running_mean, self.running_var

        x = (x - mean) / torch.sqrt(var + self.eps)
        return self.gamma * x + self.beta


def both():
    return pytest.param(Sample, marks=pytest.mark.xfail(strict=True)), batchnorm.BatchNorm


def test_the_sample_runs_verbatim():
    from batchnorm import BatchNorm

    bn = BatchNorm(features=10)
    x = torch.randn(64, 10)
    output = bn(x)
    assert output.shape == x.shape
    assert bn.features == 10
    assert torch.equal(bn.gamma, torch.ones(10))
    assert torch.equal(bn.beta, torch.zeros(10))
    assert isinstance(bn.gamma, nn.Parameter)
    torch.testing.assert_close(bn.running_mean, 0.1 * x.mean(0))
    torch.testing.assert_close(bn.running_var, 0.9 + 0.1 * x.var(0))


def test_in_evaluation_the_two_agree():
    sample, ours = Sample(5), batchnorm.BatchNorm(features=5)
    ours.load_state_dict(sample.state_dict(), strict=True)
    for _ in range(3):
        x = torch.randn(16, 5)
        sample(x)
        ours(x)
    x = torch.randn(16, 5)
    torch.testing.assert_close(ours.eval()(x), sample.eval()(x))


@pytest.mark.parametrize("kind", both())
def test_normalises_by_the_biased_variance(kind):
    y = kind(features=3)(torch.randn(4, 3) * 100)
    torch.testing.assert_close(y.square().mean(0), torch.ones(3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", both())
def test_buffers_hold_no_graph(kind):
    bn = kind(features=3)
    bn(torch.randn(4, 3, requires_grad=True))
    assert bn.running_mean.grad_fn is None
    copy.deepcopy(bn)


@pytest.mark.parametrize("kind", both())
def test_memory_does_not_grow_with_the_steps(kind):
    bn = kind(features=3)
    source = torch.randn(4, 3, requires_grad=True)

    def step():
        x = source * 2
        bn(x)
        return x.grad_fn

    nodes = [step() for _ in range(5)]
    gc.collect()
    reachable, queue = set(), [getattr(bn.running_mean, "grad_fn", None)]
    while queue:
        node = queue.pop()
        if node is not None and node not in reachable:
            reachable.add(node)
            queue.extend(parent for parent, _ in node.next_functions)
    assert not reachable & set(nodes)


@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("kind", both())
def test_a_batch_of_one_does_not_poison_the_statistics(kind):
    bn = kind(features=3)
    with pytest.raises(ValueError, match="more than 1 value"):
        bn(torch.randn(1, 3))
    assert bn.running_var.isfinite().all()


@pytest.mark.parametrize("kind", both())
def test_images_and_sequences(kind):
    y = kind(features=3)(torch.randn(4, 3, 5, 5) * 3 + 1)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", both())
def test_input_is_checked_even_without_asserts(kind):
    with pytest.raises(ValueError, match="rank 2 or more"):
        kind(features=3)(torch.randn(3))


def test_aliases_can_be_assigned():
    bn = batchnorm.BatchNorm(3)
    bn.gamma = nn.Parameter(torch.full((3,), 2.0))
    bn.beta = None
    assert bn.weight is bn.gamma
    assert bn.bias is None
    assert set(bn.state_dict()) == {"weight", "running_mean", "running_var", "num_batches_tracked"}
