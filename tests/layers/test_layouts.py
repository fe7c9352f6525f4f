"""Whatever the strides, rank, channel axis, dtype and container of the input: the same numbers."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from batchnorm import BatchNorm
from triton_steps import roundoff

pytestmark = pytest.mark.usefixtures("kernels")

exactly = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
# Two summation orders or kernels for the same float32 numbers: γ·x̂ + β is rounded a few times,
# each by 2⁻²⁴ of numbers up to 8, and the sums of up to 2000 values are float64 or blocked.
close = functools.partial(torch.testing.assert_close, rtol=5e-6, atol=5e-6)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def made(channels, cls=BatchNorm, **options):
    layer = cls(channels, **options)
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return layer


def step(layer, x, cotangent, **arguments):
    """Output and input's gradient as they are, then copies of the parameters' and the buffers."""
    layer.zero_grad()
    x.grad = None
    y = layer(x, **arguments)
    y.backward(cotangent)
    rest = [p.grad.clone() for p in layer.parameters()] + [b.clone() for b in layer.buffers()]
    return y.detach(), x.grad, rest


# --- strides -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((4, 6, 5, 3), torch.channels_last), ((3, 6, 4, 3, 2), torch.channels_last_3d)],
)
def test_channels_last_comes_out_as_channels_last(shape, memory_format, activation, training):
    layer = made(6, activation=activation).train(training)
    twin = copy.deepcopy(layer)
    theirs = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm3d)(6).train(training)
    values, cotangent = torch.randn(shape), torch.randn(shape)
    x = values.to(memory_format=memory_format).requires_grad_()
    y, dx, rest = step(layer, x, cotangent.to(memory_format=memory_format))
    expected_y, expected_dx, expected_rest = step(twin, values.requires_grad_(), cotangent)
    close(y, expected_y)
    close(dx, expected_dx)
    close(rest, expected_rest)
    their_y, their_dx, _ = step(theirs, x, cotangent.to(memory_format=memory_format))
    for ours, torchs in ((y, their_y), (dx, their_dx)):
        assert torchs.is_contiguous(memory_format=memory_format)
        assert ours.is_contiguous(memory_format=memory_format)
    assert expected_y.is_contiguous()
    assert expected_dx.is_contiguous()


STRIDES = {
    "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "every second": lambda x: torch.stack([x, torch.full_like(x, 9.0)], -1)[..., 0],
    "offset": lambda x: torch.cat([torch.full_like(x[:1], 9.0), x])[1:],
    "expanded batch": lambda x: x[:1].expand_as(x),
    "expanded channels": lambda x: x[:, :1].expand_as(x),
    "expanded length": lambda x: x[..., :1].expand_as(x),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", STRIDES)
def test_strides_do_not_matter(name, training):
    layer = made(4).train(training)
    twin = copy.deepcopy(layer)
    x = STRIDES[name](torch.randn(5, 4, 3))
    assert not x.is_contiguous() or x.storage_offset()
    # The gradient may not be summed over what is expanded, so x itself is the leaf.
    leaf, contiguous = x.detach().requires_grad_(), x.clone().contiguous().requires_grad_()
    for cotangent in (torch.randn(5, 4, 3), STRIDES[name](torch.randn(5, 4, 3))):
        expected = step(twin, contiguous, cotangent.contiguous())
        close(step(layer, leaf, cotangent), expected)


@pytest.mark.parametrize("name", STRIDES)
def test_strides_of_mask_and_residual_do_not_matter(name):
    layer = made(4, activation="leaky_relu")
    twin = copy.deepcopy(layer)
    x, cotangent = torch.randn(5, 4, 3).requires_grad_(), torch.randn(5, 4, 3)
    residual, mask = STRIDES[name](torch.randn(5, 4, 3)), STRIDES[name](torch.rand(5, 4, 3))[:, 0]
    got = step(layer, x, cotangent, mask=mask, residual=residual)
    dense = {"mask": mask.contiguous(), "residual": residual.contiguous()}
    close(got, step(twin, x.detach().requires_grad_(), cotangent, **dense))


def test_input_is_not_changed():
    for activation in (None, "relu"):
        x, residual = torch.randn(5, 4), torch.randn(5, 4)
        copies = x.clone(), residual.clone()
        made(4, activation=activation)(x, residual=residual)
        exactly((x, residual), copies)


# --- rank and channel axis -----------------------------------------------------------------------

SHAPES = [(7, 4), (5, 4, 3), (3, 4, 2, 5), (2, 4, 3, 2, 2), (2, 4, 1, 3, 2, 2)]


def by_hand(layer, x, channel_dim, mask=None):
    """Output and new statistics in float64, the channels moved to the last axis by hand."""
    moved = x.double().movedim(channel_dim, -1)
    flat = moved.reshape(-1, moved.shape[-1])
    w = torch.ones(len(flat)).double() if mask is None else mask.double().reshape(-1)
    mean, var, n = layer.running_mean.double(), layer.running_var.double(), w.sum()
    new = mean, var
    if layer.training:
        old = new
        mean = w @ flat / n
        var = w @ (flat - mean) ** 2 / n
        new = 0.9 * old[0] + 0.1 * mean.detach(), 0.9 * old[1] + 0.1 * var.detach() * n / (n - 1)
    y = (moved - mean) / (var + layer.eps).sqrt() * layer.weight.double() + layer.bias.double()
    return y.movedim(-1, channel_dim), new


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [(shape, dim) for shape in SHAPES for dim in (1, -1, 0, -2, 2) if dim < len(shape)],
)
def test_every_rank_and_channel_axis(shape, channel_dim, masked, training):
    x = torch.randn(shape).movedim(1, channel_dim).contiguous().requires_grad_()
    layer = made(4, channel_dim=channel_dim).train(training)
    mask = None
    if masked:
        axis = channel_dim % x.dim()
        mask = torch.rand(x.shape[:axis] + x.shape[axis + 1 :]) + 0.5
    cotangent = torch.randn(x.shape)
    expected, statistics = by_hand(layer, x, channel_dim, mask)
    gradients = torch.autograd.grad(expected, [x, *layer.parameters()], cotangent.double())
    y, dx, rest = step(layer, x, cotangent, **({"mask": mask} if masked else {}))
    close(y, expected.float())
    close([dx, *rest[:2]], list(gradients))
    close(rest[2:4], [s.float() for s in statistics])
    assert rest[4] == training


# --- dtypes --------------------------------------------------------------------------------------


def network(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 3), norm(4)
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, training):
    ours, theirs = network(BatchNorm).train(training), network(nn.BatchNorm2d).train(training)
    x = torch.randn(4, 3, 8, 8) + 1
    dtypes = []
    results = []
    for model in (ours, theirs):
        seen: list[torch.dtype] = []
        for layer in (model[1], model[4]):
            layer.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out.dtype))
        with torch.autocast("cpu", dtype):
            y = model(x)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        y.backward(cotangent.to(y.dtype))
        dtypes.append([*seen, *(p.grad.dtype for p in model.parameters())])
        results.append([y, *(p.grad for p in model.parameters()), *list(model.buffers())])
    assert dtypes[0] == dtypes[1]
    assert dtypes[0][0] is dtype
    # Inputs of the second layer differ where one of the two rounded the other way: one unit in
    # the last place, eps, of a value up to 4; |γ|/σ up to 3 carries it to the output, and sums of
    # up to 256 gradients grow like their root.
    for got, expected in zip(*results, strict=True):
        scale = max(1.0, expected.abs().max().item())
        atol = 12 * torch.finfo(dtype).eps * scale
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float32 γ", "half γ"])
def test_half_precision_input_has_float32_statistics(dtype, channel_dim, parameters):
    layer = made(4, channel_dim=channel_dim, dtype=parameters or dtype)
    x = (torch.randn(64, 4, 32).movedim(1, channel_dim) + 20).to(dtype).requires_grad_()
    cotangent = torch.randn(x.shape).to(dtype)
    expected, statistics = by_hand(layer, x, channel_dim)
    gradients = torch.autograd.grad(expected, [x, *layer.parameters()], cotangent.double())
    y, dx, rest = step(layer, x, cotangent)
    # Accumulated in float64, rounded to float32 once, maybe once more as old + 0.1·(new − old).
    torch.testing.assert_close(
        rest[2:4], [s.float() for s in statistics], rtol=2 * 2.0**-24, atol=0
    )
    assert y.dtype == dx.dtype == dtype
    # Computed wide and rounded once, to half a unit in the last place: eps/2, of each value. The
    # other half is room for a second rounding that falls the other way, at the edge.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=1.02 * roundoff(dtype), atol=1e-6)
    for got, exact in zip([dx, *rest[:2]], gradients, strict=True):
        torch.testing.assert_close(got, exact.to(got.dtype), rtol=eps, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_float64_input_with_float32_parameters(training):
    """torch refuses it. Ours computes in float64 throughout, with parameters that are float32."""
    layer = made(4).train(training)
    x, cotangent = (torch.randn(5, 4, 3).double() + 1e6).requires_grad_(), torch.randn(5, 4, 3)
    expected, statistics = by_hand(layer, x, 1)
    gradients = torch.autograd.grad(expected, [x, *layer.parameters()], cotangent.double())
    y, dx, rest = step(layer, x, cotangent.double())
    # x − mean is a difference of numbers of size 1e6: 2⁻⁵³·1e6 ≈ 1e-10, a few times.
    torch.testing.assert_close([y, dx], [expected, gradients[0]], rtol=1e-9, atol=1e-9)
    close(rest[:2], list(gradients[1:]))
    close(rest[2:4], [s.float() for s in statistics])
    assert rest[0].dtype == rest[2].dtype == torch.float32


# --- containers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_packed_sequence(training):
    layer = made(4, activation="relu").train(training)
    on_data, on_padded = copy.deepcopy(layer), copy.deepcopy(layer)
    lengths = [3, 7, 1, 5]
    x = pack_sequence([torch.randn(n, 4) for n in lengths], enforce_sorted=False)
    residual = x._replace(data=torch.randn_like(x.data))
    x.data.requires_grad_()
    cotangent = torch.randn_like(x.data)
    got = layer(x, residual=residual)
    assert type(got) is type(x)
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        exactly(getattr(got, field), getattr(x, field))
    exactly(got.data, on_data(x.data, residual=residual.data))
    exactly(list(layer.buffers()), list(on_data.buffers()))

    padded, _ = pad_packed_sequence(x, batch_first=True, padding_value=torch.nan)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    other, _ = pad_packed_sequence(residual, batch_first=True)
    on_padded.channel_dim = -1
    y = on_padded(padded, mask=mask, residual=other)
    close(y[mask], pad_packed_sequence(got, batch_first=True)[0][mask])
    close(list(layer.buffers()), list(on_padded.buffers()))
    # Gradients reach the packed data by either way.
    (dx,) = torch.autograd.grad(got.data, x.data, cotangent)
    back = pad_packed_sequence(got._replace(data=cotangent), batch_first=True)[0]
    (padded_dx,) = torch.autograd.grad(y, x.data, torch.where(mask[..., None], back, 0.0))
    close(dx, padded_dx)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"momentum": None, "activation": "relu"}], ids=str)
def test_meta_tensors_flow_forward_and_back(options, training):
    meta, real = (BatchNorm(4, device=d, **options).train(training) for d in ("meta", "cpu"))
    x = torch.randn(5, 4, 3, 2, requires_grad=True)
    y, dx, rest = step(meta, x.detach().to("meta").requires_grad_(), torch.randn_like(x).to("meta"))
    expected_y, expected_dx, expected_rest = step(real, x, torch.randn_like(x))
    expected = [expected_y, expected_dx, *expected_rest]
    for got, want in zip([y, dx, *rest], expected, strict=True):
        assert got.is_meta
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
    x_last = torch.empty(5, 4, 3, 2, device="meta", memory_format=torch.channels_last)
    assert meta(x_last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
def test_fake_tensors_flow_forward_and_back(training):
    with FakeTensorMode() as mode:
        layer = BatchNorm(4, activation="relu").train(training)
        x = torch.randn(5, 4, 3, requires_grad=True)
        mask = torch.ones(5, 3, dtype=torch.bool)
        y, dx, _ = step(layer, x, torch.randn(5, 4, 3), mask=mask)
    real = torch.randn(5, 4, 3)
    for fake in (y, dx):
        assert fake.fake_mode is mode
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0)])
def test_empty_batch_changes_nothing(shape, momentum, masked):
    layer = made(4, momentum=momentum)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(shape, requires_grad=True)
    mask = torch.ones(shape[:1] + shape[2:], dtype=torch.bool) if masked else None
    y = layer(x, mask=mask)
    y.backward(torch.randn(shape))
    assert y.shape == x.grad.shape == shape
    exactly(dict(layer.state_dict()), before)
    for parameter in layer.parameters():
        exactly(parameter.grad, torch.zeros(4))
