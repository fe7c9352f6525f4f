"""BN2xx: how layers are set up and used; and that the remedies help."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm, Moments, bank, diagnose, freeze, unfreeze
from batchnorm.tools.diagnosis.configuration import (
    check_calls,
    check_double_counting,
    check_dropout,
    check_modes,
    check_momentum,
    check_weight_decay,
)
from batchnorm.tools.diagnosis.trace import Origin
from batchnorm.tools.layers import every_batch_norm


def codes(findings):
    return [(finding.code, finding.layer) for finding in findings]


# --- momentum ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("momentum", "words"),
    [
        (0.0, "never move"),
        (1.0, "the last batch's"),
        (0.99, "hold about 1.0 batches"),
        (0.5, "hold about 3.0 batches"),
        (0.49, None),
        (0.1, None),
        (None, None),
    ],
)
def test_momentum(momentum, words):
    for layer in (nn.BatchNorm1d(3, momentum=momentum), BatchNorm(3, momentum=momentum)):
        found = check_momentum("norm", layer)
        if words is None:
            assert found == []
            continue
        (finding,) = found
        assert (finding.code, finding.severity, finding.layer) == ("BN201", "warning", "norm")
        assert words in finding.message
        assert finding.evidence == {"momentum": momentum}
        freeze(layer)
        assert check_momentum("norm", layer) == []
        without = nn.BatchNorm1d(3, momentum=momentum, track_running_stats=False)
        assert check_momentum("norm", without) == []


# --- dropout -------------------------------------------------------------------------------------


def test_dropout_only_where_it_changes_the_variance():
    origin = Origin("linear", None, 0.5)
    for shift in (None, math.log(1.2), -1.0, math.nan):
        assert check_dropout("norm", origin, shift) == []
    assert check_dropout("norm", None, 1.0) == check_dropout("norm", Origin("linear"), 1.0) == []
    (finding,) = check_dropout("norm", origin, math.log(1.5))
    assert (finding.code, finding.severity) == ("BN203", "warning")
    assert finding.evidence == pytest.approx({"p": 0.5, "var_ratio": 1.5})
    assert "dropout of 0.5 right before (through linear)" in finding.message


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5])
def test_dropout_in_numbers(p):
    """Of values with mean μ and variance 1: (1 + p μ²) / (1 − p) times the variance."""
    model = nn.Sequential(nn.Dropout(p), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2))
    batches = [torch.randn(500, 4) + 1 for _ in range(8)]
    with torch.no_grad():
        for x in batches:
            model(x)
    ratio = (1 + p) / (1 - p)
    found = [f for f in diagnose(model, batches).findings if f.code == "BN203"]
    assert len(found) == (ratio > 1.23)
    assert all(f.evidence["var_ratio"] == pytest.approx(ratio, rel=0.05) for f in found)
    # The remedy.
    moved = nn.Sequential(model[1], model[0], model[2])
    assert "BN203" not in [f.code for f in diagnose(moved, batches).findings]


# --- weight decay --------------------------------------------------------------------------------


def test_weight_decay():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), BatchNorm(3), nn.BatchNorm1d(3))
    named = every_batch_norm(model)
    assert check_weight_decay(named, None) == []
    for decay, optimizer in (
        (0.1, torch.optim.SGD),
        (0, torch.optim.Adam),
        (0.01, torch.optim.AdamW),
    ):
        found = check_weight_decay(named, optimizer(model.parameters(), 0.1, weight_decay=decay))
        assert codes(found) == ([("BN204", n) for n in "123"] if decay else [])
        for finding in found:
            assert finding.evidence == {"weight_decay": decay, "on": ["γ", "β"]}
    freeze(model[1:2])
    some = [
        {
            "params": [*model[0].parameters(), *model[1].parameters(), model[2].bias],
            "weight_decay": 0.2,
        },
        {"params": [model[2].weight, *model[3].parameters()]},
    ]
    (finding,) = check_weight_decay(named, torch.optim.SGD(some, 0.1))
    assert (finding.layer, finding.evidence) == ("2", {"weight_decay": 0.2, "on": ["β"]})
    # The remedy: γ and β in a group without.
    unfreeze(model[1:2])
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0},
    ]
    assert check_weight_decay(named, torch.optim.SGD(groups, 0.1, weight_decay=0.1)) == []


def test_weight_decay_on_a_bank_of_its_own():
    model = nn.Sequential(BatchNorm(3))
    bank(model, "other", affine=True)
    own = torch.optim.SGD([{"params": model[0].banks.parameters()}], 0.1, weight_decay=0.1)
    assert codes(check_weight_decay(every_batch_norm(model), own)) == [("BN204", "0")]


# --- modes ---------------------------------------------------------------------------------------


def two():
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), BatchNorm(3))


def test_frozen_and_unfrozen_mixed():
    for how in (
        lambda m: m[0].eval(),
        lambda m: freeze(m[:1]),
        lambda m: freeze(m[:1]) or m.eval(),
    ):
        model = two()
        how(model)
        (finding,) = check_modes(model, every_batch_norm(model))
        assert (finding.code, finding.severity, finding.layer) == ("BN205", "info", "")
        assert finding.evidence == {"frozen": ["0"], "training": ["2"]}
    for how in (lambda m: m, lambda m: m.eval(), freeze, lambda m: (m[0].eval(), m[2].eval())):
        model = two()
        how(model)
        assert check_modes(model, every_batch_norm(model)) == []
    # The remedies.
    model = two()
    freeze(model[:1])
    for remedy in (freeze, unfreeze):
        remedy(model)
        assert check_modes(model.train(), every_batch_norm(model)) == []


def test_a_layer_left_in_training():
    model = two().eval()
    model[2].train()
    (finding,) = check_modes(model, every_batch_norm(model))
    assert (finding.code, finding.severity, finding.layer) == ("BN207", "error", "")
    assert finding.evidence == {"layers": ["2"]}
    assert "1 of 2 layers are in training (2)" in finding.message
    freeze(model[2:])  # which makes that harmless
    assert codes(check_modes(model, every_batch_norm(model))) == [("BN205", "")]
    assert check_modes(model.eval(), every_batch_norm(model[2:])) == []
    many = nn.Sequential(*(nn.BatchNorm1d(3).train() for _ in range(5)))
    many.training = False
    assert "(0, 1, 2, …)" in check_modes(many, every_batch_norm(many))[0].message


# --- several calls -------------------------------------------------------------------------------


def calls(*kinds, number=6, size=16, channels=40):
    """Moments of calls with (mean, standard deviation) each, over batches."""
    return [
        [Moments.of(mean + std * torch.randn(size, channels)) for mean, std in kinds]
        for _ in range(number)
    ]


def test_calls_of_other_data():
    layer = nn.BatchNorm1d(40)
    assert check_calls("norm", layer, calls((0, 1)), 16) == []
    (finding,) = check_calls("norm", layer, calls((0, 1), (4, 1), number=50), 16)
    assert (finding.code, finding.severity, finding.layer) == ("BN206", "warning", "norm")
    evidence = finding.evidence
    # Means 2 from the common one, variance of the mixture 1 + 4.
    assert evidence["calls"] == 2
    assert evidence["mean_apart"] == pytest.approx(2 / math.sqrt(5), rel=0.05)
    assert evidence["var_apart"] == pytest.approx(math.log(5), rel=0.1)
    assert evidence["mean_apart_by_chance"] == pytest.approx(1 / math.sqrt(16 * 50), rel=0.1)
    (finding,) = check_calls("norm", layer, calls((0, 1), (0, 4), (0, 1), number=50), 16)
    assert finding.evidence["calls"] == 3
    assert finding.evidence["mean_apart"] < 0.1
    assert finding.evidence["var_apart"] == pytest.approx(math.log(6), rel=0.1)


@pytest.mark.parametrize("number", [1, 2, 6])
@pytest.mark.parametrize("size", [2, 4, 16])
def test_calls_of_the_same_kind(number, size):
    """Few values differ much by chance."""
    layer = nn.BatchNorm1d(40)
    for _ in range(20):
        assert (
            check_calls("norm", layer, calls((3, 2), (3, 2), number=number, size=size), size) == []
        )


def test_calls_that_do_not_come_in_each_batch_or_are_not_finite():
    layer = nn.BatchNorm1d(40)
    some = [
        batch[:1] if k % 2 else batch for k, batch in enumerate(calls((0, 1), (4, 1), number=20))
    ]
    assert [f.code for f in check_calls("norm", layer, some, 16)] == ["BN206"]
    assert check_calls("norm", layer, [[], []], 16) == []
    assert check_calls("norm", layer, [], 16) == []
    assert check_calls("norm", layer, calls((0, 1), (math.inf, 1)), 16) == []
    assert check_calls("norm", layer, calls((0, 0), (0, 0)), 16) == []


def test_a_bank_for_each_place_repairs_it():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm(4, momentum=None)

        def forward(self, x, other=None):
            y = self.norm(x)
            if other is None:
                return torch.cat([y, self.norm(5 * x + 3)], 1)
            with other:
                return torch.cat([y, self.norm(5 * x + 3)], 1)

    batches = [torch.randn(64, 4) for _ in range(6)]
    model = Two()
    for x in batches:
        model(x)
    shared = diagnose(model, batches)
    assert codes(shared.findings) == [("BN206", "norm")]
    model = Two()
    other = bank(model, "other")
    for x in batches:
        model(x, other)
    banked = diagnose(model, batches, step=lambda model, x: model(x, other))
    assert banked.findings == ()
    assert banked.gap.value < shared.gap.value / 3
    assert banked.notes[0].startswith("calls with a bank of statistics (")

    def only_the_bank(model, x):
        with other:
            return model.norm(5 * x + 3)

    assert diagnose(model, batches, step=only_the_bank).findings == ()


# --- double counting -----------------------------------------------------------------------------


def test_double_counting_in_words():
    assert check_double_counting("norm", 2, 2) == check_double_counting("norm", 2, 1) == []
    (finding,) = check_double_counting("norm", 1, 2)
    assert (finding.code, finding.severity, finding.layer) == ("BN108", "warning", "norm")
    assert finding.evidence == {"calls": 1, "counted": 2}
    assert "a training step with 1 forward call was counted 2 times" in finding.message
    assert "1 − (1 − m)^(1/2)" in finding.remedy
    assert "1 − (1 − m)^(1/1.5)" in check_double_counting("norm", 2, 3)[0].remedy


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm])
@pytest.mark.parametrize("times", [0, 1, 2])
def test_double_counting_by_checkpointing(reentrant, norm, times):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(4, 4, bias=False), norm(4, momentum=None)

        def forward(self, x):
            x = self.first(x)
            for _ in range(times):
                x = (
                    checkpoint(self.norm, x, use_reentrant=reentrant)
                    if self.training
                    else self.norm(x)
                )
            return self.norm(x) if times == 0 else x

    model, batches = Net(), [torch.randn(64, 4) for _ in range(4)]
    for x in batches:
        model(x)
    found = [f for f in diagnose(model, batches).findings if f.code == "BN108"]
    if norm is BatchNorm or times == 0:  # the remedy
        assert found == []
    else:
        assert [f.evidence for f in found] == [{"calls": times, "counted": 2 * times}]


def test_the_remedy_for_double_counting_in_numbers():
    """With momentum 1 − (1 − m)^(1/2), twice the same batch is once."""
    x, m = torch.randn(64, 4), 0.1
    twice, once = nn.BatchNorm1d(4, momentum=1 - (1 - m) ** 0.5), nn.BatchNorm1d(4, momentum=m)
    twice(x), twice(x), once(x)
    assert torch.allclose(twice.running_var, once.running_var)
    assert torch.allclose(twice.running_mean, once.running_mean)
