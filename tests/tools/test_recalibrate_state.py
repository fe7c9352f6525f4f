"""What recalibration leaves alone, gives back, refuses and tells."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import (
    ArgumentError,
    BatchNorm,
    InputError,
    NonFiniteWarning,
    Renorm,
    freeze,
    pause_statistics,
    recalibrate,
    unfreeze,
)

METHODS = pytest.mark.parametrize("method", ["batch", "layerwise"])


def network(make=BatchNorm):
    return nn.Sequential(
        nn.Linear(3, 4), make(4), nn.Dropout(0.5),
        nn.Linear(4, 4), make(4), nn.Linear(4, 4), make(4),
    )  # fmt: skip


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(
        torch.allclose(value, before[name], rtol=0, atol=0, equal_nan=True)
        for name, value in model.state_dict().items()
    )


def everything(model):
    """Besides the state dict: modes, attributes, hooks, gradients, generators."""
    return [
        [module.training for module in model.modules()],
        [
            (layer.momentum, layer.track_running_stats, id(layer._buffers["running_mean"]))
            for layer in model.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        ],
        [
            (dict(module._forward_hooks), dict(module._forward_pre_hooks))
            for module in model.modules()
        ],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    ]


def trained(make=BatchNorm):
    """With gradients, other statistics than at first, a hook, and modes that differ."""
    model = network(make)
    model(torch.randn(8, 3)).square().mean().backward()
    model[3].register_forward_hook(lambda *_: None)
    model[0].eval()
    return model


@METHODS
@pytest.mark.parametrize("make", [BatchNorm, nn.BatchNorm1d])
def test_all_but_the_statistics_is_as_it_was(method, make):
    model, batches = trained(make), torch.randn(12, 3).split(4)
    before, rest = state(model), everything(model)
    recalibrate(model, batches, method=method)
    assert everything(model) == rest
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{layer}.{name}" for layer in (1, 4, 6) for name in statistics}


class LoaderError(Exception):
    pass


def broken(batches, error):
    class Loader:
        def __init__(self):
            self.rounds = 0

        def __iter__(self):
            self.rounds += 1
            yield from batches
            if self.rounds == rounds_until_broken:
                raise error

    rounds_until_broken = 1
    return Loader()


@METHODS
@pytest.mark.parametrize("make", [BatchNorm, nn.BatchNorm1d])
@pytest.mark.parametrize("error", [LoaderError(), KeyboardInterrupt()])
def test_an_exception_leaves_all_as_it_was(method, make, error):
    model, batches = trained(make), broken(torch.randn(12, 3).split(4), error)
    before, rest = state(model), everything(model)
    with pytest.raises(type(error)):
        recalibrate(model, batches, method=method)
    assert everything(model) == rest
    assert unchanged(model, before)


def test_an_exception_in_a_late_pass_leaves_all_as_it_was():
    model, calls, batches = trained(), [], torch.randn(12, 3).split(4)
    before, rest = state(model), everything(model)

    def step(model, batch):
        calls.append(batch)
        if len(calls) == 8:
            raise LoaderError
        return model(batch)

    with pytest.raises(LoaderError):
        recalibrate(model, batches, method="layerwise", step=step)
    assert everything(model) == rest
    assert unchanged(model, before)


@METHODS
@pytest.mark.parametrize("make", [BatchNorm, nn.BatchNorm1d])
@pytest.mark.parametrize("who", ["step", "forward"])
def test_train_within_a_pass_is_refused(method, make, who):
    """Such a layer does not normalise by what recalibration put there, and the next are wrong."""
    model, batches = trained(make), torch.randn(12, 3).split(4)
    if who == "forward":
        model[3].register_forward_hook(lambda *_: model[4].train() and None)
    before, rest = state(model), everything(model)

    def step(model, batch):
        return (model.train() if who == "step" else model)(batch)

    name = "1" if who == "step" else "4"
    with pytest.raises(InputError, match=f"layer '{name}', .*: expected a layer in evaluation, as"):
        recalibrate(model, batches, method=method, step=step)
    assert everything(model) == rest
    assert unchanged(model, before)


@METHODS
def test_a_warning_that_is_an_error_leaves_all_as_it_was(method):
    model = trained()
    before = state(model)
    batches = [torch.randn(4, 3), torch.full((4, 3), torch.nan)]
    warnings.simplefilter("error")  # pytest undoes it
    with pytest.raises(NonFiniteWarning):
        recalibrate(model, batches, method=method)
    assert unchanged(model, before)


@METHODS
@pytest.mark.parametrize("make", [BatchNorm, nn.BatchNorm1d])
def test_frozen_layers_stay_and_normalise_as_they_do(method, make):
    model, x = network(make), 5 + torch.randn(12, 3)
    freeze(model[4])
    before = state(model[4])
    report = recalibrate(model, x.split(6), method=method)
    assert report.left == {"4": "frozen"}
    assert [layer.name for layer in report.layers] == ["1", "6"]
    assert unchanged(model[4], before)
    hidden = [part.detach() for part in x.split(6)]
    if method == "layerwise":
        hidden = [model[:6].eval()(x)]
    else:
        first = nn.Sequential(model[0], nn.BatchNorm1d(4, track_running_stats=False))
        hidden = [model[3:6].eval()(first(part)) for part in hidden]
    torch.testing.assert_close(model[6].running_mean, torch.cat(hidden).mean(0))
    torch.testing.assert_close(model[6].running_var, torch.cat(hidden).var(0))
    unfreeze(model.train())
    assert recalibrate(model, x.split(6), method=method).left == {}


class FrozenBatchNorm2d(nn.Module):
    def __init__(self):
        super().__init__()
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((4,), float(value)))

    def forward(self, x):
        return x * self.weight + self.bias


class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = network(), BatchNorm(4)

    def forward(self, x):
        return self.used(x)


@METHODS
def test_what_is_left_alone_and_why(method):
    model = Unreached()
    model.used[4] = BatchNorm(4, track_running_stats=False)
    model.used.append(FrozenBatchNorm2d())
    model.used[6].eval()
    before = state(model)
    report = recalibrate(model, torch.randn(12, 3).split(6), method=method)
    assert report.left == {
        "used.4": "keeps no running statistics",
        "used.6": "in eval() while the model is in train()",
        "used.7": "of a class that never trains",
        "unused": "never reached",
    }
    assert [layer.name for layer in report.layers] == ["used.1"]
    assert unchanged(model.unused, {k[7:]: v for k, v in before.items() if k.startswith("unused.")})
    # A model that is in eval() as a whole has no such layers.
    report = recalibrate(model.eval(), torch.randn(12, 3).split(6), method=method)
    assert [layer.name for layer in report.layers] == ["used.1", "used.6"]


@pytest.mark.parametrize("make", [BatchNorm, nn.BatchNorm1d])
def test_paused_layers(make):
    model = network(make)
    with pause_statistics(model[1]):
        assert recalibrate(model, [torch.randn(12, 3)]).left == {"1": "paused"}
    assert recalibrate(model, [torch.randn(12, 3)]).left == {}


@METHODS
@pytest.mark.parametrize(
    ("momentum", "renorm", "before", "after"),
    [(0.1, None, 0, 3), (0.1, None, 50, 50), (None, None, 50, 3), (0.1, Renorm(), 6000, 6000)],
)
def test_the_counter(method, momentum, renorm, before, after):
    """With a plain average it is a weight; else nothing that goes by it is set back."""
    layer = BatchNorm(3, momentum=momentum, renorm=renorm)
    layer.num_batches_tracked.fill_(before)
    x = torch.randn(9, 3, dtype=torch.float64)
    recalibrate(layer.double(), x.split(3), method=method)
    assert layer.num_batches_tracked == after
    if momentum is None:
        more = torch.randn(3, 3, dtype=torch.float64)
        layer(more)
        torch.testing.assert_close(layer.running_mean, torch.cat([x, more]).mean(0))


def test_without_a_counter():
    layer = nn.BatchNorm1d(3)
    layer.num_batches_tracked = None
    recalibrate(layer, [torch.randn(9, 3)])
    assert layer.num_batches_tracked is None


@METHODS
@pytest.mark.parametrize("make", [BatchNorm, nn.BatchNorm1d])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_out(method, make, poison):
    """Channel 1 goes without a batch; channel 2, where no batch is sound, keeps what it had."""
    model = nn.Sequential(nn.Identity(), make(3))
    good, bad = torch.randn(2, 8, 3)
    good[3, 2] = bad[5, 1] = bad[5, 2] = poison
    model[1].running_mean.fill_(7)
    with pytest.warns(
        NonFiniteWarning,
        match=r"layer '1', BatchNorm.* in 2 of 3 channels \(1, 2\).* 1 channels had nothing else",
    ) as told:
        report = recalibrate(model, [good, bad], method=method)
    assert told[0].filename == __file__
    every = torch.cat([good, bad])
    want = torch.stack([every[:, 0].mean(), good[:, 1].mean(), torch.tensor(7.0)])
    torch.testing.assert_close(model[1].running_mean, want)
    want = torch.stack([every[:, 0].var(), good[:, 1].var(), torch.tensor(1.0)])
    torch.testing.assert_close(model[1].running_var, want)
    assert (report.layers[0].kept, report.layers[0].values) == (1, 16)


def test_a_variance_that_overflows_the_buffers_is_refused():
    layer = nn.BatchNorm1d(2).half()
    x = torch.randn(64, 2)
    x[:, 1] *= 1000  # a variance of 1e6
    with pytest.warns(NonFiniteWarning, match=r"1 of 2 channels \(1\)"):
        recalibrate(layer, [x.half()])
    assert layer.running_var[1] == 1
    assert layer.running_var[0] != 1


def test_progress_is_told_after_each_batch():
    model, batches = network(), torch.randn(12, 3).split(4)
    told = []
    recalibrate(model, batches, progress=lambda *done: told.append(done))
    assert told == [(1, 3), (2, 3), (3, 3)]
    told.clear()
    recalibrate(model, batches, method="layerwise", progress=lambda *done: told.append(done))
    assert told == [(k, 9) for k in range(1, 10)]
    told.clear()
    recalibrate(model, iter(batches), max_batches=2, progress=lambda *done: told.append(done))
    assert told == [(1, None), (2, None)]


def test_progress_knows_of_layers_that_are_not_reached():
    told = []
    batches = torch.randn(12, 3).split(6)
    recalibrate(Unreached(), batches, method="layerwise", progress=lambda *done: told.append(done))
    assert told == [(1, 8), (2, 8), (3, 6), (4, 6), (5, 6), (6, 6)]


def test_the_report_as_json():
    report = recalibrate(network(), [torch.randn(9, 3)])
    found = report.to_dict()
    assert found["layers"][2]["name"] == "6"
    assert found["layers"][2]["mean_drift"] == report.layers[2].mean_drift
    assert (found["method"], found["batches"], found["passes"]) == ("batch", 1, 1)


X = torch.randn(8, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((network(), X), {}, "expected batches, such as a DataLoader"),
        ((network(), [X]), {"method": "fvcore"}, 'method to be "batch" or "layerwise", got'),
        ((network(), [X]), {"max_batches": 0}, "max_batches to be positive or None, got 0"),
        ((network(), [X]), {"process_group": 3}, "expected process_group to be None"),
        ((network(), [X]), {"step": 3}, "expected step to be a function"),
        ((network(), [X]), {"progress": 3}, "expected progress to be a bool or a function"),
        ((network(), iter([X])), {"method": "layerwise"}, "an iterator .*; pass a DataLoader"),
        ((nn.Linear(3, 3), [X]), {}, "expected a model with batch norm layers"),
        ((nn.Sequential(nn.LazyBatchNorm1d()), [X]), {}, "got LazyBatchNorm1d at '0', which waits"),
        ((nn.Sequential(nn.LazyLinear(3), BatchNorm(3)), [X]), {}, "got LazyLinear at '0'"),
        ((BatchNorm(3, track_running_stats=False), [X]), {}, "got none: '': keeps no running stat"),
    ],
)
def test_refused_before_anything_is_run(arguments, options, words):
    with pytest.raises(ArgumentError, match=words):
        recalibrate(*arguments, **options)


@METHODS
@pytest.mark.parametrize("batches", [[], [X[:0]]])
def test_no_batches(method, batches):
    model = network()
    if batches:
        assert len(recalibrate(model, batches, method=method).left) == 3
        return
    with pytest.raises(InputError, match="expected at least one batch, got none"):
        recalibrate(model, batches, method=method)


def test_deep_copies_and_recalibration_of_an_average():
    """torch's averaged model, whose weights no batch has ever been through."""
    model = trained().train()
    average = torch.optim.swa_utils.AveragedModel(model)
    model(torch.randn(8, 3))
    average.update_parameters(model)
    x = torch.randn(12, 3)
    recalibrate(average, x.split(4), method="layerwise")
    hidden = average.module[0](x)
    torch.testing.assert_close(average.module[1].running_var, hidden.var(0))
    assert average.n_averaged == 1
    assert copy.deepcopy(average)
