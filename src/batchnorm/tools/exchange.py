"""Weights from elsewhere: batch norm layers of Keras and Flax, in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import ArgumentError, InputError
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.tools.freeze import freeze, is_frozen

#: Their names for γ, β and the running statistics, in the order of a layer's own weights.
_KERAS = ("gamma", "beta", "moving_mean", "moving_variance")
_FLAX = ("scale", "bias", "mean", "var")

#: What Keras 3 and Flax (linen and nnx) take if nothing is said.
_KERAS_DEFAULTS = {"epsilon": 1e-3, "momentum": 0.99, "axis": -1}
_FLAX_DEFAULTS = {"epsilon": 1e-5, "momentum": 0.99, "axis": -1}


def from_keras(source: Any, **config: Any) -> BatchNorm:
    """A `BatchNorm` that computes what a `keras.layers.BatchNormalization` does.

        eps = epsilon        momentum = 1 − their momentum        channel_dim = axis

    Keras weighs the old value with its momentum, we the new one. What evaluation computes is the
    same. In training, Keras's moving variance takes in the biased variance of a batch and ours the
    unbiased one, n / (n − 1) times as large: over the n values per channel of a batch, this is what
    the running variances differ by. Counted batches start at 0.

    Args:
        source: the layer, built; or its weights by name: gamma, beta, moving_mean,
            moving_variance, arrays of any kind, the first two if it has them.
        config: epsilon, momentum and axis, in place of the layer's, or of Keras's defaults (1e-3,
            0.99, -1). Keras 2 saved the axis as a list of one, which will do too.

    Returns:
        The layer, frozen if the one of Keras is not trainable. Without gamma, γ is 1 and takes no
        gradient.

    Raises:
        ArgumentError: the layer is not built, or renormalises; a name is unknown or missing.
        InputError: the weights do not fit each other.

    Example:
        >>> import numpy as np
        >>> from batchnorm import from_keras
        >>> weights = {"gamma": np.ones(8), "beta": np.zeros(8)}
        >>> weights |= {"moving_mean": np.zeros(8), "moving_variance": np.ones(8)}
        >>> from_keras(weights)
        BatchNorm(8, eps=0.001, momentum=0.01, affine=True, ..., channel_dim=-1)
    """
    defaults: dict[str, Any] = _KERAS_DEFAULTS
    if not isinstance(source, Mapping):
        _check_layer(source, (*_KERAS[2:], *defaults), "keras.layers.BatchNormalization")
        if getattr(source, "renorm", False):
            raise ArgumentError(
                "expected a layer that normalises plainly, got one with renorm=True; for what it "
                "computes in evaluation, pass its weights by name"
            )
        defaults = {name: getattr(source, name) for name in defaults}
        weights = {name: getattr(source, name, None) for name in _KERAS}
    else:
        weights = dict(source)
    layer = _layer(weights, _KERAS, _merged(defaults, config))
    if not isinstance(source, Mapping):
        if getattr(source, "synchronized", False):
            layer.process_group = "world"
        if not getattr(source, "trainable", True):
            freeze(layer)
    return layer


def to_keras(layer: BatchNorm) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a `keras.layers.BatchNormalization` takes to compute what a `BatchNorm` does.

    Args:
        layer: without what Keras's cannot do.

    Returns:
        The keyword arguments of the layer, and its weights by name as NumPy arrays, in the order of
        `set_weights`: `theirs = keras.layers.BatchNormalization(**config)`, `theirs.build(shape)`,
        `theirs.set_weights(list(weights.values()))`.

    Raises:
        ArgumentError: it has an activation, banks, or other options that Keras's layer has not.

    Example:
        >>> from batchnorm import BatchNorm, to_keras
        >>> config, weights = to_keras(BatchNorm(8, channel_dim=-1))
        >>> config
        {'epsilon': 1e-05, 'momentum': 0.9, 'axis': -1, 'scale': True, 'center': True}
        >>> list(weights)
        ['gamma', 'beta', 'moving_mean', 'moving_variance']
    """
    config, weights = _given(layer, _KERAS, "Keras")
    more = {"scale": "gamma" in weights, "center": "beta" in weights}
    if is_frozen(layer):
        more["trainable"] = False
    return config | more, weights


