"""diagnose leaves a model as it found it, to the bit, whatever happens; and what it costs."""

import gc
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm, BatchNormError, diagnose, freeze


class Net(nn.Module):
    """All that could be left changed: several kinds of layers, modes, dropout, own buffers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.torchs = nn.BatchNorm1d(8)
        self.ours = BatchNorm(8, momentum=None)
        self.frozen = nn.BatchNorm1d(8, momentum=0.3)
        self.still = BatchNorm(8)
        self.without = nn.BatchNorm1d(8, track_running_stats=False)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(8, 3)
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("cache", None)
        freeze(self.frozen)
        self.still.eval()

    def forward(self, x):
        self.passes = self.passes + 1  # another object
        self.cache = x.sum()
        x = checkpoint(self.torchs, self.first(x), use_reentrant=False)
        x = self.drop(self.frozen(self.ours(x)).relu()) + torch.randn(())
        random.random()
        np.random.rand()
        return self.last(self.without(self.still(x)))


def snapshot(model):
    """All there is to see of a model, and of the random number generators."""
    modules = []
    for module in model.modules():
        plain = {
            key: value
            for key, value in module.__dict__.items()
            if isinstance(value, (bool, int, float, str, type(None)))
        }
        hooks = [
            (key, list(value))
            for key, value in module.__dict__.items()
            if key.endswith(("_hooks", "_always_called"))
        ]
        buffers = [
            (name, id(buffer), None if buffer is None else buffer.tolist())
            for name, buffer in module._buffers.items()
        ]
        parameters = [
            (
                name,
                id(p),
                id(p.grad),
                p.requires_grad,
                p.tolist(),
                p.grad is not None and p.grad.tolist(),
            )
            for name, p in module._parameters.items()
            if p is not None
        ]
        modules.append((id(module), plain, hooks, buffers, parameters))
    numpys = np.random.get_state()
    states = (
        torch.random.get_rng_state().tolist(),
        random.getstate(),
        numpys[1].tolist(),
        numpys[2],
    )
    return modules, states, torch.is_grad_enabled()


def trained():
    model = Net()
    for _ in range(3):
        model(torch.randn(16, 6)).square().sum().backward()
    model.last.weight.grad = None
    model.drop.eval()
    return model


@pytest.mark.parametrize("training", [True, False])
def test_everything_is_as_it_was(training):
    model = trained()
    if not training:
        model.eval()
        model.ours.train()
    batches = [torch.randn(16, 6) for _ in range(3)]
    before = snapshot(model)
    diagnosis = diagnose(model, batches, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    assert diagnosis.layers[0].gap is not None  # all passes were made
    assert snapshot(model) == before


def loader(batches, stop):
    """Draws random numbers, as samplers do, and fails."""
    for index, batch in enumerate(batches):
        torch.rand(3)
        random.random()
        np.random.rand()
        if index == stop:
            raise OSError("disk")
        yield batch


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_also_when_the_loader_fails(stop):
    model = trained()
    before = snapshot(model)
    with pytest.raises(OSError, match="disk"):
        diagnose(model, loader([torch.randn(16, 6) for _ in range(3)], stop))
    # The loader's own batches were drawn in this test, before it ran.
    assert snapshot(model)[0] == before[0]
    assert snapshot(model)[2] is before[2]


@pytest.mark.parametrize("generator", ["torch", "random", "numpy"])
def test_random_numbers_of_the_loader_are_given_back(generator):
    draw = {
        "torch": lambda: torch.rand(()).item(),
        "random": random.random,
        "numpy": np.random.rand,
    }[generator]
    batches = [torch.randn(16, 6) for _ in range(3)]
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = draw()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    diagnose(trained_once(), loader(batches, None))
    assert draw() == expected


def trained_once():
    state = torch.random.get_rng_state()
    model = Net()
    torch.random.set_rng_state(state)
    return model


#: As many as the model makes in all: at whichever it fails, nothing may be left behind.
PASSES = 22


@pytest.mark.parametrize("stop", range(PASSES + 1))
def test_also_when_the_model_fails_at_any_pass(stop):
    model = trained()
    batches = [torch.randn(16, 6) for _ in range(3)]
    model.drop.train()
    before = snapshot(model)
    passes = []

    def step(model, batch):
        passes.append(0)
        if len(passes) == stop + 1:
            model.torchs(model.first(batch))  # half of a pass
            raise OSError("device")
        return model(batch)

    try:
        diagnosis = diagnose(model, batches, step=step)
    except OSError:
        pass
    else:  # in training as a whole, which is not asked of every model; or there was no such pass
        failed = any("failed with OSError: device" in note for note in diagnosis.notes)
        assert failed if stop < PASSES else len(passes) == PASSES
    assert snapshot(model) == before


def test_also_when_refused():
    model = trained()
    before = snapshot(model)
    for batches in ([], [torch.randn(1, 6)], torch.randn(3, 6)):
        with pytest.raises(BatchNormError):
            diagnose(model, batches)
    with pytest.raises(BatchNormError):
        diagnose(model, [torch.randn(3, 6)], step=lambda *_: "text")
    assert snapshot(model)[0] == before[0]


# --- what it costs -------------------------------------------------------------------------------


def deep(layers, dropout=False):
    model = nn.Sequential()
    for _ in range(layers):
        model.extend([nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6)])
    return model.append(nn.Dropout(0.5)) if dropout else model


@pytest.mark.parametrize(
    ("layers", "batches", "dropout", "expected"),
    [
        # Two passes a batch, one more for the first eight, four a layer, and the rehearsal; of more
        # than 40 layers, what each does alone is left out, and one batch shows the shares.
        (5, 12, False, 2 * 12 + 8 + 4 * 5 + 1),
        (5, 3, False, 2 * 3 + 3 + 4 * 5 + 1),
        (50, 3, False, 2 * 3 + 3 + 2 * 40 + 50 + 1),
        # Dropout takes another for each batch.
        (5, 12, True, 3 * 12 + 8 + 4 * 5 + 1),
    ],
)
def test_it_takes_so_many_passes(layers, batches, dropout, expected):
    data = [torch.randn(64, 6)] * batches
    model, passes = deep(layers, dropout).train(), []
    with torch.no_grad():
        for _ in range(100):
            model[: 2 * layers](data[0])

    def step(model, batch):
        passes.append(0)
        return model(batch)

    diagnosis = diagnose(model, data, step=step)
    assert all(layer.gap is None or layer.gap < 0.5 for layer in diagnosis.layers)
    assert len(passes) == expected
    assert sum(layer.gap is not None for layer in diagnosis.layers) == min(layers, 40)
    said = [note for note in diagnosis.notes if note.startswith("what a layer alone does")]
    assert len(said) == (layers > 40)


def test_no_batch_and_no_activation_is_kept():
    model, kept = deep(3), []

    class Remembers(nn.Sequential):
        def forward(self, x):
            for module in self:
                x = module(x)
                kept.append(weakref.ref(x))
            return x

    batch = torch.randn(16, 6)
    kept.append(weakref.ref(batch))
    diagnosis = diagnose(Remembers(*model), [batch, torch.randn(16, 6)])
    del batch
    gc.collect()
    assert diagnosis.layers
    assert [reference() for reference in kept if reference() is not None] == []
