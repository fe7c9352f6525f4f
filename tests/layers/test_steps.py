"""However a layer goes along a sequence, it comes to the same: called, by its function, affine."""

import copy
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from batchnorm import (
    BatchNorm,
    BatchNormLSTM,
    InputError,
    NonFiniteWarning,
    freeze,
    pause_statistics,
)
from batchnorm.layers import steps
from batchnorm.layers.steps import add_steps, along, steps_by_batch

CHANNELS, LENGTH = 5, 4


def a_layer(bias=True, momentum=0.1, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    norm = BatchNorm(CHANNELS, momentum=momentum, bias=bias)
    add_steps(norm, LENGTH)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias):
            if tensor is not None:
                tensor.uniform_(0.3, 1)
        for keeper in (norm, *norm.banks.values()):
            keeper.running_mean.normal_()
            keeper.running_var.uniform_(0.5, 2)
            keeper.num_batches_tracked.fill_(3)
    return norm.to(dtype)


def called(norm):
    """What hooks see is called."""
    norm.register_forward_hook(lambda *_: None)
    return norm


def run(norm, sizes, reached, *, learns=True):
    """Everything that comes of it: outputs, gradients, buffers."""
    torch.manual_seed(1)
    x = (3 + torch.randn(sum(sizes), CHANNELS)).to(norm.weight.dtype).requires_grad_()
    residual = torch.randn_like(x).requires_grad_()
    leaves = [x, residual, *(p for p in norm.parameters() if p.requires_grad)]
    with torch.set_grad_enabled(learns):
        on_its_way = along(norm, sizes, reached, LENGTH)
        y = torch.cat(list(on_its_way.each(x)))
        rows = zip(x.split(sizes), residual.split(sizes), strict=True)
        z = torch.cat([on_its_way.at(step, *row) for step, row in enumerate(rows)])
    grads = []
    if learns:
        grads = torch.autograd.grad((y, z), leaves, (torch.sin(y), torch.cos(z)))
    return type(on_its_way).__name__, [y, z, *grads, *norm.buffers()]


@pytest.mark.parametrize("sizes", [[6] * 3, [6] * 7, [6, 6, 4, 2, 1, 1]])
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_in_training(sizes, momentum, bias):
    reached = steps_by_batch(sizes)
    way, found = run(a_layer(bias, momentum), sizes, reached)
    other, expected = run(called(a_layer(bias, momentum)), sizes, reached)
    assert (way, other) == ("ByFunction", "Steps")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sizes", [[6] * 3, [6] * 7, [6, 6, 4, 2, 1, 1]])
@pytest.mark.parametrize("reached", [0, 2, 7])
@pytest.mark.parametrize("way", ["ByFunction", "_Affine", "frozen"])
def test_by_running_statistics(sizes, reached, way):
    norm, other = a_layer(), called(a_layer())
    for layer in (norm, other):
        if way == "frozen":
            freeze(layer.train())
        else:
            layer.eval()
    learns = way != "_Affine"
    name, found = run(norm, sizes, reached, learns=learns)
    _, expected = run(other, sizes, reached, learns=learns)
    assert name == ("_Affine" if way == "frozen" else way)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_affine_map_keeps_the_dtype(dtype):
    norm, other = a_layer(dtype=dtype).eval(), called(a_layer(dtype=dtype).eval())
    name, found = run(norm, [6] * 3, 3, learns=False)
    _, expected = run(other, [6] * 3, 3, learns=False)
    assert name == "_Affine"
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)  # and the dtype


def test_an_affine_map_errs_as_the_rounding_of_x_does():
    """A mean of 1e4 with a deviation of 1, in float32: 1e4 · 2⁻²⁴ = 6e-4 a rounding."""
    norm = a_layer(dtype=torch.float32).eval()
    for keeper in (norm, *norm.banks.values()):
        keeper.running_mean += 1e4
    x = 1e4 + torch.randn(18, CHANNELS)
    with torch.no_grad():
        y = torch.cat(list(along(norm, [6] * 3, 3, LENGTH).each(x)))
        exact = torch.cat(list(along(norm.double(), [6] * 3, 3, LENGTH).each(x.double())))
    torch.testing.assert_close(y, exact.float(), rtol=0, atol=3 * 6e-4 * 2**0.5)


