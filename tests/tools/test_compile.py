"""Compiled models follow what the tools switch, also when they were compiled before."""

import copy

import pytest
import torch
from torch import nn

from batchnorm import (
    BatchNorm,
    accumulate_statistics,
    bank,
    forward_together,
    freeze,
    pause_statistics,
    recalibrate,
    unfreeze,
)

pytestmark = [
    pytest.mark.slow,
    # Dynamo makes an instance of Function whenever it meets an autograd function.
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated"),
]
EITHER = pytest.mark.parametrize("kind", [BatchNorm, nn.BatchNorm1d])

# float64, values below 20: a few roundings of each of two kernels.
TOLERANCE = {"rtol": 0, "atol": 1e-13}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(kind):
    model = nn.Sequential(kind(3, dtype=torch.float64))
    with torch.no_grad():
        for tensor in (*model.parameters(), *list(model.buffers())[:2]):
            tensor.uniform_(0.5, 1.5)
    return model, copy.deepcopy(model), torch.compile(model, backend="aot_eager")


def data():
    return torch.randn(8, 3, dtype=torch.float64) * 2 + 1


def assert_same(model, twin):
    for name, expected in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected, **TOLERANCE)


def gradient(model, x, cotangent):
    x = x.clone().requires_grad_()
    y = model(x)
    return y.detach(), torch.autograd.grad(y, x, cotangent)[0]


@EITHER
@pytest.mark.parametrize("affine", [True, False])
def test_freeze(kind, affine):
    model, twin, compiled = made(kind)
    x, cotangent = data(), data()
    for net in (compiled, twin):
        net(x)
    for tool in (freeze, unfreeze, freeze):
        tool(model, affine=affine)
        tool(twin, affine=affine)
        got, expected = (gradient(net, x, cotangent) for net in (compiled, twin))
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, **TOLERANCE)
        assert_same(model, twin)
        assert model[0].training
    assert model[0].num_batches_tracked == 2


def test_bank():
    model, twin, _ = made(BatchNorm)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    fake, twin_fake = (bank(net, "fake", affine=True) for net in (model, twin))
    with torch.no_grad():
        model[0].banks.fake.weight.fill_(3)
        twin[0].banks.fake.weight.fill_(3)
    for _ in range(2):
        x = data()
        torch.testing.assert_close(compiled(x), twin(x), **TOLERANCE)
        with fake, twin_fake:
            torch.testing.assert_close(compiled(x), twin(x), **TOLERANCE)
    assert_same(model, twin)
    assert model[0].banks.fake.num_batches_tracked == 2


@EITHER
def test_pause(kind):
    model, twin, compiled = made(kind)
    for _ in range(2):
        x = data()
        torch.testing.assert_close(compiled(x), twin(x), **TOLERANCE)
        with pause_statistics(model):
            compiled(x + 1)
    assert_same(model, twin)


@EITHER
def test_accumulate(kind):
    model, twin, compiled = made(kind)
    for _ in range(2):
        batches = data().split([3, 5])
        with accumulate_statistics(model):
            for batch in batches:
                compiled(batch)
        twin(torch.cat(batches))
        assert_same(model, twin)
        x = data()
        torch.testing.assert_close(compiled(x), twin(x), **TOLERANCE)
    assert_same(model, twin)
    assert model[0].num_batches_tracked == 4


def test_together():
    model, twin, compiled = made(BatchNorm)
    for _ in range(2):
        x = data()
        torch.testing.assert_close(
            torch.cat(forward_together(compiled, x.split([3, 5]))), twin(x), **TOLERANCE
        )
        assert_same(model, twin)
        torch.testing.assert_close(compiled(x), twin(x), **TOLERANCE)
    assert_same(model, twin)


@EITHER
@pytest.mark.parametrize("method", ["batch", "layerwise"])
def test_recalibration_of_what_was_compiled_before(kind, method):
    model, twin, compiled = made(kind)
    x = data()
    for mode in (True, False):
        # The same shapes as later: what is compiled anew would see hooks that came before.
        for part in x.split(4):
            compiled.train(mode)(part)
            twin.train(mode)(part)
    for net in (compiled, twin):
        assert recalibrate(net, x.split(4), method=method).left == {}
    assert_same(model, twin)
    torch.testing.assert_close(model[0].running_var, x.var(0), **TOLERANCE)
    torch.testing.assert_close(compiled(x), twin(x), **TOLERANCE)


@pytest.mark.parametrize("training", [True, False])
def test_a_bank_in_one_graph(training):
    """Without a break: what a checkpoint would ask is not asked there."""
    model, twin, _ = made(BatchNorm)
    for net in (model, twin):
        net.train(training)
    banks = [bank(net, "other") for net in (model, twin)]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, cotangent = data(), data()
    with banks[0], banks[1]:
        for _ in range(2):
            assert_close = torch.testing.assert_close
            assert_close(
                gradient(compiled, x, cotangent), gradient(twin, x, cotangent), **TOLERANCE
            )
    assert_same(model, twin)
