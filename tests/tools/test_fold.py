"""fold against the model it was given, in float64: each layer, both sides, any convolution."""

import copy
import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import BatchNorm, fold
from folds import assert_same, count, randomized

IN, OUT, GROUPS = 4, 6, 2
SPATIAL = {1: (9,), 2: (6, 7), 3: (5, 6, 5)}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
TORCH = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def layers():
    """Name → (layer with or without bias, number of spatial axes, channels in and out)."""
    yield "linear", lambda bias: nn.Linear(IN, OUT, bias=bias), 0, IN, OUT
    for d in (1, 2, 3):
        for name, kinds in (("conv", CONVOLUTIONS), ("transposed", TRANSPOSED)):
            layer = kinds[d]
            yield f"{name}{d}d", lambda bias, f=layer: f(IN, OUT, 3, bias=bias), d, IN, OUT
            yield (
                f"{name}{d}d-grouped",
                lambda bias, f=layer: f(IN, OUT, 2, stride=2, groups=GROUPS, bias=bias),
                d, IN, OUT,
            )  # fmt: skip
            yield (
                f"{name}{d}d-depthwise",
                lambda bias, f=layer: f(IN, 2 * IN, 3, dilation=2, groups=IN, bias=bias),
                d, IN, 2 * IN,
            )  # fmt: skip