def test_paused_statistics_stay():
    norm = a_layer()
    before = [buffer.clone() for buffer in norm.buffers()]
    with pause_statistics(norm):
        way, _ = run(norm, [6] * 3, 3)
    assert way == "ByFunction"
    assert all(torch.equal(a, b) for a, b in zip(before, norm.buffers(), strict=True))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_what_is_not_finite_stays_out_of_its_own_step_only(momentum):
    results = []
    told = (
        r"1 of 5 channels \(3\)" if momentum else "5 of 5"
    )  # averages are of one number of batches
    for look in (lambda norm: norm, called):
        norm = look(a_layer(momentum=momentum))
        x = torch.randn(
            6 * 6, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
        )
        x[7, 3] = torch.nan
        with pytest.warns(NonFiniteWarning, match=told):
            list(along(norm, [6] * 6, 6, LENGTH).each(x))
        with warnings.catch_warnings():  # told once
            warnings.simplefilter("error")
            list(along(norm, [6] * 6, 6, LENGTH).each(x))
        results.append(list(norm.buffers()))
        assert all(buffer.isfinite().all() for buffer in norm.buffers())
        assert [int(b.num_batches_tracked) for b in norm.banks.values()] == (
            [5, 5, 5] if momentum else [5, 3, 5]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.register_forward_pre_hook(lambda *_: None),
        lambda norm: setattr(norm, "forward", norm.forward),
        lambda norm: norm.register_full_backward_hook(lambda *_: None),
        lambda norm: setattr(norm, "virtual_batch_size", 3),
        lambda norm: setattr(norm, "activation", "relu"),
        lambda norm: setattr(norm, "process_group", "world"),
        lambda norm: setattr(norm, "_collect", lambda *_: None),
        lambda norm: torch.nn.utils.parametrize.register_parametrization(
            norm, "weight", torch.nn.Identity()
        ),
    ],
)
def test_whatever_else_a_layer_does_it_does_here(change):
    norm, twin = a_layer(), a_layer()
    change(norm)
    change(twin)
    on_its_way = along(norm, [6] * 3, 3, LENGTH)
    assert type(on_its_way) is steps.Steps
    x = torch.randn(18, CHANNELS, dtype=torch.float64)
    for step, part in enumerate(on_its_way.each(x)):
        twin._bank = f"step{step}"
        torch.testing.assert_close(part, twin(x[6 * step : 6 * step + 6]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_pass_counts_once(reentrant):
    torch.manual_seed(0)
    lstm = BatchNormLSTM(3, 4, max_length=3).double()
    twin = copy.deepcopy(lstm)
    x = torch.randn(5, 6, 3, dtype=torch.float64, requires_grad=True)
    y, _ = checkpoint(lstm, x, use_reentrant=reentrant)
    z, _ = twin(x)
    y.sin().sum().backward()
    expected, *_ = torch.autograd.grad(z.sin().sum(), x)
    torch.testing.assert_close(x.grad, expected)
    for a, b in zip(lstm.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("running_mean", torch.zeros(CHANNELS + 1), "channels"),
        ("running_var", torch.ones(CHANNELS - 1), "channels"),
        ("running_mean", torch.zeros(1, CHANNELS), "shape"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(name, other, message):
    """The operator that updates them does not look."""
    norm = a_layer()
    setattr(norm.banks["step1"], name, other)
    with pytest.raises(InputError, match=rf"^BatchNorm\({CHANNELS}\): .*{message}"):
        along(norm, [6] * 3, 3, LENGTH).each(torch.randn(18, CHANNELS, dtype=torch.float64))
    with pytest.raises(InputError, match=rf"^BatchNorm\({CHANNELS}\): .*{message}"):
        along(norm, [6] * 3, 3, LENGTH).at(1, torch.randn(6, CHANNELS, dtype=torch.float64))