def from_flax(source: Any, **config: Any) -> BatchNorm:
    """A `BatchNorm` that computes what a `flax.nnx.BatchNorm` or `flax.linen.BatchNorm` does.

        eps = epsilon        momentum = 1 − their momentum        channel_dim = axis

    As for `from_keras`, what evaluation computes is the same, and running variances take in the
    biased variance there and the unbiased one here.

    Args:
        source: an nnx layer; or variables of one linen layer, `{"params": {"scale": …, "bias": …},
            "batch_stats": {"mean": …, "var": …}}`, arrays of any kind, params as far as it has
            them.
        config: epsilon, momentum and axis, in place of the layer's, or of Flax's defaults (1e-5,
            0.99, -1).

    Returns:
        The layer; in `eval()` if the nnx layer has use_running_average, and with the process_group
        "world" if it has an axis_name. Without scale, γ is 1 and takes no gradient.

    Raises:
        ArgumentError: a name is unknown or missing, or the layer shares with some only
            (axis_index_groups).
        InputError: the weights do not fit each other.

    Example:
        >>> import numpy as np
        >>> from batchnorm import from_flax
        >>> statistics = {"mean": np.zeros(8), "var": np.ones(8)}
        >>> from_flax({"params": {"bias": np.zeros(8)}, "batch_stats": statistics}, momentum=0.9)
        BatchNorm(8, eps=1e-05, momentum=0.1, affine=True, ..., channel_dim=-1)
    """
    defaults: dict[str, Any] = _FLAX_DEFAULTS
    if not isinstance(source, Mapping):
        _check_layer(source, (*_FLAX[2:], *defaults), "flax.nnx.BatchNorm")
        defaults = {name: getattr(source, name) for name in defaults}
        if getattr(source, "axis_index_groups", None) is not None:
            raise ArgumentError(
                "expected a layer that shares its statistics with all or none, got one with "
                "axis_index_groups; pass its weights by name, and set process_group to such a group"
            )
        weights = {name: getattr(source, name, None) for name in _FLAX}
    else:
        known = set(source) <= {"params", "batch_stats"} and "batch_stats" in source
        if not known or not all(isinstance(part, Mapping) for part in source.values()):
            raise ArgumentError(
                "expected the variables of one layer, {'params': {'scale', 'bias'}, 'batch_stats': "
                f"{{'mean', 'var'}}}}, got {sorted(map(str, source))}"
            )
        weights = {**source.get("params", {}), **source["batch_stats"]}
    layer = _layer(weights, _FLAX, _merged(defaults, config))
    if not isinstance(source, Mapping):
        if getattr(source, "axis_name", None) is not None:
            layer.process_group = "world"
        layer.train(not getattr(source, "use_running_average", False))
    return layer


