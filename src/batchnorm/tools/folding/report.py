"""What `fold` did, and how it was verified."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FoldedLayer:
    """A batch norm layer that is gone.

    Attributes:
        layer: its name in `model.named_modules()`.
        into: the layer whose weights took it over.
        after: whether it came after that layer; else before.
    """

    layer: str
    into: str
    after: bool


@dataclass(frozen=True)
class LeftLayer:
    """A batch norm layer that is still there.

    Attributes:
        layer: its name in `model.named_modules()`.
        reason: why it was not folded.
    """

    layer: str
    reason: str


@dataclass(frozen=True)
class FoldReport:
    """What `fold` did: `folded.fold_report`.

    Attributes:
        folded: the layers that are gone, in the order in which they were folded.
        left: the others, in the order of the model.
        error64: greatest difference between the outputs of the two models in float64, as a part of
            the greatest output; None if the model cannot run in float64.
        error: the same of the folded model in its own dtype, against the model in float64 (against
            the model in its own dtype, if that is all there is).
        original_error: the same of the model before.
        notes: what could not be verified, and why.
        speedup: time of the model before / time of the folded one, median of paired runs; None
            without `measure=True`.
        speedup_interval: two values that hold the true median between them, with 97 % confidence.
    """

    folded: tuple[FoldedLayer, ...]
    left: tuple[LeftLayer, ...]
    error64: float | None
    error: float
    original_error: float
    notes: tuple[str, ...] = ()
    speedup: float | None = None
    speedup_interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON can keep it."""
        return asdict(self)

    def __str__(self) -> str:
        total = len(self.folded) + len(self.left)
        lines = [f"{len(self.folded)} of {total} batch norm layers folded"]
        if self.speedup is not None:
            lines[0] += f", {self.speedup:.2f} times as fast"
        lines += [
            f"{left.layer or 'the model'}: not folded, because {left.reason}" for left in self.left
        ]
        return "\n".join((*lines, *self.notes))
