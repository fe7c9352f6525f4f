"""Weights of Keras and Flax, in and out, against their own layers where they are installed."""

import numpy as np
import pytest
import torch

from batchnorm import (
    ArgumentError,
    BatchNorm,
    BatchNormError,
    InputError,
    Renorm,
    bank,
    freeze,
    from_flax,
    from_keras,
    to_flax,
    to_keras,
)

# Their imports warn of their own dependencies.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

C = 3
SHAPES = {(6, 3): 1, (6, 4, 3): -1, (6, 3, 4, 2): 1, (6, 2, 4, 3): -1}
EVERY_SHAPE = pytest.mark.parametrize(("shape", "axis"), SHAPES.items(), ids=map(str, SHAPES))
AFFINE = pytest.mark.parametrize(("scale", "shift"), [(1, 1), (1, 0), (0, 1), (0, 0)])


@pytest.fixture(scope="module")
def keras():
    return pytest.importorskip("keras")


@pytest.fixture(scope="module")
def nnx():
    return pytest.importorskip("flax.nnx")


@pytest.fixture(scope="module")
def linen():
    return pytest.importorskip("flax.linen")


def values():
    """γ, β, running mean and running variance."""
    generator = np.random.default_rng(0)
    return [generator.uniform(0.5, 1.5, C).astype(np.float32) for _ in range(4)]


def data(shape):
    return np.random.default_rng(1).normal(1, 2, shape).astype(np.float32)


def assert_close(got, expected):
    # A dozen roundings, to 2⁻²⁴, of numbers up to 10.
    got = got.detach().numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
    np.testing.assert_allclose(got, np.asarray(expected), rtol=1e-5, atol=1e-5)


def biased(layer, before, shape):
    """The running variance as Keras and Flax count it, from ours after one step."""
    n = np.prod(shape) // C
    old = (1 - layer.momentum) * before
    return old + (layer.running_var.numpy() - old) * (n - 1) / n


def keras_layer(keras, shape, axis, scale=True, shift=True, **options):
    theirs = keras.layers.BatchNormalization(
        axis=axis, scale=bool(scale), center=bool(shift), **options
    )
    theirs.build(shape)
    gamma, beta, mean, var = values()
    theirs.set_weights([*[gamma] * bool(scale), *[beta] * bool(shift), mean, var])
    return theirs


def numbers(keras, tensor):
    return keras.ops.convert_to_numpy(tensor)


@EVERY_SHAPE
@AFFINE
def test_from_keras(keras, shape, axis, scale, shift):
    theirs = keras_layer(keras, shape, axis, scale, shift, momentum=0.7)
    ours = from_keras(theirs)
    assert (ours.eps, ours.momentum, ours.channel_dim) == (1e-3, 0.3, axis)
    assert [p.requires_grad for p in ours.parameters()] == [bool(scale)] * (scale or shift) + [
        True
    ] * shift
    x = data(shape)
    assert_close(ours.eval()(torch.from_numpy(x)), numbers(keras, theirs(x, training=False)))
    assert_close(ours.train()(torch.from_numpy(x)), numbers(keras, theirs(x, training=True)))
    assert_close(ours.running_mean, numbers(keras, theirs.moving_mean))
    assert_close(biased(ours, values()[3], shape), numbers(keras, theirs.moving_variance))


@EVERY_SHAPE
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"affine": False}])
def test_to_keras_and_back(keras, shape, axis, options):
    ours = BatchNorm(C, eps=0.01, momentum=0.25, channel_dim=axis, **options)
    tensors = (ours.weight, ours.bias, ours.running_mean, ours.running_var)
    with torch.no_grad():
        for tensor, value in zip(tensors, values(), strict=True):
            if tensor is not None:
                tensor.copy_(torch.from_numpy(value))
    config, weights = to_keras(ours)
    theirs = keras.layers.BatchNormalization(**config)
    theirs.build(shape)
    theirs.set_weights(list(weights.values()))
    x = data(shape)
    before = ours.running_var.numpy().copy()
    assert_close(ours.eval()(torch.from_numpy(x)), numbers(keras, theirs(x, training=False)))
    back = from_keras(theirs)
    assert back.state_dict().keys() == ours.state_dict().keys()
    for name, value in back.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
    assert str(back) == str(ours)
    assert_close(ours.train()(torch.from_numpy(x)), numbers(keras, theirs(x, training=True)))
    assert_close(biased(ours, before, shape), numbers(keras, theirs.moving_variance))


