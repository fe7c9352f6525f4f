"""What a case of the corpus is, and the list of them, which `healthy` and `planted` fill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Case:
    """A model, the batches to diagnose it with, and what must be found.

    Attributes:
        name: what it is.
        make: gives the model, the batches, and keyword arguments of `diagnose`.
        codes: any of these must be found; none: the model is healthy.
        layer: where; None: anywhere.
    """

    name: str
    make: Callable[[], tuple[nn.Module, list[Any], dict[str, Any]]]
    codes: tuple[str, ...] = ()
    layer: str | None = None


CASES: list[Case] = []


def case(name: str, *codes: str, layer: str | None = None) -> Callable[[Any], Any]:
    """Add a case."""

    def add(make: Any) -> Any:
        CASES.append(Case(name, make, codes, layer))
        return make

    return add
