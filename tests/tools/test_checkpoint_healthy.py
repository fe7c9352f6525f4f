"""Nothing is found in checkpoints of models that are as they should be."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from batchnorm import BatchNorm, bank, freeze, inspect_checkpoint


def convolutional(layer=nn.BatchNorm2d):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        layer(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, bias=False),
        layer(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def dense(layer=BatchNorm):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 24), layer(24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(),
        layer(24), nn.Linear(24, 4),
    )  # fmt: skip


def images(size=16):
    x = torch.rand(size, 3, 8, 8)
    return x, (4 * x.mean((1, 2, 3))).long() % 4


def train(model, steps=120, rate=0.1, decay=1e-4, averaged=None):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, rate, momentum=0.9, weight_decay=decay)
    for _ in range(steps):
        x, y = images()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if averaged:
            averaged.update_parameters(model)
    return model


def fine_tuned():
    """A backbone of which the statistics were made long ago, and a head that is new."""
    model = train(convolutional())
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.num_batches_tracked += 100_000
    return train(nn.Sequential(model[:5], nn.BatchNorm2d(32), *model[5:]), 40)


def converted():
    """Weights from another library: the statistics are there, and nobody has counted."""
    model = train(convolutional())
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.num_batches_tracked.zero_()
    return model


def without_counters():
    weights = train(convolutional()).state_dict()
    return {name: value for name, value in weights.items() if "tracked" not in name}


def frozen():
    model = converted()
    freeze(model)
    return train(model, 20)


def recalibrated():
    """By torch's update_bn: few batches, averaged."""
    model = train(convolutional())
    update_bn([images()[0] for _ in range(6)], model)
    return model


def averaged():
    """With averages of the statistics, too."""
    model = dense()
    copy_ = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    train(model, averaged=copy_)
    return {"model": model.state_dict(), "ema": copy_.state_dict()}


def partly_dead():
    """ReLU before the layer, and two units that are never on."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.BatchNorm2d(16), *convolutional()[3:])
    nn.init.constant_(model[0].bias[:2], -100)
    return train(model)


def adversarial():
    """Two models that train by turns, one twice as often."""
    generator, critic = train(dense(), 60), train(dense(), 121)
    return {"G": generator.state_dict(), "D": critic.state_dict()}


def banked():
    model = dense()
    with bank(model, "other"):
        train(model)
    return train(model)


def one_called_twice_of_two():
    shared = BatchNorm(24)
    twice = nn.Sequential(nn.Linear(24, 24), shared, nn.ReLU(), nn.Linear(24, 24), shared)
    return train(nn.Sequential(dense()[:2], BatchNorm(24), *twice, nn.Linear(24, 4)))


def residual():
    """γ that began at zero, as the last of a branch does."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(nn.Linear(24, 24), BatchNorm(24), nn.ReLU())
            self.last = BatchNorm(24)
            nn.init.zeros_(self.last.weight)

        def forward(self, x):
            return x + self.last(self.branch(x))

    return train(nn.Sequential(*dense()[:2], BatchNorm(24), Block(), Block(), nn.Linear(24, 4)))


def raw_features():
    """Columns that nobody has scaled: a year, an income, a share."""
    model = nn.Sequential(BatchNorm(3), nn.Linear(3, 4))
    for _ in range(100):
        model(torch.randn(32, 3) * torch.tensor([30.0, 2e4, 0.02]) + torch.tensor([1990, 5e4, 0.1]))
    return model


HEALTHY = {
    "torch": lambda: train(convolutional()),
    "ours": lambda: train(convolutional(BatchNorm)),
    "instance": lambda: train(convolutional(partial(nn.InstanceNorm2d, track_running_stats=True))),
    "no affine": lambda: train(convolutional(lambda c: nn.BatchNorm2d(c, affine=False))),
    "momentum None": lambda: train(convolutional(lambda c: BatchNorm(c, momentum=None)), 8),
    "momentum 0.01": lambda: train(convolutional(lambda c: nn.BatchNorm2d(c, momentum=0.01)), 400),
    "weight decay": lambda: train(convolutional(), decay=0.01),
    "untracked": lambda: train(convolutional(lambda c: BatchNorm(c, track_running_stats=False))),
    "compiled": lambda: {f"_orig_mod.{k}": v for k, v in train(dense()).state_dict().items()},
    "deep copy": lambda: copy.deepcopy(train(dense())),
    "float64": lambda: train(dense()).double(),
    **{
        f.__name__: f
        for f in (
            fine_tuned, converted, without_counters, frozen, recalibrated, averaged, partly_dead,
            adversarial, banked, one_called_twice_of_two, residual, raw_features,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", HEALTHY)
def test_nothing_is_found(kind, tmp_path):
    content = HEALTHY[kind]()
    torch.save(
        content.state_dict() if isinstance(content, nn.Module) else content, tmp_path / "file"
    )
    found = inspect_checkpoint(tmp_path / "file")
    assert not found.findings
    assert bool(found.layers) == (kind != "untracked")


def test_half_precision_for_deployment_is_no_more_than_a_remark(tmp_path):
    torch.save(train(convolutional()).half().state_dict(), tmp_path / "file")
    found = inspect_checkpoint(tmp_path / "file")
    assert {(finding.code, finding.severity) for finding in found.findings} == {("BN106", "info")}


def test_units_that_are_never_on_are_no_more_than_a_remark(tmp_path):
    """Averages have their variance at zero, which running averages only come near to."""
    model = partly_dead()
    update_bn([images()[0] for _ in range(6)], model)
    assert not model[2].running_var[:2].any()
    torch.save(model.state_dict(), tmp_path / "file")
    found = inspect_checkpoint(tmp_path / "file")
    assert [(f.code, f.severity, f.layer) for f in found.findings] == [("BN104", "info", "2")]
