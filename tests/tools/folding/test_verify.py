"""What is not the same function is refused; tolerances are what rounding explains."""

import pytest
import torch
from torch import distributed, nn

from batchnorm import ArgumentError, BatchNorm, BatchNormError, FoldError, fold
from batchnorm.tools.folding import algebra, verify
from batchnorm.tools.folding.algebra import Affine
from batchnorm.tools.folding.example import Example
from batchnorm.tools.folding.steps import Step, Work
from folds import count, randomized


def block(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("mistake", ["mean", "bias", "beta", "gamma", "eps", "axis"])
def test_every_mistake_in_the_algebra_is_noticed(mistake, fresh, monkeypatch):
    """In a new model, too, where means and β are 0 and variances and γ 1."""

    def affine(layer, weights):
        mean, var = layer.running_mean.double(), layer.running_var.double()
        gamma = torch.ones_like(mean) if mistake == "gamma" else weights.weight
        scale = gamma / (var + (1e-3 if mistake == "eps" else layer.eps)).sqrt()
        shift = torch.zeros_like(mean) if mistake == "mean" else -mean * scale
        if mistake != "beta":
            shift = shift + weights.bias
        if mistake == "axis":
            scale = scale.flip(0)
        return Affine(scale, shift)

    right = algebra.Weights.then

    def then(self, after):
        if mistake == "bias":
            self.bias = None
        return right(self, after)

    monkeypatch.setattr(algebra, "affine", affine)
    monkeypatch.setattr(algebra.Weights, "then", then)
    model, x = block(), torch.randn(2, 3, 8, 8)
    with pytest.raises(FoldError, match="expected the folded model to put out"):
        fold(model if fresh else randomized(model), x)


@pytest.mark.parametrize("hide", ["zeros", "layer scale"])
def test_a_mistake_behind_weights_that_hide_it(hide, monkeypatch):
    """The last layer of a new model is often 0; so is what scales a branch."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.scale = block(3), nn.Parameter(torch.full((3, 1, 1), 1e-13))
            if hide == "zeros":
                nn.init.zeros_(self.scale)

        def forward(self, x):
            return x[..., 1:-1, 1:-1] + self.scale * self.block(x)

    monkeypatch.setattr(
        algebra, "affine", lambda layer, w: Affine(w.weight.double(), w.bias.double())
    )
    with pytest.raises(FoldError):
        fold(Hidden(), torch.randn(2, 3, 8, 8))


def test_a_plan_that_does_not_fit_the_data():
    """Wherever it came from: a border that sees zeros; the other of two batch norms."""
    model = randomized(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)))
    example = Example((torch.randn(2, 3, 8, 8),), {})
    with pytest.raises(FoldError, match=r"output 0 in itself"):
        verify.verify(model, [Step("0", "1", after=False)], example)
    model = randomized(nn.Sequential(*(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) * 2))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    with pytest.raises(FoldError):
        verify.verify(randomized(model), [Step("1", "0", after=False)], example)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(("value", "which"), [(0.0, "noise like it"), (7.0, "the example")])
def test_an_example_that_shows_nothing_or_all_there_is(value, which, wide):
    """Zeros, the usual dummy input, and values that noise does not have."""

    class Gated(nn.Sequential):
        def forward(self, x):
            there = x.amax().sign() if value == 0 else (x == value).any().to(x)
            return super().forward(x if wide else x.float()) * there

    model = randomized(Gated(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)))
    example = Example((torch.full((2, 3, 8, 8), value),), {})
    with pytest.raises(FoldError, match=f"output 0 in itself on {which}"):
        verify.verify(model, [Step("0", "1", after=False)], example)


def test_python_code_that_needs_the_layer():
    """Nothing shows that before the folded model runs."""

    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block()

        def forward(self, x):
            return self.block(x) * self.block[1].eps

    with pytest.raises(FoldError, match="expected the folded model to run as the model does"):
        fold(Asking(), torch.randn(2, 3, 8, 8))


def test_errors_are_measured_in_the_models_own_dtype():
    for dtype, unit in ((torch.float32, 2**-23), (torch.bfloat16, 2**-7), (torch.half, 2**-10)):
        model = randomized(block(16)).to(dtype)
        report = fold(model, torch.randn(2, 3, 8, 8, dtype=dtype)).fold_report
        assert report.error64 < 1e-14
        assert 0 < report.error < 8 * unit
        assert 0 < report.original_error < 8 * unit
    report = fold(randomized(block()).double(), torch.randn(2, 3, 8, 8).double()).fold_report
    assert report.error < 1e-14


def test_rounding_is_not_much_worse_than_the_models():
    """See WORSE and UNITS for many more."""
    worst = 0.0
    for seed in range(40):
        torch.manual_seed(seed)
        width, depth = 2 ** (1 + seed % 6), 1 + seed % 8
        layers = [nn.Conv1d(3, width, 1)]
        for _ in range(depth):
            layers += [nn.Conv1d(width, width, 3), nn.BatchNorm1d(width), nn.SiLU()]
        model, x = randomized(nn.Sequential(*layers)), torch.randn(2, 3, 2 * depth + 4)
        report = fold(model, x).fold_report
        allowed = verify.WORSE * report.original_error + verify.UNITS * 2**-23
        worst = max(worst, report.error / allowed)
    assert 0 < worst < 0.5


def test_networks_that_amplify_rounding(monkeypatch):
    """Right, and far from the model: what little moves its numbers is as bad."""
    model, x = randomized(block()).double(), torch.randn(4, 3, 8, 8, dtype=torch.float64) + 1e9
    with torch.no_grad():
        y = model[0](x)
        model[1].running_mean.copy_(y.mean((0, 2, 3)))
        model[1].running_var.copy_(y.var((0, 2, 3)))
    assert verify.FLOAT64 < fold(model, x).fold_report.error64 < verify.AT_MOST
    monkeypatch.setattr(verify, "SHARE", 1e-9)
    with pytest.raises(FoldError):
        fold(model, x)


def test_means_far_from_zero():
    """Where the model itself has lost digits, the folded one may have."""
    model = randomized(block(16))
    x = torch.randn(4, 3, 8, 8) + 1e4
    with torch.no_grad():
        y = model[0](x)
        model[1].running_mean.copy_(y.mean((0, 2, 3)))
        model[1].running_var.copy_(y.var((0, 2, 3)))
    report = fold(model, x).fold_report
    assert 1e-6 < report.original_error < 1e-1
    assert report.error < 8 * report.original_error


def test_without_float64():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block()

        def forward(self, x):
            return self.block(x.float())

    model = randomized(Narrow())
    folded = fold(model, torch.randn(2, 3, 8, 8))
    assert count(folded) == 0
    report = folded.fold_report
    assert report.error64 is None
    assert 0 < report.error < 1e-5
    (note,) = report.notes
    assert "not verified in float64" in note
    assert note in str(report)

    class Narrower(Narrow):
        def forward(self, x):
            return self.block(x.half())

    with pytest.raises(FoldError, match="expected a model that can be verified"):
        fold(Narrower().half(), torch.randn(2, 3, 8, 8).half())


def test_values_that_are_not_finite_are_compared():
    class Masked(nn.Module):
        def __init__(self, wrong=False):
            super().__init__()
            self.block, self.wrong = block(), wrong

        def forward(self, x):
            y = self.block(x)
            bad = self.wrong and isinstance(self.block[1], nn.Identity)
            return {"y": y.masked_fill(y > 1, -torch.inf), "n": [(y > 2) if bad else y, 3]}

    x = torch.randn(2, 3, 8, 8)
    assert count(fold(randomized(Masked()), x)) == 0
    with pytest.raises(FoldError):
        fold(randomized(Masked(wrong=True)), x)


def test_complex_outputs(monkeypatch):
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block()

        def forward(self, x):
            return torch.fft.fft2(self.block(x)).conj()

    x = torch.randn(2, 3, 8, 8)
    assert count(fold(randomized(Spectrum()), x)) == 0
    monkeypatch.setattr(algebra, "affine", lambda layer, w: Affine(w.weight, w.bias))
    with pytest.raises(FoldError):
        fold(Spectrum(), x)


def test_random_numbers_in_evaluation():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block()

        def forward(self, x):
            y = self.block(x)
            return y + torch.randn_like(y)

    assert count(fold(randomized(Noisy()), torch.randn(2, 3, 8, 8))) == 0


@pytest.mark.parametrize("example", [
    torch.full((2, 3, 8, 8), torch.nan), torch.full((2, 3, 8, 8), torch.inf), torch.ones(0, 3, 8, 8)
])  # fmt: skip
def test_an_example_of_which_nothing_can_be_compared(example):
    """All of it NaN, or nothing at all: any copy would pass."""
    with pytest.raises(FoldError, match="expected example inputs of which the model makes finite"):
        fold(block(), example)
    hooked = block()
    hooked[0].register_forward_hook(lambda *_: None)
    assert count(fold(hooked, example)) == 1  # a plain copy


def test_what_cannot_be_folded_at_all(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ArgumentError, match="expected a model with batch norm layers"):
        fold(nn.Conv2d(3, 3, 1), x)
    with pytest.raises(ArgumentError, match=r"expected a torch.nn.Module"):
        fold(torch.relu, x)
    with pytest.raises(ArgumentError, match=r"fold model._orig_mod"):
        fold(torch.compile(block()), x)
    with pytest.raises(
        ArgumentError, match=r"expected a model with values, got none in '0.weight'"
    ):
        fold(nn.Sequential(nn.LazyConv2d(3, 1), BatchNorm(3)), x)
    with pytest.raises(ArgumentError, match="meta"):
        fold(block().to("meta"), x)
    distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(block())
        with pytest.raises(ArgumentError, match=r"DistributedDataParallel has wrapped; fold its"):
            fold(parallel, x)
        with pytest.raises(ArgumentError, match=r"has wrapped at '0'; fold its .module"):
            fold(nn.Sequential(parallel), x)
        assert count(fold(parallel.module, x)) == 0
    finally:
        distributed.destroy_process_group()

    class Count(nn.Sequential):
        def forward(self, x):
            return super().forward(x).argmax()

    with pytest.raises(FoldError, match="nothing could be verified"):
        fold(Count(*block()), x)
    assert issubclass(FoldError, BatchNormError)
    # The model's own error, on inputs that it does not take, as it is.
    with pytest.raises(RuntimeError, match="channels"):
        fold(block(), x[:, :2])


def test_parts_that_are_compiled_are_not_compiled_for_each_copy():
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    model = randomized(block()).double().eval()
    model[0] = torch.compile(nn.Sequential(model[0]), backend=backend)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        assert len(compiled) == 1
        folded = fold(model, x)
        assert len(compiled) == 1
        torch.testing.assert_close(folded(x), expected)
    torch._dynamo.reset()


def test_steps_change_no_model():
    """Work on one copy does not reach another."""
    model = randomized(block())
    work = Work(model)
    before = model[0].weight.clone()
    work.take(Step("1", "0", after=True))
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(work.new["0"].weight.float(), before)
