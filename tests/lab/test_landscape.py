import copy

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from batchnorm import BatchNorm
from batchnorm.lab import landscape, networks, training

RATE = 0.3


def batch(rows=12, features=5, classes=3):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, features, generator=draw)
    return x, torch.randint(classes, (rows,), generator=draw)


def net(norm=networks.nothing, *, noise=False):
    numbers = iter(range(9))

    def activation():
        return nn.Sequential(landscape.Noise(7, next(numbers)), nn.ReLU()) if noise else nn.ReLU()

    return networks.mlp([5, 6, 4, 3], norm, training.generator(2), activation=activation)


def backward(parameters, x, y):
    """Loss and gradients of a plain ReLU network in float64, by the chain rule as written down."""
    weights, biases = parameters[::2], parameters[1::2]
    received, z = [], x
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        received.append(z if i == 0 else np.maximum(z, 0))
        z = received[-1] @ w.T + b
    chance = np.exp(z - z.max(1, keepdims=True))
    chance /= chance.sum(1, keepdims=True)
    loss = -np.log(chance[range(len(y)), y]).mean()
    error = (chance - np.eye(z.shape[1])[y]) / len(y)
    gradients = []
    for w, a in zip(weights[::-1], received[::-1], strict=True):
        gradients = [error.T @ a, error.sum(0), *gradients]
        error = (error @ w) * (a > 0)
    return loss, gradients


def by_hand():
    """The plain network as NumPy arrays in float64, and a function of its parameters."""
    x, y = batch()
    start = [p.detach().double().numpy() for p in net().parameters()]
    return start, lambda parameters: backward(parameters, x.double().numpy(), y.numpy())


def length(parts):
    return np.sqrt(sum(np.square(p).sum() for p in parts))


