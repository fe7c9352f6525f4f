"""diagnose: what it asks for, whatever it is given to run, and the headline it gives."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import ArgumentError, BatchNorm, InputError, diagnose, freeze
from oracle import wide
from settled import data, net, settled

BATCHES, SIZE = 4, 32


def codes(diagnosis):
    return [(finding.code, finding.layer) for finding in diagnosis.findings]


# --- what it asks for ----------------------------------------------------------------------------


def test_refusals_say_what_to_do():
    model, batches = net(), data(6)
    for wrong, words in (
        (lambda: diagnose(nn.Linear(6, 3), batches), "with batch norm layers.*Linear with none"),
        (lambda: diagnose("model", batches), "expected a torch.nn.Module, got str"),
        (lambda: diagnose(model, batches[0]), "got one Tensor; put it in a list"),
        (lambda: diagnose(model, {"x": batches[0]}), "got one dict; put it in a list"),
        (
            lambda: diagnose(model, [batches[0], torch.zeros(len(batches[0]))]),
            "looks like one: tensors of shapes.*put it in a list",
        ),
        (
            lambda: diagnose(model, (batches[0], torch.zeros(len(batches[0]), 1).long())),
            "looks like one",
        ),
        (lambda: diagnose(model, batches, optimizer=(0.1,)), "an optimizer, got tuple"),
        (
            lambda: diagnose(model, batches, optimizer=torch.optim.SGD(net().parameters(), 0.1)),
            "none of the model's parameters",
        ),
        (lambda: diagnose(torch.jit.script(model), batches), "torch.jit has compiled"),
        (lambda: diagnose(model, batches, step=3), "step to be a function.*got 3"),
        (lambda: diagnose(model, batches, max_batches=0), "max_batches of at least 1, got 0"),
        (lambda: diagnose(model, batches, ignore=["BN999"]), "codes of findings.*BN999"),
        (lambda: diagnose(model, batches, ignore="BN105"), "codes of findings.*'BN105'"),
    ):
        with pytest.raises(ArgumentError, match=words):
            wrong()
    with pytest.raises(InputError, match="at least one batch, got none"):
        diagnose(model, iter([]))
    lazy = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(ArgumentError, match="got the lazy LazyBatchNorm1d at '0': run the model"):
        diagnose(lazy, batches)


def test_lazy_layers_that_have_run_are_diagnosed():
    model = settled(nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(6, 2)), data(6))
    assert diagnose(model, data(6)).layers[0].kind == "BatchNorm1d"


def test_outputs_that_cannot_be_compared_are_refused():
    class Labels(nn.Sequential):
        def forward(self, x):
            return super().forward(x).argmax(1)

    class Cut(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return y[y[:, 0] > 0]

    batches = data(6)
    with pytest.raises(
        InputError, match=r"floating tensors, got a tensor of torch\.int64; pass step="
    ):
        diagnose(Labels(*net()), batches)
    with pytest.raises(InputError, match=r"outputs of the same shapes.*pass step="):
        diagnose(Cut(*net()), batches)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm])
def test_batches_of_one_value_are_left_out_and_named(norm):
    batches = data(6)
    model = settled(net(norm), batches)
    whole = diagnose(model, batches)
    with_one = diagnose(model, [batches[0], batches[1][:1], *batches[1:], batches[0][:1]])
    assert with_one.gap == whole.gap
    assert with_one.layers == whole.layers
    (note,) = set(with_one.notes) - set(whole.notes)
    assert note.startswith("2 of 6 batches were left out: layer '1' gets one value per channel")
    with pytest.raises(InputError, match="got 4 with one value per channel for layer '1'"):
        diagnose(model, [batch[:1] for batch in batches])
    freeze(model)  # then one value is as good as any number
    assert diagnose(model, [batch[:1] for batch in batches]).gap.value == 0


def test_no_more_batches_are_taken_than_asked_for():
    left = iter(data(6, number=9))
    assert diagnose(net(), left, max_batches=3).gap.batches == 3
    assert len(list(left)) == 6


def test_ignored_codes_are_left_out():
    found = codes(diagnose(net(), data(6)))
    assert found == [("BN105", "1")]
    assert diagnose(net(), data(6), ignore=("BN105",)).findings == ()


# --- whatever it is given ------------------------------------------------------------------------


class Scaled(nn.BatchNorm2d):
    """A subclass that goes its own way to F.batch_norm and has an activation, as timm's has."""

    def forward(self, x):
        by_batch = self.training or not self.track_running_stats
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        keeps = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if keeps else (None, None)
        y = nn.functional.batch_norm(
            x, mean, var, self.weight, self.bias, by_batch, self.momentum, self.eps
        )
        return y.relu()