LAYERS = {name: rest for name, *rest in layers()}
KINDS = {
    "torch's": lambda d, c: TORCH[d](c),
    "torch's-plain": lambda d, c: TORCH[d](c, affine=False),
    "ours": lambda d, c: BatchNorm(c),
    "ours-relu": lambda d, c: BatchNorm(c, activation="relu"),
    "ours-leaky": lambda d, c: BatchNorm(c, activation="leaky_relu"),
    "ours-function": lambda d, c: BatchNorm(c, activation=nn.PReLU()),
    "ours-axis": lambda d, c: BatchNorm(c, channel_dim=-1 - d),
    "ours-no-beta": lambda d, c: BatchNorm(c, bias=False),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_after(layer, kind, bias):
    make, d, channels, out = LAYERS[layer]
    model = randomized(nn.Sequential(make(bias), KINDS[kind](d, out))).double()
    x = torch.randn(3, channels, *SPATIAL.get(d, ()), dtype=torch.float64)
    folded = fold(model, x)
    assert count(folded) == 0
    assert_same(folded, model, x)
    (step,) = folded.fold_report.folded
    assert (step.layer, step.into, step.after) == ("1", "0", True)
    assert type(folded[0]) is type(model[0])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("kind", ["torch's", "torch's-plain", "ours", "ours-axis"])
@pytest.mark.parametrize("layer", LAYERS)
def test_before(layer, kind, bias):
    make, d, channels, _ = LAYERS[layer]
    model = randomized(nn.Sequential(KINDS[kind](d, channels), make(bias))).double()
    x = torch.randn(3, channels, *SPATIAL.get(d, ()), dtype=torch.float64)
    folded = fold(model, x)
    assert_same(folded, model, x)
    if "transposed" in layer:  # the border of its output sees fewer taps
        assert count(folded) == 1
        (left,) = folded.fold_report.left
        assert left.layer == "0"
        assert "transposed" in left.reason
        with torch.no_grad():
            model[0].running_mean.zero_()
            if model[0].bias is not None:
                model[0].bias.zero_()
        folded = fold(model, x)
        assert_same(folded, model, x)
    assert count(folded) == 0
    assert not folded.fold_report.folded[0].after


@pytest.mark.parametrize("layer", ["linear", "conv2d", "transposed2d"])
def test_residual_and_mask(layer):
    """They are arguments of the call: what is left of the layer takes them, too."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            make, _, _, channels = LAYERS[layer]
            self.layer, self.bn = make(True), BatchNorm(channels, activation="relu")

        def forward(self, x, skip):
            y = self.layer(x)
            return self.bn(y, torch.ones(y.shape[:1] + y.shape[2:], dtype=torch.bool), skip)

    _, d, channels, _ = LAYERS[layer]
    model = randomized(Block()).double()
    x = torch.randn(3, channels, *SPATIAL.get(d, ()), dtype=torch.float64)
    skip = torch.randn_like(model.layer(x))
    for inputs in ((x, skip), {"x": x, "skip": skip}):
        folded = fold(model, inputs)
        assert count(folded) == 0
        assert_same(folded, model, x, skip)


@pytest.mark.parametrize("first", ["torch's", "torch's-plain", "ours", "ours-axis", "ours-no-beta"])
@pytest.mark.parametrize("second", KINDS)
def test_batch_norm_after_batch_norm(first, second):
    """Two affine maps are one; the first takes the second over."""
    model = randomized(nn.Sequential(nn.ReLU(), KINDS[first](2, 3), KINDS[second](2, 3))).double()
    x = torch.randn(3, 3, 4, 5, dtype=torch.float64)
    folded = fold(model, x)
    assert count(folded) == 1
    assert_same(folded, model, x)
    assert [(s.layer, s.into) for s in folded.fold_report.folded] == [("2", "1")]
    (left,) = folded.fold_report.left
    assert left.layer == "1"


def test_chains():
    """What is folded away makes neighbours of those beside it, on both sides of a layer."""
    rows = {
        "CBB": ["1", "2"], "BBC": ["1", "0"], "BCB": ["0", "2"], "BBCBB": ["1", "0", "3", "4"],
        "CBCB": ["1", "3"], "CDBC": ["2"], "BDC": ["0"], "CBDB": ["1", "3"], "CIB": ["2"],
    }  # fmt: skip
    made = {
        "C": lambda: nn.Conv2d(3, 3, 3), "B": lambda: nn.BatchNorm2d(3),
        "D": lambda: nn.Dropout2d(0.5), "I": nn.Identity,
    }  # fmt: skip
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    for row, expected in rows.items():
        model = randomized(nn.Sequential(*(made[letter]() for letter in row))).double()
        folded = fold(model, x)
        assert count(folded) == 0
        assert sorted(s.layer for s in folded.fold_report.folded) == sorted(expected), row
        assert not folded.fold_report.left
        assert_same(folded, model, x)


def test_two_batch_norms_before_zero_padding():
    """What counts is the shift of both together."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert count(fold(model.double(), x)) == 0
    randomized(model)
    with torch.no_grad():
        model[0].bias.zero_(), model[0].running_mean.zero_()
    folded = fold(model, x)
    assert_same(folded, model, x)
    assert [s.layer for s in folded.fold_report.folded] == ["1"]


@st.composite
def convolutions(draw):
    d, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = draw(st.integers(1, 3))
    each = st.tuples(*[st.integers(1, 3)] * d)
    stride, dilation = draw(each), draw(each)
    options = {
        "kernel_size": draw(each), "stride": stride, "dilation": dilation, "groups": groups,
        "bias": draw(st.booleans()),
    }  # fmt: skip
    kernel = options["kernel_size"]
    if transposed:
        least = [max(s, t) for s, t in zip(stride, dilation, strict=True)]
        options["output_padding"] = tuple(draw(st.integers(0, n - 1)) for n in least)
        options["padding"] = tuple(draw(st.integers(0, 1)) for _ in range(d))
    else:
        options["padding_mode"] = draw(
            st.sampled_from(["zeros", "reflect", "replicate", "circular"])
        )
        # Reflection and wrapping go no further than the input.
        options["padding"] = tuple(draw(st.integers(0, min(2, k))) for k in kernel)
        if draw(st.booleans()) and set(stride) == {1}:
            options["padding"] = draw(st.sampled_from(["same", "valid"]))
    kind = (TRANSPOSED if transposed else CONVOLUTIONS)[d]
    widths = [groups * draw(st.integers(1, 2)) for _ in "io"]
    return d, widths, kind(*widths, **options)


@given(convolutions(), st.booleans(), st.booleans(), st.integers(0, 99))
def test_any_convolution(made, before, shift, seed):
    """Its hyperparameters decide whether a shift before it can be folded, and nothing else."""
    d, (inputs, outputs), layer = made
    torch.manual_seed(seed)
    norm = TORCH[d](inputs if before else outputs)
    model = randomized(nn.Sequential(*((norm, layer) if before else (layer, norm)))).double()
    if not shift:
        with torch.no_grad():
            norm.running_mean.zero_(), norm.bias.zero_()
    x = torch.randn(2, inputs, *(9, 8, 7)[:d], dtype=torch.float64)
    folded = fold(model, x)
    assert_same(folded, model, x)
    transposed = isinstance(layer, tuple(TRANSPOSED.values()))
    zeros = layer.padding_mode == "zeros" and layer.padding != "valid"
    same = layer.padding == "same" and max(layer.kernel_size) == 1
    pads = zeros and not same and (isinstance(layer.padding, str) or any(layer.padding))
    assert count(folded) == (before and shift and (transposed or pads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_round_once(dtype):
    """New weights are those of float64 arithmetic on the old ones, rounded."""
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm(4))).to(dtype)
    folded = fold(model, torch.randn(2, 3, 6, 6, dtype=dtype))
    conv, norm = copy.deepcopy(model).double()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = (conv.weight * scale[:, None, None, None]).to(dtype)
    bias = ((conv.bias - norm.running_mean) * scale + norm.bias).to(dtype)
    assert torch.equal(folded[0].weight, weight)
    assert torch.equal(folded[0].bias, bias)
    assert folded[0].weight.dtype is dtype


def test_channels_last_weights_stay_so():
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model = model.to(memory_format=torch.channels_last)
    folded = fold(model, torch.randn(2, 3, 6, 6))
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_the_model_is_left_as_it_is():
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()))
    model.train()
    model[2].eval()
    x = torch.randn(2, 3, 6, 6)
    before = copy.deepcopy(model)
    state, numbers, given_x = (
        dict(model.state_dict(keep_vars=True)),
        torch.get_rng_state(),
        x.clone(),
    )
    folded = fold(model, x)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert not any(m.training for m in folded.modules())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert torch.equal(x, given_x)
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is value for name, value in state.items())
    for name, value in before.state_dict().items():
        assert torch.equal(after[name], value)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    shared = {id(p) for p in model.parameters()} & {id(p) for p in folded.parameters()}
    assert not shared
    assert all(p.requires_grad for p in folded.parameters())


