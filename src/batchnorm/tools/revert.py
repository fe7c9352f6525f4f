"""Converting back: the `BatchNorm` layers of a model become torch's."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from batchnorm.errors import ArgumentError
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.tools.feeding import call, untouched
from batchnorm.tools.layers import every_batch_norm
from batchnorm.tools.lazy import LAZY, LazyBatchNorm
from batchnorm.tools.origin import EVERY_RANK, ORIGIN, RANKS, TINY, Origin, become_theirs
from batchnorm.tools.same import difference

M = TypeVar("M", bound=nn.Module)  # mutant: for type checkers

#: What matters in training only, and torch's layers have not.
_TRAINING = ("virtual_batch_size", "renorm")


def revert(model: M, example_inputs: Any = None) -> M:
    """Turn every `BatchNorm` of a model back into a layer of torch's, in place.

    A converted layer becomes what it was; options that `convert` gave it for training
    (virtual_batch_size, renorm, process_group) end, and half precision running statistics are
    that again, if γ and β are. Any other becomes a torch.nn.BatchNorm1d, 2d or
    3d, according to the input that it gets; or a SyncBatchNorm, if it has a process_group. What
    is computed in evaluation stays the same, which is tried with made-up numbers, on a copy of each
    layer, before anything is changed. As with `convert`, modules, parameters, hooks, modes and
    state dicts stay; a layer frozen by `freeze` stays so.

    Args:
        model: with any batch norm layers; or one such layer.
        example_inputs: a batch that passes the model, for layers that were not converted: a
            tensor, a tuple with the input first, or a dict of keyword arguments.

    Returns:
        The model.

    Raises:
        ArgumentError: there are no batch norm layers, or one does what torch's cannot (an
            activation, another channel axis, banks, …), or it is not known which of torch's layers
            takes its input; the message names each. Nothing has been changed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import BatchNorm, revert
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNorm(8), nn.ReLU())
        >>> revert(model, torch.randn(2, 3, 8, 8))[1]
        BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, ...)
    """
    layers = [(name, it) for name, it in every_batch_norm(model) if isinstance(it, BatchNorm)]
    seen = _ranks(model, [it for _, it in layers], example_inputs)
    kinds = []
    refused = []
    for name, layer in layers:
        try:
            kinds.append(_kind(layer, seen[layer]))
        except ArgumentError as error:
            refused.append(f"{layer} at {name or 'the top'!r}: {error}")
    if refused:
        raise ArgumentError("expected layers that torch has a class for, got " + "; ".join(refused))
    for (_, layer), kind in zip(layers, kinds, strict=True):
        become_theirs(layer, kind, _remembered(layer, kind))
    return model


def _ranks(model: nn.Module, layers: list[BatchNorm], batch: Any) -> dict[BatchNorm, set[int]]:
    """The ranks of what each layer gets."""
    seen: dict[BatchNorm, set[int]] = {layer: set() for layer in layers}
    if batch is None or not layers:
        return seen

    def look(layer: Any, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["x"]
        seen[layer].add((x.data if isinstance(x, PackedSequence) else x).dim())

    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        with untouched(model):
            call(model.eval(), batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _remembered(layer: BatchNorm, kind: type[nn.Module] | None = None) -> Origin | None:
    """What it was, if that is of this kind."""
    origin: Origin | None = vars(layer).get(ORIGIN)
    return origin if origin is not None and kind in (None, _grown(layer, origin)) else None


def _grown(layer: BatchNorm, origin: Origin) -> type[nn.Module]:
    """Its class then, or what a lazy one has become since."""
    lazy = issubclass(origin.kind, LAZY) and not isinstance(layer, LazyBatchNorm)
    return origin.kind.cls_to_become if lazy else origin.kind  # type: ignore[attr-defined]


def _kind(layer: BatchNorm, seen: set[int]) -> type[nn.Module]:
    """Which class it can have.

    Raises:
        ArgumentError: none.
    """
    if type(layer) not in (BatchNorm, LazyBatchNorm):
        raise ArgumentError("it is of a class of its own")
    if layer._collect is not None or layer._together is not None or layer._bank is not None:
        raise ArgumentError("a tool is at work; revert outside of its block")
    if "banks" in layer._modules:
        names = ", ".join(layer.banks)
        raise ArgumentError(f"torch's layers have no banks ({names}); `del layer.banks` first")
    origin = _remembered(layer)
    given = origin.options if origin is not None else frozenset()
    for name in _TRAINING:
        if getattr(layer, name) is not None and name not in given:
            raise ArgumentError(
                f"torch's layers have no {name}; it matters in training only: set it to None first"
            )
    kind, ranks = _of_torch(layer, origin, seen, "process_group" not in given)
    origin = _remembered(layer, kind)
    expected = None if origin is None else origin.activation(layer)
    if layer.activation is not expected and layer.activation != expected:
        raise ArgumentError(
            f"a {kind.__name__} does not apply activation={layer.activation!r}; put it into the "
            f"model as a module of its own, and set activation to {expected!r} first"
        )
    if any(layer.channel_dim % rank != 1 for rank in ranks):
        raise ArgumentError(
            f"a {kind.__name__} has the channels on axis 1, not {layer.channel_dim}"
        )
    if not isinstance(layer, LazyBatchNorm):
        # As for `convert`.
        training = not issubclass(kind, nn.SyncBatchNorm) and layer.eps != TINY
        _, reason = difference(
            layer, lambda it: become_theirs(it, kind, origin), ranks, training=training
        )
        if reason is not None:
            raise ArgumentError(f"as a {kind.__name__}, {reason}")
    return kind


def _of_torch(
    layer: BatchNorm, origin: Origin | None, seen: set[int], own_group: bool
) -> tuple[type[nn.Module], tuple[int, ...]]:
    """Class and ranks of the inputs."""
    if layer.process_group is not None and own_group:
        if origin is not None and origin.synchronises:
            return origin.kind, origin.ranks
        return nn.SyncBatchNorm, EVERY_RANK
    # One that trains, or shares with nobody, now, is not what it was.
    trains = not layer._frozen or any(p.requires_grad for p in layer.parameters(recurse=False))
    if origin is not None and not (
        (origin.fixed and trains)
        or (origin.synchronises and layer.process_group is None and own_group)
    ):
        kind = _grown(layer, origin)
        return kind, RANKS.get(kind, origin.ranks)
    ranks = tuple(sorted(seen)) or (origin.ranks if origin is not None else ())
    kinds = {
        kind for kind, its in RANKS.items() if kind is not nn.SyncBatchNorm and {*its} & {*ranks}
    }
    if len(kinds) != 1 or not {*ranks} <= {*EVERY_RANK}:
        got = f"inputs of rank {', '.join(map(str, ranks))}" if ranks else "none to go by"
        raise ArgumentError(
            "which of torch's layers it is depends on the rank of its input, and there are "
            f"{got}; pass example_inputs, a batch that reaches it"
        )
    return kinds.pop(), ranks