def test_keras_layers_that_do_not_train(keras):
    theirs = keras_layer(keras, (6, 3), 1, trainable=False)
    ours = from_keras(theirs)
    x = data((6, 3))
    assert_close(ours.train()(torch.from_numpy(x)), numbers(keras, theirs(x, training=True)))
    assert ours.num_batches_tracked == 0
    assert not ours.weight.requires_grad
    config, _ = to_keras(ours)
    assert config["trainable"] is False


def test_keras_layers_that_share(keras):
    theirs = keras_layer(keras, (6, 3), 1)
    assert from_keras(theirs).process_group is None
    theirs.synchronized = True  # its constructor allows it with TensorFlow only
    assert from_keras(theirs).process_group == "world"


def test_keras_layers_that_cannot_be_taken(keras):
    with pytest.raises(ArgumentError, match=r"built.*without moving_mean, moving_variance"):
        from_keras(keras.layers.BatchNormalization())
    with pytest.raises(ArgumentError, match="got LayerNormalization without"):
        from_keras(keras.layers.LayerNormalization())
    theirs = keras.layers.BatchNormalization(renorm=True)
    theirs.build((6, 3))
    with pytest.raises(ArgumentError, match="renorm=True"):
        from_keras(theirs)


def nnx_layer(nnx, axis, scale=True, shift=True, **options):
    theirs = nnx.BatchNorm(
        C, axis=axis, use_scale=bool(scale), use_bias=bool(shift), rngs=nnx.Rngs(0), **options
    )
    gamma, beta, mean, var = values()
    theirs.mean[...], theirs.var[...] = mean, var
    if scale:
        theirs.scale[...] = gamma
    if shift:
        theirs.bias[...] = beta
    return theirs


@EVERY_SHAPE
@AFFINE
def test_from_flax_nnx(nnx, shape, axis, scale, shift):
    theirs = nnx_layer(nnx, axis, scale, shift, momentum=0.7)
    ours = from_flax(theirs)
    assert (ours.eps, ours.momentum, ours.channel_dim) == (1e-5, 0.3, axis)
    x = data(shape)
    theirs.eval()
    assert_close(ours.eval()(torch.from_numpy(x)), theirs(x))
    theirs.train()
    assert_close(ours.train()(torch.from_numpy(x)), theirs(x))
    assert_close(ours.running_mean, theirs.mean[...])
    assert_close(biased(ours, values()[3], shape), theirs.var[...])


@EVERY_SHAPE
@AFFINE
def test_flax_linen_both_ways(linen, shape, axis, scale, shift):
    module = linen.BatchNorm(axis=axis, use_scale=bool(scale), use_bias=bool(shift))
    gamma, beta, mean, var = values()
    variables = {
        "params": {**({"scale": gamma} if scale else {}), **({"bias": beta} if shift else {})},
        "batch_stats": {"mean": mean, "var": var},
    }
    x = data(shape)
    ours = from_flax(variables, axis=axis)
    expected = module.apply(variables, x, use_running_average=True)
    assert_close(ours.eval()(torch.from_numpy(x)), expected)
    config, given = to_flax(ours)
    again = linen.BatchNorm(**config)
    assert_close(again.apply(given, x, use_running_average=True), expected)
    y, changed = again.apply(given, x, use_running_average=False, mutable=["batch_stats"])
    assert_close(ours.train()(torch.from_numpy(x)), y)
    assert_close(ours.running_mean, changed["batch_stats"]["mean"])
    assert_close(biased(ours, var, shape), changed["batch_stats"]["var"])