def to_flax(layer: BatchNorm) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What a `flax.linen.BatchNorm` or `flax.nnx.BatchNorm` takes to compute what ours does.

    Args:
        layer: without what Flax's cannot do.

    Returns:
        The keyword arguments of the layer, with use_running_average if ours is frozen, and the
        variables of a linen layer as NumPy arrays.

    Raises:
        ArgumentError: it has an activation, banks, or other options that Flax's layer has not.

    Example:
        >>> from batchnorm import BatchNorm, to_flax
        >>> config, variables = to_flax(BatchNorm(8, bias=False, channel_dim=-1))
        >>> config
        {'epsilon': 1e-05, 'momentum': 0.9, 'axis': -1, 'use_scale': True, 'use_bias': False}
        >>> {kind: list(arrays) for kind, arrays in variables.items()}
        {'params': ['scale'], 'batch_stats': ['mean', 'var']}
    """
    config, weights = _given(layer, _FLAX, "Flax")
    parts: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    for name, array in weights.items():
        parts["params" if name in _FLAX[:2] else "batch_stats"][name] = array
    config |= {"use_scale": "scale" in weights, "use_bias": "bias" in weights}
    if is_frozen(layer):
        config["use_running_average"] = True
    return config, parts


def _check_layer(source: Any, names: Sequence[str], kind: str) -> None:
    missing = [name for name in names if getattr(source, name, None) is None]
    if missing:
        raise ArgumentError(
            f"expected a {kind} that has been built, or its weights by name, got "
            f"{type(source).__name__} without {', '.join(missing)}"
        )


def _merged(defaults: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(config) - set(defaults)):
        raise ArgumentError(
            f"expected {', '.join(defaults)} besides the weights, got {', '.join(unknown)}"
        )
    merged = defaults | config
    momentum, axis = merged["momentum"], merged["axis"]
    if not isinstance(momentum, Real) or isinstance(momentum, bool):
        raise ArgumentError(f"expected momentum to be a number, got {momentum!r}")
    if isinstance(axis, Sequence) and len(axis) == 1:
        merged["axis"] = axis[0]
    return merged


def _layer(weights: dict[str, Any], names: Sequence[str], config: dict[str, Any]) -> BatchNorm:
    """From weights by their names, and their settings."""
    scale, shift, mean, var = names
    given = {name: value for name, value in weights.items() if value is not None}
    if set(given) - set(names) or not {mean, var} <= set(given):
        raise ArgumentError(
            f"expected the weights {mean} and {var}, and {scale} and {shift} if there are, of one "
            f"layer, got {', '.join(map(str, given)) or 'none'}"
        )
    tensors = {name: _tensor(name, value) for name, value in given.items()}
    if len({tuple(tensor.shape) for tensor in tensors.values()}) > 1 or tensors[mean].dim() != 1:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise InputError(f"expected weights of one shape, (channels,), got {shapes}")
    affine = scale in tensors or shift in tensors
    layer = BatchNorm(
        len(tensors[mean]),
        eps=config["epsilon"],
        # Rounded: 1 − 0.99 is 0.010000000000000009.
        momentum=round(1 - config["momentum"], 12),
        affine=affine,
        bias=shift in tensors,
        channel_dim=config["axis"],
        dtype=tensors[scale if scale in tensors else shift if affine else mean].dtype,
    )
    ours = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    with torch.no_grad():
        for name, tensor in zip(names, ours, strict=True):
            if tensor is not None and name in tensors:
                tensor.copy_(tensors[name])
    if affine and scale not in tensors:
        layer.weight.requires_grad_(False)
    return layer


def _tensor(name: str, value: Any) -> Tensor:
    import numpy as np

    if isinstance(value, Tensor):
        return value.detach().cpu()
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":  # NumPy's own has no such dtype
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"expected {name} to be an array of a floating dtype, got {array.dtype}")
    return torch.from_numpy(np.array(array))


def _given(layer: BatchNorm, names: Sequence[str], whose: str) -> tuple[dict[str, Any], Any]:
    """Settings and weights of ours, by their names."""
    if not isinstance(layer, BatchNorm):
        raise ArgumentError(f"expected a batchnorm.BatchNorm, got {type(layer).__name__}")
    if layer.running_mean is None or layer.momentum is None:
        raise ArgumentError(
            f"expected running statistics with a momentum, which {whose}'s layer has, got {layer}"
        )
    lost = [
        name
        for name in ("activation", "virtual_batch_size", "renorm", "process_group")
        if getattr(layer, name) is not None
    ]
    lost += ["banks"] if "banks" in layer._modules else []
    if lost:
        raise ArgumentError(
            f"expected a layer that {whose}'s can stand for, got one with {', '.join(lost)}: put "
            "an activation after it, and set what matters in training only to None"
        )
    config = {
        "epsilon": layer.eps,
        "momentum": round(1 - float(layer.momentum), 12),
        "axis": layer.channel_dim,
    }
    ours = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    weights = {
        name: _array(tensor) for name, tensor in zip(names, ours, strict=True) if tensor is not None
    }
    return config, weights


def _array(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy().copy()