def test_gradient_shift_equals_definition_2_1_by_hand():
    """G′ of each layer is computed from the start, with the layers before it replaced."""
    start, at = by_hand()
    _, before = at(start)
    stepped = [p - RATE * g for p, g in zip(start, before, strict=True)]
    x, y = batch()
    here = net()
    _, gradient = landscape.gradients(here, x, y, list(here.parameters()))
    found = landscape.update(here, x, y, gradient, RATE)
    assert len(found) == 2
    for layer, change in zip((1, 2), found, strict=True):
        first = 2 * layer  # weight and bias of each layer before it
        _, after = at(stepped[:first] + start[first:])
        a, b = before[first].ravel(), after[first].ravel()
        assert change == pytest.approx(length([a - b]) / length([a]), rel=1e-4)
    for parameter, wanted in zip(here.parameters(), stepped, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_gradient_shift_with_normalization_and_noise_equals_copies_stepped_by_torch():
    """γ and β of an earlier layer make their step with it; the noise is the same for G and G′."""
    x, y = batch()
    start = net(BatchNorm, noise=True)
    landscape.set_step(start, 5)
    _, gradient = landscape.gradients(start, x, y, list(start.parameters()))
    modules = [m for m in start.modules() if isinstance(m, nn.Linear | BatchNorm)]
    expected = []
    for upto in (2, 4):  # modules before the second and the third dense layer
        copied = copy.deepcopy(start)
        parts = [m for m in copied.modules() if isinstance(m, nn.Linear | BatchNorm)]
        early = [p for m in parts[:upto] for p in m.parameters()]
        nn.functional.cross_entropy(copied(x), y).backward()
        before = parts[upto].weight.grad.clone()
        torch.optim.SGD(early, RATE).step()
        copied.zero_grad()
        nn.functional.cross_entropy(copied(x), y).backward()
        expected.append((before, parts[upto].weight.grad))
    found = landscape.update(start, x, y, gradient, RATE)
    assert len(modules) == 5
    for change, (before, after) in zip(found, expected, strict=True):
        assert change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
        assert change > 0.01


def test_the_line_along_the_gradient_equals_the_one_by_hand_and_leaves_no_trace():
    start, at = by_hand()
    loss, before = at(start)
    lengths = (0.25, 1.0, 3.0)
    losses, changes = [], []
    for step in lengths:
        other, after = at([p - step * g for p, g in zip(start, before, strict=True)])
        losses.append(other)
        changes.append(length([a - b for a, b in zip(after, before, strict=True)]))
    x, y = batch()
    here = net()
    kept = [p.detach().clone() for p in here.parameters()]
    found = landscape.along(
        here, x, y, landscape.gradients(here, x, y, list(here.parameters())), lengths
    )
    size = length(before)
    off = [
        abs(other - (loss - step * size**2)) / (step * size**2)
        for other, step in zip(losses, lengths, strict=True)
    ]
    assert found.departure == pytest.approx(max(off), rel=1e-4)
    assert max(off) > 2 * min(off)
    assert found.gradient == pytest.approx(max(changes) / size, rel=1e-4)
    steep = [c / (step * size) for c, step in zip(changes, lengths, strict=True)]
    assert found.smoothness == pytest.approx(max(steep), rel=1e-4)
    assert steep.index(max(steep)) != changes.index(max(changes)), "the case tells them apart"
    assert all(torch.equal(p, k) for p, k in zip(here.parameters(), kept, strict=True))


def test_distance_of_distributions_is_that_of_optimal_transport():
    draw = np.random.default_rng(0)
    before = draw.normal(size=(9, 4)).astype(np.float32)
    after = (2 * draw.normal(size=(9, 4)) + 1).astype(np.float32)
    squares = 0.0
    for a, b in zip(before.T, after.T, strict=True):
        cost = np.square(a[:, None] - b[None])
        squares += cost[linear_sum_assignment(cost)].mean()
    expected = np.sqrt(squares / ((before.var(0) + after.var(0)).sum() / 2))
    assert landscape.moved([before], [after]) == pytest.approx([expected], rel=1e-5)
    assert landscape.moved([8 * before], [8 * after]) == pytest.approx([expected], rel=1e-5)
    assert landscape.moved([before], [before[::-1]]) == [0.0]


def test_a_shift_counts_in_deviations_a_scale_as_it_should_and_dead_units_not_at_all():
    x = np.array([[-3.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [3.0, 0.0]], dtype=np.float32)
    sigma = np.sqrt(5.0)
    shifted = x + np.array([sigma / 2, 0.0], dtype=np.float32)
    assert landscape.moved([x], [shifted]) == pytest.approx([0.5], rel=1e-6)
    # Deviations σ and 3σ lie 2σ apart; the mean variance is 5σ².
    assert landscape.moved([x], [3 * x]) == pytest.approx([2 / np.sqrt(5)], rel=1e-6)
    assert landscape.moved([0 * x], [0 * x]) == [None]


def test_a_loss_that_falls_as_foretold_has_no_departure():
    """However steep: the loss of two classes that are far apart is linear in the logits."""
    here = nn.Linear(1, 2, bias=False)
    x, y = torch.tensor([[1.0]]), torch.tensor([1])
    for steepness in (1.0, 10.0):
        with torch.no_grad():
            here.weight.copy_(torch.tensor([[300.0], [-300.0]]))
        start = landscape.gradients(here, steepness * x, y, [here.weight])
        found = landscape.along(here, steepness * x, y, start, (0.1, 1.0))
        assert found.departure < 1e-4
        assert found.gradient < 1e-6


def test_a_gradient_that_is_zero_has_no_change_and_no_line():
    zero, one = torch.zeros(3), torch.ones(3)
    assert landscape.change([zero], [one]) is None
    assert landscape.change([one], [zero]) == pytest.approx(1)
    here = nn.Linear(1, 2, bias=False)
    x, y = torch.zeros(1, 1), torch.tensor([1])
    start = landscape.gradients(here, x, y, [here.weight])
    assert landscape.along(here, x, y, start, (1.0,)) == landscape.Line(None, None, None)


def test_inputs_are_what_the_layers_after_the_first_receive():
    here = net(BatchNorm)
    x, _ = batch()
    first, second = landscape.inputs(here, x)
    with torch.no_grad():
        np.testing.assert_array_equal(first, here[:3](x).numpy())
        np.testing.assert_array_equal(second, here[:6](x).numpy())
    assert [len(part) for part in landscape.layers(here)] == [3, 3, 2]


def test_held_statistics_are_those_of_other_rows_and_the_parameters_the_networks_own():
    here = net(BatchNorm)
    x, _ = batch()
    other = 3 * batch()[0][:8] + 1
    held = landscape.statistics(here, other)
    z, expected = x, []
    with torch.no_grad():
        for parameter in here.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=training.generator(4)))
        for linear, norm, (mean, variance) in zip(
            (here[0], here[3]), (here[1], here[4]), held, strict=True
        ):
            z = (linear(z) - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias
            z = z.relu()
            expected.append(z.numpy())
    found = landscape.inputs(here, x, held)
    for a, b, free in zip(found, expected, landscape.inputs(here, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert np.abs(a - free).max() > 0.1
    twin = net(BatchNorm)
    with torch.no_grad():
        first = twin[0](other)
        second = twin[3](twin[:3](other))
    for (mean, variance), z in zip(held, (first, second), strict=True):
        np.testing.assert_allclose(mean, z.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance, z.var(0, correction=0), rtol=1e-5, atol=1e-6)


def test_noise_is_one_within_a_step_and_another_in_the_next():
    noise, other = landscape.Noise(3, 1), landscape.Noise(3, 2)
    x = torch.zeros(4000, 50)
    shifts = noise(x)
    assert torch.equal(noise(x), shifts)
    assert not torch.equal(other(x), shifts)
    means = shifts.mean(0)
    assert 0.4 < float(means.abs().max()) < 0.51, "units have shifts of their own, within ±0.5"
    assert float((shifts - means).abs().max()) == pytest.approx(0.1, abs=0.01)
    large = torch.full((4000, 50), 1e4)
    scales = noise(large) / 1e4
    assert 0.99 < float(scales.mean(0).min()) < 1.03
    assert 1.22 < float(scales.mean(0).max()) < 1.26
    assert float(scales.std(0).mean()) == pytest.approx(0.1, abs=0.005)
    noise.step = 1
    assert float((noise(x).mean(0) - means).abs().mean()) > 0.2
    assert "within ±0.5 and a new scale in 1…1.25" in landscape.NOISE
    assert "within ±0.1 and a scale with deviation 0.1 of its own" in landscape.NOISE
