"""Which keys of a state dict are a batch norm layer's."""

from __future__ import annotations

from collections.abc import Iterable

MEAN, VAR, COUNT = "running_mean", "running_var", "num_batches_tracked"

#: γ and β, also by the outline's names.
WEIGHT, BIAS = ("weight", "gamma"), ("bias", "beta")


def of_batch_norms(keys: Iterable[str], every: Iterable[str]) -> list[str]:
    """Those of some keys that are a batch norm layer's, by all keys of the checkpoint."""
    layers = prefixes(every)
    # A bank may have its layer's γ and β.
    layers += [layer.rpartition(".banks.")[0] for layer in layers if ".banks." in layer]
    last = (MEAN, VAR, COUNT, *WEIGHT, *BIAS)
    names = {join(layer, name) for layer in layers for name in last}
    return [key for key in keys if key in names]


def prefixes(keys: Iterable[str]) -> list[str]:
    """Names of the layers among a state dict's keys."""
    split = (key.rpartition(".") for key in keys)
    return list(dict.fromkeys(prefix for prefix, _, last in split if last in (MEAN, VAR)))


def join(prefix: str, name: str) -> str:
    """As state dicts do."""
    return f"{prefix}.{name}" if prefix else name
