"""torch.func and gradcheck: each transform gives what a loop or finite differences give."""

import copy
import functools
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.functional import leaky_relu
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm, InputError, batch_norm, batch_norm_pure

# float64 throughout, values of size 1 to 10, at most some hundred operations: 1e2 · 10 · 2⁻⁵³.
close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
exactly = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def made(channels=4, **options):
    """A float64 layer whose parameters and statistics are not the initial ones."""
    layer = BatchNorm(channels, **options).double()
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return layer


def network():
    return nn.Sequential(nn.Linear(3, 4), made(), nn.Tanh(), nn.Linear(4, 2)).double()


def plain(x, weight, bias, activation="relu"):
    """Training-mode batch normalization of (N, C), written with torch's own differentiable sums."""
    var, mean = torch.var_mean(x, 0, correction=0)
    z = (x - mean) / (var + 1e-5).sqrt() * weight + bias
    return {"relu": z.relu(), "leaky_relu": leaky_relu(z), None: z}[activation]


def statistics(running_mean, running_var, x, momentum=0.1):
    var, mean = torch.var_mean(x, 0, correction=1)
    return (
        (1 - momentum) * running_mean + momentum * mean,
        (1 - momentum) * running_var + momentum * var,
    )


# --- evaluation: the layer under transforms ----------------------------------------------------


def test_vmap_over_batches_in_evaluation_is_a_loop():
    layer = made().eval()
    x = randn(5, 6, 4)
    close(vmap(layer)(x), torch.stack([layer(b) for b in x]))
    y = vmap(layer, in_dims=2, out_dims=2)(x.permute(1, 2, 0))
    close(y, torch.stack([layer(b) for b in x], 2))


@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
@pytest.mark.parametrize("activation", [None, "relu", torch.tanh], ids=["none", "relu", "tanh"])
def test_jacobian_in_evaluation(transform, activation):
    layer = made(activation=activation).eval()
    x = randn(3, 4)
    jacobian = transform(layer)(x)
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    z = (x - layer.running_mean) * scale + layer.bias
    slope = {None: torch.ones_like(z), "relu": (z > 0).double()}.get(activation)
    slope = 1 - z.tanh().square() if slope is None else slope
    expected = torch.diag((slope * scale).flatten()).reshape(3, 4, 3, 4)
    close(jacobian, expected)


def test_per_sample_gradients_in_evaluation_are_a_loop():
    model = network().eval()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    x, cotangent = randn(6, 3), randn(6, 2)

    def loss(parameters, x, cotangent):
        y = functional_call(model, (parameters, buffers), (x[None],))
        return (y * cotangent).sum()

    got = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, cotangent)
    for i in range(6):
        one = torch.autograd.grad(model(x[i : i + 1]), model.parameters(), cotangent[i : i + 1])
        for name, expected in zip(parameters, one, strict=True):
            close(got[name][i], expected)