def test_other_shapes_than_the_examples():
    model = randomized(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    ).double()
    folded = fold(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    for shape in [(1, 3, 6, 6), (7, 3, 31, 5), (0, 3, 6, 6)]:
        assert_same(folded, model, torch.randn(shape, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec")  # torch's own, in program.module()
def test_compiled_and_exported():
    model = randomized(
        nn.Sequential(nn.Conv1d(3, 4, 3), BatchNorm(4, activation="relu"), nn.Flatten(),
                      nn.Linear(24, 5), nn.BatchNorm1d(5))
    )  # fmt: skip
    x = torch.randn(2, 3, 8)
    folded = fold(model, x)
    expected = model.eval()(x)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.compile(folded, fullgraph=True)(x), expected, **close)
    program = torch.export.export(folded, (x,)).run_decompositions()
    torch.testing.assert_close(program.module()(x), expected, **close)
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(torch.fx.symbolic_trace(folded)(x), expected, **close)


def test_what_is_left_says_what_it_does():
    x = torch.randn(2, 3, 6, 6)
    for kind, expected in (
        (nn.BatchNorm2d, "Identity()"),
        (nn.SyncBatchNorm, "Checked(rank=4)"),
        (BatchNorm, "Folded(rank=4)"),
        (lambda c: BatchNorm(c, channel_dim=-3), "Folded()"),
        (
            lambda c: BatchNorm(c, activation="leaky_relu"),
            "Folded(rank=4, activation='leaky_relu')",
        ),
    ):
        assert repr(fold(nn.Sequential(nn.Conv2d(3, 4, 3), kind(4)), x)[1]) == expected


def test_copies_keep_the_report(tmp_path):
    model = randomized(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    x = torch.randn(5, 3)
    folded = fold(model, x)
    torch.save(folded, tmp_path / "folded.pt")
    loaded = torch.load(tmp_path / "folded.pt", weights_only=False)
    for other in (copy.deepcopy(folded), loaded):
        assert other.fold_report == folded.fold_report
        assert torch.equal(other(x), folded(x))
    assert list(folded.state_dict()) == ["0.weight", "0.bias"]


def test_measures_only_if_asked():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *(nn.BatchNorm2d(8) for _ in range(8)))
    x = torch.randn(2, 3, 16, 16)
    assert fold(model, x).fold_report.speedup is None
    report = fold(model, x, measure=True).fold_report
    low, high = report.speedup_interval
    assert low <= report.speedup <= high
    assert report.speedup > 1.5  # eight layers of nine are gone
    assert f"{report.speedup:.2f} times as fast" in str(report)


def test_every_kind_is_known_to_these_tests():
    assert len(LAYERS) == 1 + 3 * 2 * 3
    assert all(isinstance(KINDS[k](2, 3), _BatchNorm) for k in KINDS)
    assert len(set(itertools.chain(LAYERS, KINDS))) == len(LAYERS) + len(KINDS)
