"""Copies, files, devices and dtypes: the layer's values survive, and its memory does not linger."""

import copy
import gc
import io
import pickle
import weakref
from inspect import signature

import pytest
import torch
from torch import nn
from torch.nn.functional import tanh
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm, Renorm
from interpreted import missing

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(**options):
    """A layer three steps in, with parameters that are not the initial ones."""
    layer = BatchNorm(4, **options)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    for _ in range(3):
        layer(torch.randn(8, 4) * 3 + 100)
    return layer


def label(options):
    return ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in options.items()) or "plain"


def state(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_state(layer, expected):
    got = layer.state_dict()
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_file(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = BatchNorm(
        4,
        momentum=layer.momentum,
        affine=layer.affine,
        bias=layer.bias is not None,
        track_running_stats=layer.track_running_stats,
        channel_dim=layer.channel_dim,
        activation=layer.activation,
        virtual_batch_size=layer.virtual_batch_size,
        renorm=layer.renorm,
    )
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return other


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_file])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"channel_dim": -1, "activation": "relu"},
        {"activation": tanh},
        {"virtual_batch_size": 3},
        {"renorm": Renorm(2.0, 1.0, r_steps=(0, 5), d_steps=(2, 4))},
    ],
    ids=label,
)
def test_copy_computes_the_same_and_shares_nothing(copied, options):
    layer = trained(**options)
    other = copied(layer)
    assert_state(other, state(layer))
    assert {t.data_ptr() for t in layer.state_dict().values()}.isdisjoint(
        t.data_ptr() for t in other.state_dict().values()
    )
    for training in (True, False):
        x = torch.randn(8, 4) * 3 + 100
        y = layer.train(training)(x)
        torch.testing.assert_close(other.train(training)(x), y, rtol=0, atol=0)
        assert_state(other, state(layer))


def test_deepcopy_after_a_step_whose_graph_is_alive():
    """The outline's layer fails here: its buffers carry the graph of every step."""
    layer = BatchNorm(4)
    y = layer(torch.randn(8, 4, requires_grad=True))
    assert y.grad_fn is not None
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    assert_state(copy.deepcopy(layer), state(layer))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
def test_meta_device_then_load(assign, dtype):
    layer = trained()
    if dtype is not None:
        layer.to(dtype)
    with torch.device("meta"):
        model = nn.Sequential(BatchNorm(4, dtype=dtype), BatchNorm(4, device="meta", dtype=dtype))
    assert all(t.is_meta for t in model.state_dict().values())
    for bn in model:
        if not assign:
            bn.to_empty(device="cpu")
        bn.load_state_dict(layer.state_dict(), strict=True, assign=assign)
        assert_state(bn, state(layer))
        x = (torch.randn(8, 4) * 3 + 100).to(dtype or torch.float32)
        torch.testing.assert_close(bn.eval()(x), layer.eval()(x), rtol=0, atol=0)