def test_defaults_are_theirs(keras, nnx, linen):
    theirs = keras.layers.BatchNormalization()
    weights = dict(zip(("gamma", "beta", "moving_mean", "moving_variance"), values(), strict=True))
    ours = from_keras(weights)
    assert (ours.eps, ours.channel_dim) == (theirs.epsilon, theirs.axis)
    assert ours.momentum == pytest.approx(1 - theirs.momentum, abs=1e-15)
    scale, bias, mean, var = values()
    ours = from_flax(
        {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}
    )
    for theirs in (nnx_layer(nnx, -1), linen.BatchNorm()):
        assert (ours.eps, ours.channel_dim) == (theirs.epsilon, theirs.axis)
        assert ours.momentum == pytest.approx(1 - theirs.momentum, abs=1e-15)


def test_arrays_of_every_kind():
    """float64 stays so, bfloat16 as JAX has it comes as such, tensors are as good as arrays."""
    gamma, beta, mean, var = values()
    weights = {"gamma": gamma, "beta": beta, "moving_mean": mean, "moving_variance": var}
    wide = from_keras({name: value.astype(np.float64) for name, value in weights.items()})
    assert wide.weight.dtype is wide.running_var.dtype is torch.float64
    tensors = from_keras({name: torch.from_numpy(value) for name, value in weights.items()})
    lists = from_keras({name: list(map(float, value)) for name, value in weights.items()})
    for name, value in zip(
        ("weight", "bias", "running_mean", "running_var"), values(), strict=True
    ):
        assert torch.equal(getattr(tensors, name), torch.from_numpy(value))
        assert torch.equal(getattr(lists, name).float(), torch.from_numpy(value))
    parameter = torch.nn.Parameter(torch.from_numpy(gamma).bfloat16())
    assert torch.equal(from_keras({**weights, "gamma": parameter}).weight, parameter)
    with torch.no_grad():
        tensors.weight.zero_()
    assert gamma.all()
    ml_dtypes = pytest.importorskip("ml_dtypes")
    half = from_keras({name: value.astype(ml_dtypes.bfloat16) for name, value in weights.items()})
    assert half.weight.dtype is torch.bfloat16
    assert half.running_var.dtype is torch.float32
    assert torch.equal(half.weight, torch.from_numpy(gamma).bfloat16())
    config, given = to_keras(half)
    assert given["gamma"].dtype == np.float32
    given["gamma"][:] = 0
    assert half.weight.all()