def test_ensemble_over_stacked_parameters_and_buffers_in_evaluation():
    models = [network().eval() for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    x = randn(6, 3)

    def run(parameters, buffers, x):
        return functional_call(skeleton, (parameters, buffers), (x,))

    expected = torch.stack([model(x) for model in models])
    got = vmap(run, in_dims=(0, 0, None))(parameters, buffers, x)
    close(got, expected)


def test_ensemble_in_training_updates_stacked_buffers():
    """Buffers that the transform knows of may be changed in place."""
    models = [network() for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    x = randn(3, 6, 3)

    def run(parameters, buffers, x):
        return functional_call(skeleton, (parameters, buffers), (x,))

    got = vmap(run)(parameters, buffers, x)
    expected = torch.stack([model(batch) for model, batch in zip(models, x, strict=True)])
    close(got, expected)
    for name, stacked in buffers.items():
        one_by_one = torch.stack([dict(model.named_buffers())[name] for model in models])
        close(stacked, one_by_one)
    assert buffers["1.num_batches_tracked"].tolist() == [1, 1, 1]


# --- training: the layer refuses what would be lost, untracked layers run ----------------------

TRANSFORMS = {
    "vmap": lambda f, x: vmap(f)(x[None]),
    "grad": lambda f, x: grad(lambda x: f(x).square().sum())(x),
    "vjp": lambda f, x: vjp(f, x)[0],
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_that_would_change_captured_buffers_is_refused(name, momentum):
    model = nn.Sequential(nn.Linear(4, 4).double(), made(momentum=momentum))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"layer '1'.*captured.*batch_norm_pure") as caught:
        TRANSFORMS[name](model, randn(5, 4))
    assert "eval()" in str(caught.value)
    for key, value in model.state_dict().items():  # num_batches_tracked too
        exactly(value, before[key])


def test_function_that_would_change_captured_buffers_is_refused():
    mean, var = randn(4), randn(4).exp()
    before = mean.clone(), var.clone()
    with pytest.raises(InputError, match="captured"):
        vmap(lambda x: batch_norm(x, mean, var, training=True))(randn(2, 5, 4))
    exactly((mean, var), before)


@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_untracked_layer_in_training_may_be_transformed(transform):
    layer = made(track_running_stats=False)
    x = randn(5, 4)
    expected = transform(lambda x: plain(x, layer.weight, layer.bias, None))(x)
    close(transform(layer)(x), expected)
    batches = randn(3, 5, 4)
    loop = torch.stack([layer(batch) for batch in batches])
    close(vmap(layer)(batches), loop)


# --- training: the pure form ---------------------------------------------------------------------


def pure(x, weight, bias, activation=None, **options):
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    return batch_norm_pure(
        x, mean, var, weight, bias, training=True, activation=activation, **options
    )


def test_vmap_of_the_pure_form_is_a_loop():
    x, weight, bias = randn(5, 6, 4), randn(5, 4), randn(5, 4)
    got = vmap(pure)(x, weight, bias)
    loop = [pure(*arguments) for arguments in zip(x, weight, bias, strict=True)]
    for field, stacked in zip(zip(*loop, strict=True), got, strict=True):
        close(stacked, torch.stack(field))
    # And the loop is right.
    for one, batch, g, b in zip(loop, x, weight, bias, strict=True):
        close(one.output, plain(batch, g, b, None))
        mean, var = statistics(torch.zeros(4).double(), torch.ones(4).double(), batch)
        close((one.running_mean, one.running_var), (mean, var))


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_jacobians_of_the_pure_form(transform, activation):
    inputs = randn(5, 3), randn(3), randn(3)

    got = transform(lambda x, w, b: pure(x, w, b, activation).output, argnums=(0, 1, 2))(*inputs)
    expected = transform(lambda x, w, b: plain(x, w, b, activation), argnums=(0, 1, 2))(*inputs)
    close(got, expected)


def test_jvp_of_the_pure_form():
    inputs, tangents = (randn(5, 3), randn(3), randn(3)), (randn(5, 3), randn(3), randn(3))
    got = jvp(lambda *i: pure(*i).output, inputs, tangents)
    expected = jvp(lambda x, w, b: plain(x, w, b, None), inputs, tangents)
    close(got, expected)


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("argnum", [0, 1])
@pytest.mark.parametrize(
    "second",
    list(itertools.product((jacfwd, jacrev), repeat=2)),
    ids=lambda pair: " over ".join(transform.__name__ for transform in pair),
)
def test_hessian_of_the_pure_form(second, argnum, activation):
    inputs, cotangent = (randn(5, 2), randn(2), randn(2)), randn(5, 2)

    def loss(form):
        # Squared: y is linear in γ, and its own second derivative by it is zero.
        return lambda *inputs: (form(*inputs).square() * cotangent).sum()

    outer, inner = second
    ours = loss(lambda x, w, b: pure(x, w, b, activation).output)
    got = outer(inner(ours, argnum), argnum)(*inputs)
    expected = hessian(loss(lambda x, w, b: plain(x, w, b, activation)), argnum)(*inputs)
    assert expected.abs().max() > 0.1
    close(got, expected)


def test_per_sample_gradients_in_training():
    """Each sample's loss by the parameters, with the statistics of the whole batch."""
    x, weight, bias, cotangent = randn(6, 4), randn(4), randn(4), randn(6, 4)

    def losses(form):
        return lambda weight, bias: (form(x, weight, bias) * cotangent).square().sum(1)

    ours = losses(lambda x, w, b: pure(x, w, b, "relu").output)
    got = jacrev(ours, argnums=(0, 1))(weight, bias)
    w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    loop = [torch.autograd.grad(one, (w, b), retain_graph=True) for one in losses(plain)(w, b)]
    expected = tuple(torch.stack(each) for each in zip(*loop, strict=True))
    close(got, expected)


def test_per_batch_gradients_in_training_are_a_loop():
    """vmap over grad: one gradient a batch, each with its own statistics and mask."""
    x, weight, bias, cotangent = randn(3, 6, 4), randn(4), randn(4), randn(3, 6, 4)
    mask = torch.rand(3, 6) > 0.3

    def loss(weight, bias, x, mask, cotangent):
        y, mean, var = pure(x, weight, bias, mask=mask, activation="leaky_relu")
        return (y * cotangent).sum(), (mean, var)

    transform = grad(loss, argnums=(0, 1, 2), has_aux=True)
    got, (mean, var) = vmap(transform, in_dims=(None, None, 0, 0, 0))(
        weight, bias, x, mask, cotangent
    )
    for i in range(3):
        leaves = [t.clone().requires_grad_() for t in (weight, bias, x[i])]
        counted = leaves[2][mask[i]]
        v, m = torch.var_mean(counted, 0, correction=0)
        z = (leaves[2] - m) / (v + 1e-5).sqrt() * leaves[0] + leaves[1]
        expected = torch.autograd.grad(leaky_relu(z), leaves, cotangent[i])
        close(tuple(g[i] for g in got), expected)
        zeros, ones = torch.zeros(4).double(), torch.ones(4).double()
        moved = statistics(zeros, ones, counted.detach())
        close((mean[i], var[i]), moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_pure_form_is_the_in_place_form_to_the_bit(training, masked, dtype):
    x, residual = torch.randn(6, 4, 3).to(dtype), torch.randn(6, 4, 3).to(dtype)
    mean, var = torch.randn(4), torch.rand(4) + 0.5
    options: dict[str, Any] = {
        "weight": torch.randn(4),
        "bias": torch.randn(4),
        "training": training,
        "momentum": 0.3,
        "mask": torch.rand(6, 3) > 0.3 if masked else None,
        "residual": residual,
        "activation": "leaky_relu",
    }
    old = mean.clone(), var.clone()
    pure_form = batch_norm_pure(x, mean, var, **options)
    exactly((mean, var), old)
    in_place = batch_norm(x, mean, var, **options)
    exactly(pure_form, (in_place, mean, var))
    assert (mean == old[0]).all() != training


def test_pure_form_refuses_nan_channels_silently():
    x, mean, var = randn(5, 2), randn(2), randn(2).exp()
    expected = statistics(mean, var, x)
    x[1, 0] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, new_mean, new_var = batch_norm_pure(x, mean, var, training=True)
    assert new_mean is not None
    assert new_var is not None
    assert (new_mean[0], new_var[0]) == (mean[0], var[0])
    close((new_mean[1], new_var[1]), tuple(e[1] for e in expected))


# --- gradients against finite differences --------------------------------------------------------

MASKS = {
    "none": None,
    "bool": torch.tensor([[True, True, False], [True, False, True]]),
    "weights": torch.tensor([[0.5, 2.0, 0.0], [1.0, 1.5, 0.25]], dtype=torch.float64),
}
SHAPES = {1: (2, 2, 3), -1: (2, 3, 2)}


def problem(mask, residual, activation, channel_dim, training):
    """A function of (x, weight, bias, residual or None) and a point to differentiate it at."""
    x = randn(*SHAPES[channel_dim]).requires_grad_()
    added = randn(*x.shape).requires_grad_() if residual else None
    inputs = (x, randn(2).requires_grad_(), randn(2).requires_grad_(), added)
    mean, var = randn(2), randn(2).exp()

    def function(x, weight, bias, residual, activation=activation):
        return batch_norm_pure(
            x,
            mean,
            var,
            weight,
            bias,
            training,
            mask=MASKS[mask],
            residual=residual,
            channel_dim=channel_dim,
            activation=activation,
        ).output

    # The steps of finite differences, 1e-6, must not cross the kink of an activation: draw again.
    if function(*inputs, None).abs().min() < 1e-4:
        return problem(mask, residual, activation, channel_dim, training)
    return function, inputs


PROBLEMS = pytest.mark.parametrize(
    ("mask", "residual", "activation", "channel_dim", "training"),
    [
        (mask, residual, activation, channel_dim, training)
        for mask in MASKS
        for residual in (False, True)
        for activation in (None, "relu", "leaky_relu", torch.tanh)
        for channel_dim in SHAPES
        for training in (True, False)
    ],
)


@PROBLEMS
def test_first_derivatives(mask, residual, activation, channel_dim, training):
    """Reverse, forward and both batched, with random cotangents, against finite differences."""
    function, inputs = problem(mask, residual, activation, channel_dim, training)
    assert gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )


@PROBLEMS
def test_second_derivatives(mask, residual, activation, channel_dim, training):
    function, inputs = problem(mask, residual, activation, channel_dim, training)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_forward_pass_counts_once(reentrant):
    model = network()
    plain_model, x, cotangent = copy.deepcopy(model), randn(6, 3), randn(6, 2)
    gradients = []
    for run in (plain_model, functools.partial(checkpoint, model, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        run(leaf).backward(cotangent)
        gradients.append(leaf.grad)
    close(gradients[1], gradients[0])
    for name, buffer in plain_model.named_buffers():
        close(model.get_buffer(name), buffer)