def test_to_empty_then_reset():
    layer = BatchNorm(4, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert_state(layer, state(nn.BatchNorm1d(4)))


CONVERSIONS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "to(float16)": (lambda m: m.to(torch.float16), torch.float16),
    "to(cpu, bfloat16)": (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
    "to(tensor)": (lambda m: m.to(torch.zeros(1).bfloat16()), torch.bfloat16),
    "type": (lambda m: m.type(torch.float16), torch.float16),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_running_statistics_stay_float32_in_half_precision(name, nested):
    """To the bit: not rounded on the way, as 100.3 would be, to 100.5 in bfloat16."""
    convert, dtype = CONVERSIONS[name]
    layer = trained()
    before = state(layer)
    model = nn.Sequential(nn.Sequential(layer)) if nested else layer
    assert convert(model) is model
    buffers = ["running_mean", "running_var", "num_batches_tracked"]
    for buffer in buffers[:2] if name == "type" else buffers:  # type() casts integers too
        torch.testing.assert_close(getattr(layer, buffer), before[buffer], rtol=0, atol=0)
        assert layer.get_buffer(buffer) is layer._buffers[buffer]
    for parameter in ("weight", "bias"):
        expected = before[parameter].to(dtype)
        torch.testing.assert_close(getattr(layer, parameter).data, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_there_and_back(dtype):
    layer = trained()
    before = state(layer)
    layer.to(dtype).float()
    for buffer in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(layer, buffer), before[buffer], rtol=0, atol=0)


def test_double_widens_the_statistics_too():
    layer = trained()
    before = state(layer)
    layer.double()
    for name, value in layer.state_dict().items():
        expected = before[name].double() if value.is_floating_point() else before[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
    layer.half()
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(layer.get_buffer(name), before[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_constructor_dtype_is_the_parameters(dtype):
    layer = BatchNorm(4, dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer.running_mean.dtype is layer.running_var.dtype is torch.float32
    expected = state(nn.BatchNorm1d(4))
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value.to(expected[name].dtype), expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_running_mean_of_half_inputs_arrives(dtype):
    """In bfloat16 buffers it would stall at 96."""
    layer = BatchNorm(4, dtype=dtype)
    for _ in range(200):
        layer(torch.full((8, 4), 100.0, dtype=dtype))
    # What is left of the initial 0: 100·0.9²⁰⁰ = 7e-8; each step rounds by 100·2⁻²⁴ and the
    # next ones forget it by a factor of 0.9: ten times that.
    torch.testing.assert_close(layer.running_mean, torch.full((4,), 100.0), rtol=0, atol=6e-5)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_checkpoint_of_torch_loads_into_float32_statistics(dtype, assign):
    theirs = nn.BatchNorm1d(4)
    theirs(torch.randn(8, 4))
    theirs.to(dtype)
    layer = BatchNorm(4, dtype=dtype)
    layer.load_state_dict(theirs.state_dict(), strict=True, assign=assign)
    for name in ("running_mean", "running_var"):
        expected = theirs.get_buffer(name).float()
        torch.testing.assert_close(layer.get_buffer(name), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{}, {"track_running_stats": False}, {"affine": False}], ids=str
)
@pytest.mark.parametrize(
    "convert", [lambda m: m, lambda m: m.bfloat16()], ids=["float", "bfloat16"]
)
def test_names_are_torchs(convert, options):
    ours, theirs = convert(trained(**options)), convert(nn.BatchNorm1d(4, **options))
    ours(torch.randn(8, 4).to(next(ours.parameters(), torch.zeros(1)).dtype))
    for listing in ("named_buffers", "named_parameters"):
        names = [name for name, _ in getattr(ours, listing)()]
        assert names == [name for name, _ in getattr(theirs, listing)()]
    assert list(ours._buffers) == list(theirs._buffers)
    assert list(ours._parameters) == list(theirs._parameters)


def test_buffers_are_updated_in_place():
    """Whoever holds a buffer (an EMA, a CUDA graph, shared memory) sees the update."""
    layer = trained()
    held = dict(layer.named_buffers())
    before = state(layer)
    layer(torch.randn(8, 4))
    for name, buffer in layer.named_buffers():
        assert buffer is held[name]
        assert not torch.equal(buffer, before[name])


def test_gamma_and_beta_are_the_parameters():
    layer = trained()
    assert layer.gamma is layer.weight
    assert layer.beta is layer.bias
    replacement = nn.Parameter(torch.arange(4.0))
    layer.gamma = replacement
    assert layer.weight is replacement
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_without_a_bias():
    layer = BatchNorm(4, bias=False)
    assert list(layer.state_dict())[:1] == ["weight"]
    assert layer.bias is None
    with torch.no_grad():
        layer.weight.fill_(3.0)
    layer(torch.randn(8, 4))
    layer.reset_parameters()
    assert layer.weight.tolist() == [1.0] * 4
    assert layer.running_mean.tolist() == [0.0] * 4
    assert layer.num_batches_tracked == 0


def test_repr():
    # torch's own line, then what is not this class's default.
    assert repr(BatchNorm(4)) == repr(nn.BatchNorm2d(4)).replace("BatchNorm2d", "BatchNorm")
    without = (
        nn.BatchNorm2d(4, bias=False) if "bias" in signature(nn.BatchNorm2d).parameters else None
    )
    if without is not None:
        assert repr(BatchNorm(4, bias=False)) == repr(without).replace("BatchNorm2d", "BatchNorm")
    shown = repr(BatchNorm(4, momentum=None, channel_dim=-1, activation="relu"))
    assert shown.startswith("BatchNorm(4, eps=1e-05, momentum=None, affine=True, ")
    assert shown.endswith("track_running_stats=True, channel_dim=-1, activation='relu')")
    assert "activation='tanh'" in repr(BatchNorm(4, activation=tanh))
    assert "(activation): SiLU()" in repr(BatchNorm(4, activation=nn.SiLU()))


# --- memory -------------------------------------------------------------------------------------

# float32 in (N, C, L) is served by torch's kernels, channels last by the reference.
LAYERS = [
    {"activation": activation, "channel_dim": channel_dim}
    for activation in (None, "relu", tanh)
    for channel_dim in (1, -1)
]


@pytest.fixture
def no_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", LAYERS, ids=label)
def test_input_and_output_are_freed_without_the_collector(options, training):
    layer = BatchNorm(4, **options).train(training)
    x = torch.randn(4, 4, 4, requires_grad=True)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    references = [weakref.ref(t) for t in (x, y, dx)]
    del x, y, dx
    assert [reference() for reference in references] == [None] * 3


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", LAYERS, ids=label)
def test_what_the_graph_keeps_alive(options, training):
    """The input, which it must; little else."""
    layer = BatchNorm(4, **options).train(training)
    x = torch.randn(32, 4, 4, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    # torch's own tanh keeps its output; and so does a relu of the kernels that are not ours.
    output = options["activation"] is tanh or (missing() and options["activation"] == "relu")
    keeps = [x, y] if output else [x]
    size = x.untyped_storage().nbytes()
    large = [address for address, count in saved.items() if count >= size]
    assert sorted(large) == sorted(t.untyped_storage().data_ptr() for t in keeps)
    # mean, var, γ and β, at most four float64 a channel
    assert sum(saved.values()) - size * len(keeps) <= 4 * 4 * 8


@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_output_is_kept_where_it_tells_the_activations_side(activation):
    """With a residual, which is not kept; torch would keep the output of its own relu, too."""
    layer = BatchNorm(4, activation=activation)
    x, residual = torch.randn(32, 4, 4, requires_grad=True), torch.randn(32, 4, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = layer(x, residual=residual)
    kept = {t.untyped_storage().data_ptr() for t in saved}
    assert (y.untyped_storage().data_ptr() in kept) == (activation == "relu")
    assert residual.untyped_storage().data_ptr() not in kept


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("reentrant", [True, False])
def test_renorm_remembers_only_forward_passes_that_may_be_done_again(reentrant):
    """And a pass done again, after the running statistics have moved, gives the same."""
    layer = BatchNorm(4, renorm=Renorm(r_max=2, d_max=1, r_steps=(0, 0), d_steps=(0, 0)))
    x, cotangent = torch.randn(8, 4) + 1, torch.randn(8, 4)
    twin, leaf = copy.deepcopy(layer), x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(twin(leaf), leaf, cotangent)
    assert not twin._corrections[twin].passes
    y = checkpoint(layer, leaf, use_reentrant=reentrant)
    for _ in range(3):
        layer(torch.randn(8, 4) - 5)
    assert len(layer._corrections[layer].passes) == 1
    y.backward(cotangent)
    assert torch.equal(leaf.grad, expected)
