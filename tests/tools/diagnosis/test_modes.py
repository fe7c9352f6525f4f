"""Switching layers between the batch's statistics and the running ones."""

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm, freeze
from batchnorm.tools.diagnosis.modes import (
    channel_axis,
    normalizing_by,
    processes_of,
    still,
    switchable,
)
from batchnorm.tools.layers import every_batch_norm


def test_what_can_be_switched():
    assert switchable(nn.BatchNorm1d(3))
    assert switchable(BatchNorm(3).eval())
    assert not switchable(nn.Linear(3, 3))
    assert not switchable(nn.BatchNorm1d(3, track_running_stats=False))
    for norm in (nn.BatchNorm1d(3), BatchNorm(3)):
        freeze(norm)
        assert not switchable(norm)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_normalizing_by(norm, training, momentum):
    model = nn.Sequential(*(norm(3, momentum=momentum) for _ in range(2))).train(training)
    frozen, without = norm(3).train(training), norm(3, track_running_stats=False).train(training)
    freeze(frozen)
    for layer in (*model, frozen):
        layer.running_mean += 1
    x = torch.randn(9, 3) * 2
    by_batch = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    by_running = (x - 1) / (1 + 1e-5) ** 0.5
    layers = [*model, frozen, without]
    before = {k: v.clone() for k, v in nn.ModuleList(layers).state_dict().items()}
    with pytest.raises(OSError, match="within"), normalizing_by(layers, {model[0], frozen}):  # noqa: PT012
        assert torch.allclose(model[0](x), by_batch, atol=1e-5)
        assert torch.allclose(model[1](x), by_running, atol=1e-5)
        assert torch.allclose(frozen(x), by_running, atol=1e-5)
        assert torch.allclose(without(x), by_batch, atol=1e-5)
        raise OSError("within")
    assert all(torch.equal(v, before[k]) for k, v in nn.ModuleList(layers).state_dict().items())
    assert [layer.training for layer in layers] == [training] * 4
    assert [layer.track_running_stats for layer in layers] == [True, True, True, False]


def test_channel_axis():
    assert channel_axis(nn.BatchNorm2d(3), 4) == 1
    assert [channel_axis(BatchNorm(3, channel_dim=d), 4) for d in (0, 1, -1, -3)] == [0, 1, 3, 1]


def test_alone_without_processes():
    for layer in (nn.SyncBatchNorm(3), BatchNorm(3, process_group="world"), nn.Linear(3, 3)):
        assert processes_of(layer) == 1


def test_what_does_not_train():
    def named(model):
        return {name for name, layer in every_batch_norm(model) if layer in still(model, all_of)}

    for how, expected in (
        (lambda m: None, set()),
        (lambda m: m.eval(), set()),
        (freeze, {"0", "1.0", "1.1"}),
        (lambda m: (freeze(m[1]), m.eval()), {"1.0", "1.1"}),
        (lambda m: m[1].eval(), {"1.0", "1.1"}),
        (lambda m: [layer.eval() for layer in (m[0], *m[1])], {"0", "1.0", "1.1"}),
        (lambda m: m[1][0].eval(), {"1.0"}),
        # All that is within was put into evaluation, and a module made around it.
        (lambda m: (m[0].eval(), m[1].eval()), {"0", "1.0", "1.1"}),
    ):
        model = nn.Sequential(BatchNorm(3), nn.Sequential(nn.BatchNorm1d(3), BatchNorm(3)))
        how(model)
        all_of = every_batch_norm(model)
        assert named(model) == expected
    inner = nn.Sequential(BatchNorm(3), nn.BatchNorm1d(3)).eval()
    wrapper = nn.Sequential(nn.Flatten(), inner)
    assert still(wrapper, every_batch_norm(wrapper)) == set()
    wrapper.append(BatchNorm(3))  # another one trains: those in it do not
    assert still(wrapper, every_batch_norm(wrapper)) == set(inner)
    without = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False).eval())
    assert still(without, every_batch_norm(without)) == set()