class Frozen2dBatchNorm(nn.Module):
    """Of a class that shares nothing with torch's, as torchvision's frozen one."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0.1), ("running_var", 2)):
            self.register_buffer(name, torch.full((channels,), float(value)))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


KINDS = [nn.BatchNorm2d, BatchNorm, nn.SyncBatchNorm, Scaled, Frozen2dBatchNorm]


@pytest.mark.parametrize("norm", KINDS)
def test_every_class_of_layer(norm):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Flatten())
    batches = data(3, 8, 8)
    settled(model, batches)
    diagnosis = diagnose(model, batches)
    (layer,) = diagnosis.layers
    assert (layer.name, layer.kind, layer.channels, layer.calls) == ("1", norm.__name__, 8, 1)
    assert layer.values == SIZE * 36
    if norm is Frozen2dBatchNorm:
        assert (diagnosis.gap.value, layer.gap, layer.updates, layer.momentum) == (0,) + (None,) * 3
        return
    assert (layer.updates, layer.momentum) == (60, 0.1)
    assert diagnosis.findings == ()
    assert 0 < diagnosis.gap.value < 0.1
    # The one layer there is makes all of the gap, over the batches for which that is measured.
    first = diagnose(model, batches[:2])
    assert first.layers[0].gap == pytest.approx(first.gap.value, rel=1e-12)
    assert first.layers[0].share == 1
    with torch.no_grad():
        model[1].running_mean += 2
    assert ("BN101", "1") in codes(diagnose(model, batches))


@dataclass
class Output:
    scores: torch.Tensor
    label: str
    more: list


def test_inputs_and_outputs_of_all_kinds():
    batches = data(6)
    model = settled(net(), batches)
    plain = diagnose(model, batches).gap

    class Nested(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.net, self.how = model, how

        def forward(self, x, extra=None):
            return self.how(self.net(x))

    for how in (
        lambda y: {"scores": y, "index": y.argmax(1)},
        lambda y: (y, [None, {"again": y}]),
        lambda y: Output(y, "scores", [y.long()]),
    ):
        assert diagnose(Nested(how), batches).gap.value == pytest.approx(plain.value, rel=1e-12)
    named = Nested(lambda y: y)
    for given, options in (
        ([(x, None) for x in batches], {}),
        ([{"x": x, "extra": 3} for x in batches], {}),
        ([("id", x) for x in batches], {"step": lambda model, batch: model(batch[1])}),
        ((x for x in batches), {}),
    ):
        assert diagnose(named, given, **options).gap == plain


def test_a_loss_is_its_own_measure():
    batches = data(6)
    model = settled(net(), batches, 3)

    def loss(model, x):
        return model(x).square().mean()

    gap = diagnose(model, batches, step=loss).gap
    with torch.no_grad():
        trained, evaluated = [], []
        for x in batches:
            y = nn.functional.batch_norm(
                model[0](x), None, None, model[1].weight, model[1].bias, True
            )
            trained.append(float(model[3](y.relu()).square().mean()))
            evaluated.append(float(loss(model.eval(), x)))
    shares = ((np.array(trained) - evaluated) / trained) ** 2
    assert gap.value == pytest.approx(math.sqrt(shares.mean()), rel=1e-5)


def test_a_compiled_model_and_one_that_shares_a_layer():
    batches = data(6)
    model = settled(net(), batches)
    plain = diagnose(model, batches)
    compiled = torch.compile(model, backend="eager")
    compiled(batches[0])
    settled(model, batches)
    assert diagnose(compiled, batches).layers[0].name == "_orig_mod.1"
    assert diagnose(compiled, batches).gap.value == pytest.approx(plain.gap.value, rel=0.2)
    shared = nn.Sequential(model, model)
    (layer,) = diagnose(shared, batches, step=lambda m, x: m[1](x) + m[0](x)).layers
    assert (layer.name, layer.calls, layer.values) == ("0.1", 2, SIZE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    batches = data(6)
    model = settled(net(BatchNorm), batches)
    expected = diagnose(model, batches).gap.value
    found = diagnose(model.to(dtype), [x.to(dtype) for x in batches])
    assert found.findings == ()
    assert found.gap.value == pytest.approx(expected, rel=0.2 if dtype.itemsize == 2 else 1e-5)
    half = diagnose(settled(net(), batches).to(dtype), [x.to(dtype) for x in batches])
    assert codes(half) == ([("BN106", "1")] if dtype.itemsize == 2 else [])


def test_a_model_that_cannot_be_trained_is_diagnosed_with_a_note():
    class Inference(nn.Sequential):
        @torch.inference_mode()
        def forward(self, x):
            return super().forward(x)

    batches = data(6)
    diagnosis = diagnose(Inference(*settled(net(), batches)), batches)
    assert diagnosis.findings == ()
    (note,) = diagnosis.notes
    assert note.startswith("double counting by activation checkpointing was not looked for")

    class WantsTargets(nn.Sequential):
        def forward(self, x):
            if self.training:
                raise ValueError("targets")
            return super().forward(x)

    diagnosis = diagnose(WantsTargets(*settled(net(), batches), nn.Dropout(0.5)), batches)
    assert diagnosis.findings == ()
    assert "failed with ValueError: targets" in diagnosis.notes[0]


def test_a_layer_without_anything_that_nothing_reaches():
    model = net()
    model.spare = nn.BatchNorm1d(5, affine=False, track_running_stats=False)
    batches = data(6)
    diagnosis = diagnose(model, batches, step=lambda m, x: m[3](m[2](m[1](m[0](x)))))
    spare = diagnosis.layers[1]
    assert (spare.name, spare.channels, spare.calls, spare.values) == ("spare", 5, 0, None)
    assert ("BN208", "spare") in codes(diagnosis)


def test_reports_are_json():
    for norm in (nn.BatchNorm1d, BatchNorm):
        diagnosis = diagnose(net(norm), data(6))
        assert json.loads(json.dumps(diagnosis.to_dict()))["findings"][0]["code"] == "BN105"
    assert diagnosis.worst() == "error"


# --- the numbers ---------------------------------------------------------------------------------


def test_drift_and_gap_against_numpy():
    batches = data(6, number=5)
    model = settled(net().double(), [x.double() for x in batches], 7)
    batches = [x.double() * 1.5 + 0.3 for x in batches]
    diagnosis = diagnose(model, batches)
    w = wide(model[0].weight)
    head, b = wide(model[3].weight), wide(model[3].bias)
    mean, var = wide(model[1].running_mean), wide(model[1].running_var)
    inputs = [wide(x) @ w.T for x in batches]

    def rest(z, m, v):
        return np.maximum((z - m) / np.sqrt(v + 1e-5), 0) @ head.T + b

    shares = []
    for z in inputs:
        trained, evaluated = rest(z, z.mean(0), z.var(0)), rest(z, mean, var)
        spread = ((trained - trained.mean(0)) ** 2).mean()
        shares.append(float(((trained - evaluated) ** 2).mean() / spread))
    gap, shares = diagnosis.gap, np.array(shares)
    assert gap.value == pytest.approx(math.sqrt(shares.mean()), rel=1e-9)
    without = np.array([math.sqrt(np.delete(shares, k).mean()) for k in range(5)])
    error = math.sqrt(4 / 5 * ((without - without.mean()) ** 2).sum())
    assert gap.error == pytest.approx(error, rel=1e-9)
    everything = np.concatenate(inputs)
    m, v = everything.mean(0), everything.var(0, ddof=1)
    exact = [
        ((rest(z, z.mean(0), z.var(0)) - rest(z, m, v)) ** 2).mean()
        / ((t := rest(z, z.mean(0), z.var(0))) - t.mean(0)).__pow__(2).mean()
        for z in inputs
    ]
    assert gap.recalibrated == pytest.approx(math.sqrt(np.mean(exact)), rel=1e-9)
    (layer,) = diagnosis.layers
    far, wider = (mean - m) / np.sqrt(v + 1e-5), np.log((var + 1e-5) / (v + 1e-5))
    assert layer.mean_drift == pytest.approx(math.sqrt((far**2).mean()), rel=1e-9)
    assert layer.var_drift == pytest.approx(math.sqrt((wider**2).mean()), rel=1e-9)
