"""Example inputs of a model, and what it makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_map


class Example:
    """Arguments of a model, and others like them."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.args, self.kwargs = tuple(args), dict(kwargs)

    def map(self, change: Callable[[Tensor], Tensor]) -> Example:
        """With each floating tensor changed."""

        def leaf(value: Any) -> Any:
            if isinstance(value, PackedSequence):
                data = change(value.data)  # of which no part can be left out
                return value._replace(data=data) if data.shape == value.data.shape else value
            return change(value) if is_real(value) else value

        args, kwargs = tree_map(leaf, (self.args, self.kwargs), is_leaf=is_packed)
        return Example(args, kwargs)

    def run(self, model: nn.Module) -> list[Tensor]:
        """The tensors that a model makes of them; random numbers, if it draws any, are the same."""
        with _same_numbers(), torch.no_grad():
            # A model may write into its arguments.
            args, kwargs = tree_map(
                lambda v: v.clone() if isinstance(v, Tensor) else v,
                (self.args, self.kwargs),
                is_leaf=is_packed,
            )
            return list(tensors(model(*args, **kwargs)))

    def tensors(self) -> list[Tensor]:
        """The floating ones."""
        return [v for v in tree_flatten((self.args, self.kwargs))[0] if is_real(v)]


def tensors(output: Any) -> Iterator[Tensor]:
    """All tensors of an output, in order; complex ones as real and imaginary parts."""
    for leaf in tree_flatten(output)[0]:
        if isinstance(leaf, Tensor):
            yield torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
        elif isinstance(leaf, Mapping):
            yield from tensors(list(leaf.values()))


def is_real(value: Any) -> bool:
    """Whether it is a floating tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def is_packed(value: Any) -> bool:
    """Whether it is a tuple that cannot be made of anything but its tensors."""
    return isinstance(value, PackedSequence)


@contextmanager
def _same_numbers() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
