"""Layers that are not what their class says, numbers that cannot be folded, and tools of ours."""

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from batchnorm import BatchNorm, bank, fold, freeze
from folds import assert_same, count, randomized, reasons

WIDE = torch.float64


def keeps(change, match, *, model=None):
    """A layer that something was done to is left, and says so."""
    model = randomized(model or nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))).double()
    x = torch.randn(3, 4, dtype=WIDE)
    change(model)
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert match in reasons(folded)["1"], reasons(folded)


def test_hooks_and_parametrizations():
    keeps(lambda m: m[0].register_forward_hook(lambda *_: None), "has hooks")
    keeps(lambda m: m[1].register_forward_pre_hook(lambda *_: None), "has hooks")
    keeps(lambda m: parametrizations.weight_norm(m[0]), "parametrized")
    keeps(lambda m: parametrizations.spectral_norm(m[0]), "parametrized")
    keeps(lambda m: prune.l1_unstructured(m[0], "weight", amount=2), "has hooks")
    keeps(lambda m: prune.l1_unstructured(m[1], "weight", amount=2), "has hooks")

    # A hook on a part that the value flows into may store it.
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4)))
    randomized(model).double()[1].register_forward_pre_hook(lambda *_: None)
    folded = fold(model, torch.randn(3, 4, dtype=WIDE))
    assert "2 readers" in reasons(folded)["1.0"]


def test_layers_that_normalise_otherwise():
    keeps(lambda m: None, "by the batch in evaluation", model=nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)))  # fmt: skip

    class Doubled(nn.BatchNorm1d):
        def forward(self, x):
            return 2 * super().forward(x)

    keeps(lambda m: None, "a forward of its own", model=nn.Sequential(nn.Linear(4, 4), Doubled(4)))

    class Same(nn.BatchNorm1d):
        pass

    model = randomized(nn.Sequential(nn.Linear(4, 4), Same(4))).double()
    assert count(fold(model, torch.randn(3, 4, dtype=WIDE))) == 0

    class Standardized(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight - self.weight.mean(), self.bias)

    keeps(lambda m: None, "linear()", model=nn.Sequential(Standardized(4, 4), nn.BatchNorm1d(4)))

    class FrozenBatchNorm2d(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.ones(4))

        def forward(self, x):
            return (x - self.running_mean) * (self.weight / (self.running_var + 1e-5).sqrt())

    keeps(lambda m: None, "formula is not known", model=nn.Sequential(
        nn.Linear(4, 4), FrozenBatchNorm2d()))  # fmt: skip


def test_numbers():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    for value in (float("nan"), float("inf")):
        randomized(model).double()
        model[1].running_mean[2] = value
        folded = fold(model, torch.randn(3, 4, dtype=WIDE))
        assert "not finite" in reasons(folded)["1"]
    randomized(model)[1].running_var.fill_(-1)
    assert "negative" in reasons(fold(model, torch.randn(3, 4, dtype=WIDE)))["1"]
    x = torch.randn(3, 4, dtype=WIDE)
    for var, gamma in ((0.0, 1.0), (1e-12, 0.0), (1e12, -1.0)):
        randomized(model)
        with torch.no_grad():
            model[1].running_var.fill_(var)
            model[1].weight.fill_(gamma)
        folded = fold(model, x)
        assert count(folded) == 0
        assert_same(folded, model, x)


def test_weights_that_the_dtype_cannot_hold():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).half()
    with torch.no_grad():
        model[0].weight.fill_(1e-3), model[0].bias.zero_()
        model[1].running_var.fill_(0), model[1].weight.fill_(6e4)
        model[1].bias.zero_(), model[1].running_mean.fill_(20)
    folded = fold(model, torch.zeros(3, 4, dtype=torch.half))
    assert "overflow" in reasons(folded)["1"]


def test_frozen_layers_and_banks():
    for kind in (nn.BatchNorm1d, BatchNorm):
        model = randomized(nn.Sequential(nn.Linear(4, 4), kind(4))).double()
        freeze(model)
        x = torch.randn(3, 4, dtype=WIDE)
        folded = fold(model, x)
        assert count(folded) == 0
        assert_same(folded, model, x)
    model = nn.Sequential(nn.Linear(4, 4), BatchNorm(4), nn.ReLU(), BatchNorm(4)).double()
    fake = bank(model, "fake", affine=True)
    randomized(model)
    plain = fold(model, x)
    assert_same(plain, model, x)
    with fake:
        folded = fold(model, x)
        assert_same(folded, model, x)
    assert not torch.equal(folded(x), plain(x))
    assert count(folded) == 1  # the second, with the bank's statistics as its own
    assert not any("banks" in name for name in folded.state_dict())


def test_a_model_that_is_a_batch_norm():
    x = torch.randn(2, 3, 4, 4, dtype=WIDE)
    for model in (nn.BatchNorm2d(3), BatchNorm(3, activation="relu")):
        folded = fold(randomized(model).double(), x)
        assert_same(folded, model, x)
        assert "an argument of the model" in reasons(folded)[""]
        assert "\nthe model: not folded, because" in str(folded.fold_report)