def test_weights_that_do_not_fit():
    gamma, beta, mean, var = values()
    statistics = {"moving_mean": mean, "moving_variance": var}
    for weights, error, message in [
        ({"gamma": gamma}, ArgumentError, "weights moving_mean and moving_variance.* got gamma"),
        ({"scale": gamma, **statistics}, ArgumentError, "got scale, moving_mean"),
        ({"gamma": gamma[:2], **statistics}, InputError, r"one shape.*gamma \(2,\)"),
        ({name: value[None] for name, value in statistics.items()}, InputError, "one shape"),
        ({**statistics, "beta": beta.astype(int)}, InputError, "beta to be .*floating.*int64"),
    ]:
        with pytest.raises(error, match=message):
            from_keras(weights)
    with pytest.raises(ArgumentError, match=r"epsilon, momentum, axis.*got eps"):
        from_keras(statistics, eps=1e-3)
    with pytest.raises(BatchNormError, match="momentum in"):
        from_keras(statistics, momentum=1.5)
    variables = {"batch_stats": {"mean": mean, "var": var}}
    assert from_flax(variables).weight is None
    for wrong in (
        {"params": {}},
        {"BatchNorm_0": variables},
        {"batch_stats": {"BatchNorm_0": {"mean": mean, "var": var}}},
    ):
        with pytest.raises(ArgumentError, match="of one layer"):
            from_flax(wrong)
    with pytest.raises(ArgumentError, match=r"flax\.nnx\.BatchNorm.* got Linear without mean"):
        from_flax(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("to", [to_keras, to_flax])
def test_what_they_cannot_do_is_refused(to):
    fake = BatchNorm(C)
    bank(fake, "fake")
    for layer, message in [
        (BatchNorm(C, activation="relu"), "got one with activation"),
        (BatchNorm(C, renorm=Renorm(), virtual_batch_size=2), "with virtual_batch_size, renorm"),
        (BatchNorm(C, process_group="world"), "with process_group"),
        (fake, "with banks"),
        (BatchNorm(C, momentum=None), "running statistics with a momentum"),
        (BatchNorm(C, track_running_stats=False), "running statistics with a momentum"),
        (torch.nn.BatchNorm2d(C), r"expected a batchnorm\.BatchNorm, got BatchNorm2d"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            to(layer)


def test_frozen_layers_say_so(linen):
    layer = BatchNorm(C)
    freeze(layer)
    assert to_keras(layer)[0]["trainable"] is False
    assert "trainable" not in to_keras(BatchNorm(C))[0]
    config, variables = to_flax(layer)
    assert config["use_running_average"] is True
    assert "use_running_average" not in to_flax(BatchNorm(C))[0]
    x = data((6, C))
    y, changed = linen.BatchNorm(**config).apply(variables, x, mutable=["batch_stats"])
    assert_close(layer.train()(torch.from_numpy(x)), y)
    np.testing.assert_array_equal(changed["batch_stats"]["mean"], variables["batch_stats"]["mean"])


def test_modes_of_nnx_layers_come_along(nnx):
    theirs = nnx_layer(nnx, 1)
    assert from_flax(theirs).training
    theirs.eval()
    ours = from_flax(theirs)
    assert not ours.training
    x = data((6, C))
    assert_close(ours(torch.from_numpy(x)), theirs(x))
    assert from_flax(nnx_layer(nnx, 1, use_running_average=True)).training is False


def test_nnx_layers_that_share(nnx):
    assert from_flax(nnx_layer(nnx, 1)).process_group is None
    assert from_flax(nnx_layer(nnx, 1, axis_name="batch")).process_group == "world"
    some = nnx_layer(nnx, 1, axis_name="batch", axis_index_groups=[[0, 1], [2, 3]])
    with pytest.raises(ArgumentError, match="all or none, got one with axis_index_groups"):
        from_flax(some)


def test_settings_as_they_are_saved():
    statistics = dict(zip(("moving_mean", "moving_variance"), values()[2:], strict=True))
    assert from_keras(statistics, axis=[3]).channel_dim == 3  # Keras 2
    given = from_keras(statistics, momentum=np.float32(0.75), axis=np.int64(-1))
    assert (given.momentum, given.channel_dim) == (0.25, -1)
    for settings, message in [
        ({"momentum": None}, "momentum to be a number, got None"),
        ({"momentum": "0.9"}, "momentum to be a number, got '0.9'"),
        ({"momentum": True}, "momentum to be a number, got True"),
        ({"axis": [1, 2]}, r"channel_dim to be an integer, got \[1, 2\]"),
        ({"epsilon": 0.0}, "eps > 0"),
    ]:
        with pytest.raises(ArgumentError, match=f"expected {message}"):
            from_keras(statistics, **settings)


@pytest.mark.parametrize("to", [to_keras, to_flax])
def test_numbers_go_out_as_they_are_and_as_copies(to):
    layer = BatchNorm(C, momentum=0.01234567, eps=1e-7)
    config, weights = to(layer)
    assert config["momentum"] == pytest.approx(0.98765433, abs=1e-12)
    assert config["epsilon"] == 1e-7
    for part in weights.values():
        for array in part.values() if isinstance(part, dict) else [part]:
            array[:] = 7
    fresh = BatchNorm(C).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in layer.state_dict().items())
