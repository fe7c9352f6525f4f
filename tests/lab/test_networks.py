import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, relu

from batchnorm import BatchNorm
from batchnorm.lab import networks


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_dense_weights_are_hes_and_take_no_global_draw():
    before = torch.get_rng_state()
    layer = networks.dense(400, 300, seeded())
    assert torch.equal(torch.get_rng_state(), before)
    # 120 000 draws: the standard deviation is known to 0.2%.
    assert layer.weight.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.01)
    assert layer.weight.mean().item() == pytest.approx(0, abs=1e-3)
    assert torch.equal(layer.bias, torch.zeros(300))
    other = networks.dense(400, 300, seeded(), gain=1.0, bias=False)
    assert other.bias is None
    torch.testing.assert_close(layer.weight, other.weight * 2**0.5)


def linears(net):
    return [layer for layer in net if isinstance(layer, nn.Linear)]


def test_arms_of_a_perceptron_begin_with_the_same_weights():
    plain = networks.mlp([6, 5, 4, 3], networks.nothing, seeded())
    normalized = networks.mlp([6, 5, 4, 3], BatchNorm, seeded(), activation=nn.Tanh)
    assert [type(layer) for layer in plain] == [nn.Linear, nn.ReLU] * 2 + [nn.Linear]
    kinds = [nn.Linear, BatchNorm, nn.Tanh]
    assert [type(layer) for layer in normalized] == kinds * 2 + [nn.Linear]
    assert [layer.num_features for layer in normalized if isinstance(layer, BatchNorm)] == [5, 4]
    for a, b in zip(linears(plain), linears(normalized), strict=True):
        assert torch.equal(a.weight, b.weight)
    assert [layer.bias is None for layer in linears(plain)] == [False] * 3
    # What is normalized after it needs no bias; the head is not normalized.
    assert [layer.bias is None for layer in linears(normalized)] == [True, True, False]
    other = networks.mlp([6, 5, 4, 3], BatchNorm, seeded(1))
    assert not torch.equal(linears(other)[0].weight, linears(normalized)[0].weight)


def test_gain_is_of_the_hidden_layers_and_the_head_has_one():
    draws = seeded()
    net = networks.mlp([6, 5, 4], BatchNorm, seeded(), gain=3.0)
    for layer, gain in zip(linears(net), (3.0, 1.0), strict=True):
        fan_out, fan_in = layer.weight.shape
        expected = torch.randn(fan_out, fan_in, generator=draws) * (gain / fan_in) ** 0.5
        torch.testing.assert_close(layer.weight, expected)


def test_perceptron_without_a_hidden_layer_is_its_head():
    (head,) = networks.mlp([6, 3], BatchNorm, seeded())
    assert head.weight.shape == (3, 6)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 1), (1, 2), (5, 2)])
def test_convolution_keeps_the_images_size_by_its_stride(size, stride):
    layer = networks.convolution(40, 50, seeded(), size=size, stride=stride, bias=True)
    found = layer(torch.ones(1, 40, 8, 8))
    assert found.shape == (1, 50, 8 // stride, 8 // stride)
    std = (2 / (40 * size * size)) ** 0.5
    assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
    assert torch.equal(layer.bias, torch.zeros(50))
    assert networks.convolution(2, 2, seeded()).bias is None


def normalize(values):
    mean = values.mean((0, 2, 3), keepdim=True)
    var = values.var((0, 2, 3), unbiased=False, keepdim=True)
    return (values - mean) / (var + 1e-5).sqrt()


@pytest.mark.parametrize(("fan_in", "fan_out", "stride"), [(3, 3, 1), (3, 5, 1), (3, 3, 2)])
def test_block_equals_its_formula(fan_in, fan_out, stride):
    block = networks.Block(fan_in, fan_out, stride, BatchNorm, seeded()).double()
    x = torch.randn(4, fan_in, 8, 8, generator=seeded(1)).double()
    first, second = (m for m in block.branch if isinstance(m, nn.Conv2d))
    inner = relu(normalize(conv2d(x, first.weight, stride=stride, padding=1)))
    branch = normalize(conv2d(inner, second.weight, padding=1))
    shortcut = x
    if fan_in != fan_out or stride > 1:
        shortcut = normalize(conv2d(x, block.shortcut[0].weight, stride=stride))
    else:
        assert len(block.shortcut) == 0
    torch.testing.assert_close(block(x), relu(shortcut + branch))


def test_resnet_is_that_of_he_and_others_for_small_images():
    net = networks.resnet(1, 10, BatchNorm, seeded(), blocks=3)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    # 6·3 + 2 layers with weights, and the two shortcuts that change the size.
    assert len(convolutions) == 6 * 3 + 1 + 2
    blocks = [m for m in net if isinstance(m, networks.Block)]
    shapes, h = [], torch.zeros(2, 1, 8, 8)
    for layer in net[:3]:
        h = layer(h)
    for block in net[3:]:
        h = block(h)
        shapes.append(tuple(h.shape[1:]))
    assert shapes[:9] == [(16, 8, 8)] * 3 + [(32, 4, 4)] * 3 + [(64, 2, 2)] * 3
    assert shapes[-1] == (10,)
    assert len(blocks) == 9
    assert all(m.bias is None for m in convolutions)


def test_arms_of_a_resnet_begin_with_the_same_weights():
    plain = networks.resnet(3, 4, networks.nothing, seeded())
    normalized = networks.resnet(3, 4, BatchNorm, seeded())
    assert not any(isinstance(m, BatchNorm) for m in plain.modules())
    pairs = itertools.zip_longest(
        *(
            [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
            for net in (plain, normalized)
        )
    )
    for a, b in pairs:
        assert torch.equal(a.weight, b.weight)
        assert a.bias is not None
        assert torch.equal(a.bias, torch.zeros_like(a.bias))
