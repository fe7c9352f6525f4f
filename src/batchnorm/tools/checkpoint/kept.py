"""What a checkpoint keeps of its batch norm layers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.tools.checkpoint.keys import BIAS, COUNT, MEAN, VAR, WEIGHT, join, prefixes
from batchnorm.tools.checkpoint.load import load

#: Nested containers that are looked into: more than anybody has, and few enough to write down.
DEEPEST = 64


@dataclass(frozen=True, eq=False)
class Kept:
    """What a file keeps of one batch norm layer.

    Attributes:
        place: of the state dict in the file; "" if it is the file.
        name: of the layer in its state dict.
        mean: running mean; None where the file has only a variance.
        var: running variance; None where the file has only a mean.
        updates: batches taken in; None without a counter.
        weight: γ, one value for each of the mean's; or None.
        bias: β, likewise.
    """

    place: str
    name: str
    mean: Tensor | None
    var: Tensor | None
    updates: int | None
    weight: Tensor | None
    bias: Tensor | None


def read(path: str | os.PathLike[str]) -> tuple[list[Kept], list[str]]:
    """The batch norm layers of a file, in its order; and notes on what was passed over.

    Raises:
        ArgumentError: there is no such file, or it may not be read.
        InputError: it is no checkpoint, is damaged, or holds objects that only code could rebuild.
        MissingDependencyError: it is a safetensors file, and safetensors is not installed.
    """
    found: list[Kept] = []
    notes: list[str] = []
    seen: set[str] = set()
    content = load(path)
    if not isinstance(content, (Mapping, list, tuple)):
        raise InputError(
            f"expected a state dict, got a file with one {type(content).__name__}: {path}; save "
            "with torch.save(model.state_dict(), …)"
        )
    for place, tensors in _state_dicts(content):
        for prefix in prefixes(tensors):
            layer = _kept(place, prefix, tensors)
            if layer is None:
                where = f"{place}.{prefix}".strip(".")
                notes.append(f"{where}: running statistics that are no plain tensors of numbers")
            else:
                found.append(layer)
                seen.add(place)
    if len(seen) == 1 and "" not in seen:
        notes.append(f"Layers are named as in {seen.pop()!r}, the state dict in the file.")
    return found, notes


def _state_dicts(root: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """All dictionaries with running statistics in them, and where they are."""
    waiting: list[tuple[str, int, Any]] = [("", 0, root)]
    seen: set[int] = set()
    while waiting:  # no recursion, which a hostile file could make too deep
        place, depth, node = waiting.pop()
        if id(node) in seen or depth > DEEPEST:
            continue
        seen.add(id(node))
        items = node.items() if isinstance(node, Mapping) else enumerate(node)
        tensors, deeper = {}, []
        for key, value in items:
            if isinstance(value, Tensor):
                tensors[str(key)] = value
            elif isinstance(value, (Mapping, list, tuple)):
                deeper.append((join(place, str(key)), depth + 1, value))
        if prefixes(tensors):
            yield place, tensors
        waiting.extend(reversed(deeper))


def _kept(place: str, prefix: str, tensors: Mapping[str, Tensor]) -> Kept | None:
    mean, var = (tensors.get(join(prefix, name)) for name in (MEAN, VAR))
    if not all(tensor is None or _plain(tensor) for tensor in (mean, var)):
        return None
    size = next(tensor.numel() for tensor in (mean, var) if tensor is not None)
    count = tensors.get(join(prefix, COUNT))
    layer, _, bank = prefix.rpartition(".banks.")
    homes = (prefix, layer) if bank and layer else (prefix,)

    def affine(names: tuple[str, ...]) -> Tensor | None:
        # Of a convolution that is kept together with its batch norm, "weight" is the filter.
        keys = (join(home, name) for home in homes for name in reversed(names))
        every = (tensors.get(key) for key in keys)
        fitting = (t for t in every if t is not None and _plain(t) and t.shape == (size,))
        return _counted(next(fitting, None))

    return Kept(
        place=place,
        name=prefix,
        mean=_counted(mean),
        var=_counted(var),
        updates=_number(count),
        weight=affine(WEIGHT),
        bias=affine(BIAS),
    )


def _plain(tensor: Tensor) -> bool:
    """Whether it is numbers, each with a place of its own: few bytes can claim to be many."""
    return (
        tensor.is_floating_point()
        and (tensor.dtype.itemsize > 1 or _short(tensor))
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and 0 < tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def _short(tensor: Tensor) -> bool:
    """Whether its numbers have 8 bits: torch stores such, and does next to nothing else."""
    return str(tensor.dtype).startswith("torch.float8")


def _counted(tensor: Tensor | None) -> Tensor | None:
    """As numbers that torch can work with."""
    return tensor.float() if tensor is not None and _short(tensor) else tensor


def _number(count: Tensor | None) -> int | None:
    """A counter's value; averaged copies of a model may have averaged it, too."""
    if count is None or count.numel() != 1 or count.is_meta or not bool(count.isfinite().all()):
        return None
    return int(count) if count >= 0 else None
