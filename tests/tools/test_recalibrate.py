"""Exact population statistics: against NumPy in float64, however the data are split."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import oracle
from batchnorm import BatchNorm, recalibrate

pytestmark = pytest.mark.usefixtures("kernels")

KINDS = {"ours": BatchNorm, "torch's": nn.BatchNorm1d, "torch's sync": nn.SyncBatchNorm}
EVERY = pytest.mark.parametrize("kind", KINDS)
METHODS = pytest.mark.parametrize("method", ["batch", "layerwise"])
SPLITS = {"batch": [30, 2, 17, 11], "layerwise": [30, 1, 17, 1, 11]}


def network(kind="ours", **options):
    """Three layers; what comes into the first has another mean and spread in every channel."""
    make = KINDS[kind]
    return nn.Sequential(
        nn.Linear(4, 6), make(6, **options), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(6, 5), make(5, **options), nn.Tanh(),
        nn.Linear(5, 3), make(3, **options),
    ).double()  # fmt: skip


def data(n=60, offset=0.0):
    return offset + torch.randn(n, 4, dtype=torch.float64) * torch.tensor([1, 2, 3, 4.0]) + 1


def norms(model):
    return [module for module in model if hasattr(module, "running_mean")]


def pooled(model, batches, method):
    """Mean and unbiased variance at each layer, in NumPy. Dropout does nothing in evaluation."""
    parts, found = [batch.numpy() for batch in batches], []
    for module in model:
        if isinstance(module, nn.Linear):
            w, b = (p.detach().numpy() for p in (module.weight, module.bias))
            parts = [part @ w.T + b for part in parts]
        elif isinstance(module, nn.ReLU):
            parts = [np.maximum(part, 0) for part in parts]
        elif isinstance(module, nn.Tanh):
            parts = [np.tanh(part) for part in parts]
        elif hasattr(module, "running_mean"):
            every = np.concatenate(parts)
            mean, var = every.mean(0), every.var(0, ddof=1)
            found.append((mean, var))
            if method == "layerwise":
                parts = [(part - mean) / np.sqrt(var + module.eps) for part in parts]
            else:
                parts = [(p - p.mean(0)) / np.sqrt(p.var(0) + module.eps) for p in parts]
    return found


def expect(model, wanted, rtol=1e-11):
    """float64 to its rounding; a small mean may have lost digits of its spread."""
    for layer, (mean, var) in zip(norms(model), wanted, strict=True):
        spread = np.sqrt(var.max())
        np.testing.assert_allclose(layer.running_mean, mean, rtol=rtol, atol=rtol * spread)
        np.testing.assert_allclose(layer.running_var, var, rtol=rtol)


@EVERY
@METHODS
def test_pooled_statistics_of_every_layer(kind, method):
    model = network(kind)
    batches = data().split(SPLITS[method])
    report = recalibrate(model.train(), batches, method=method)
    expect(model, pooled(model, batches, method))
    assert (report.method, report.batches) == (method, len(batches))
    assert report.passes == (3 if method == "layerwise" else 1)
    assert [layer.name for layer in report.layers] == ["1", "5", "8"]
    for layer in report.layers:
        assert (layer.values, layer.batches, layer.calls) == (60, len(batches), 1)
    assert report.left == {}


@EVERY
def test_layerwise_is_what_comes_in_when_evaluation_runs(kind):
    """As hooks see it, in float64, and in float32 with buffers that round."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model, x, seen = network(kind).to(dtype), data().to(dtype), []
        recalibrate(model, x.split(SPLITS["layerwise"]), method="layerwise")
        for layer in norms(model):
            layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model.eval()(x)
        for layer, values in zip(norms(model), seen, strict=True):
            _, mean, _, unbiased, _ = oracle.moments(values)
            assert abs(oracle.wide(layer.running_mean) - mean).max() < tolerance * abs(values).max()
            np.testing.assert_allclose(layer.running_var, unbiased.astype(float), rtol=tolerance)


def test_batch_is_not_consistent_in_deep_layers_and_that_is_why_there_is_the_other():
    """With batches of two, what evaluation brings to the third layer is something else."""
    one, other = network(), None
    other = copy.deepcopy(one)
    batches = data().split(2)
    recalibrate(one, batches)
    recalibrate(other, batches, method="layerwise")
    assert torch.equal(one[1].running_var, other[1].running_var)
    ratio = one[8].running_var / other[8].running_var
    assert (ratio.log().abs() > 0.1).any()


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.sampled_from(list(KINDS)),
    st.floats(-1e3, 1e3),
)
def test_layerwise_any_split_gives_the_same(split, kind, offset):
    """Also batches of one. float64 rounds at 1e-16 of the offset, three layers deep."""
    generator = torch.Generator().manual_seed(len(split))
    model = network(kind)
    whole = copy.deepcopy(model)
    x = torch.randn(sum(split) + 2, 4, dtype=torch.float64, generator=generator) + offset
    recalibrate(model, x.split([*split, 2]), method="layerwise")
    recalibrate(whole, [x], method="layerwise")
    for a, b in zip(norms(model), norms(whole), strict=True):
        torch.testing.assert_close(a.running_mean, b.running_mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a.running_var, b.running_var, rtol=1e-9, atol=1e-12)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=8), st.sampled_from(list(KINDS)))
def test_batch_any_split_gives_the_same_where_no_layer_is_before(split, kind):
    generator = torch.Generator().manual_seed(sum(split))
    layer = KINDS[kind](4).double()
    x = torch.randn(sum(split), 4, dtype=torch.float64, generator=generator) + 100
    recalibrate(layer, x.split(split))
    torch.testing.assert_close(layer.running_mean, x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(layer.running_var, x.var(0), rtol=1e-12, atol=0)


@EVERY
@METHODS
@pytest.mark.parametrize("offset", [1e4, 1e5, -1e5])
def test_large_offsets(kind, method, offset):
    """float32 data of spread 1: the answer is that of float64, rounded. E[x²] − E[x]² is not."""
    layer = KINDS[kind](3)
    x = (torch.randn(2000, 3, dtype=torch.float64) + offset).float()
    recalibrate(layer, x.split(33), method=method)
    torch.testing.assert_close(layer.running_mean, x.double().mean(0).float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(layer.running_var, x.double().var(0).float(), rtol=2e-7, atol=0)


@METHODS
@EVERY
def test_uneven_batches_whose_means_differ(kind, method):
    """Four batches of 8 and one of 2: a plain average of batches is off by a half, and by 99 %."""
    sizes, means = [8, 8, 8, 8, 2], [0.0, 10.0, 20.0, 30.0, 100.0]
    batches = [m + torch.randn(n, 1) for n, m in zip(sizes, means, strict=True)]
    layer = KINDS[kind](1)
    recalibrate(layer, batches, method=method)
    every = torch.cat(batches).double()
    torch.testing.assert_close(layer.running_mean, every.mean(0).float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(layer.running_var, every.var(0).float(), rtol=2e-7, atol=0)
    assert 19 < layer.running_mean < 21
    assert 500 < layer.running_var < 560


@METHODS
def test_hundreds_of_batches(method):
    """More than are merged at once; the last ones differ from the first."""
    x = torch.randn(500, 3, dtype=torch.float64) + torch.linspace(0, 50, 500)[:, None]
    layer = BatchNorm(3).double()
    report = recalibrate(layer, x.split(3), method=method)
    assert (report.batches, report.layers[0].values) == (167, 500)
    torch.testing.assert_close(layer.running_mean, x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(layer.running_var, x.var(0), rtol=1e-13, atol=0)


@METHODS
def test_a_short_loader_and_a_long_one(method):
    model, batches = network(), data().split(10)
    assert recalibrate(model, batches, method=method, max_batches=100).batches == 6
    expect(model, pooled(model, batches, method))
    assert recalibrate(model, batches, method=method, max_batches=2).batches == 2
    expect(model, pooled(model, batches[:2], method))


@EVERY
@METHODS
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e300])
def test_the_old_statistics_have_no_part_in_it(kind, method, poison):
    """Poisoned ones are repaired."""
    model, batches = network(kind), data().split(20)
    with torch.no_grad():
        for layer in norms(model):
            layer.running_mean.fill_(poison)
            layer.running_var.fill_(poison)
    recalibrate(model, batches, method=method)
    expect(model, pooled(model, batches, method))


def test_drift_is_in_the_report():
    layer = BatchNorm(2, eps=1.0).double()
    layer.running_mean.copy_(torch.tensor([3.0, 0.0]))
    layer.running_var.copy_(torch.tensor([1.0, 3.0]))
    x = torch.tensor([[0.0, -3.0], [2.0, 0.0], [4.0, 3.0]], dtype=torch.float64)  # var 4 and 9
    (found,) = recalibrate(layer, [x]).layers
    assert found.mean_drift == pytest.approx((0.5 * (3 - 2) ** 2 / (4 + 1)) ** 0.5, rel=1e-14)
    logs = np.log([2 / 5, 4 / 10])
    assert found.var_drift == pytest.approx((0.5 * (logs**2).sum()) ** 0.5, rel=1e-14)
    again = recalibrate(layer, [x]).layers[0]
    assert (again.mean_drift, again.var_drift) == (0, 0)
    layer.running_mean.fill_(torch.nan)
    assert recalibrate(layer, [x]).layers[0].mean_drift is None
