"""What is assumed of every layer, and how channels are said."""

from __future__ import annotations

from typing import Any

from torch import Tensor

#: torch's defaults. A checkpoint tells neither.
MOMENTUM, EPS = 0.1, 1e-5


def which(mask: Tensor) -> dict[str, Any]:
    """The first of the channels, their number, and of how many."""
    first = mask.nonzero().flatten()[:20].tolist()
    return {"channels": first, "number": int(mask.sum()), "of": mask.numel()}


def said(mask: Tensor) -> str:
    """How many channels, and the first of them, for a sentence."""
    count, of = int(mask.sum()), mask.numel()
    if count == of:
        return f"all {of} channels" if of > 1 else "the only channel"
    first = mask.nonzero().flatten()[:6].tolist()
    return f"{count} of {of} channels ({', '.join(map(str, first))}{', …' if count > 6 else ''})"


def number(value: Tensor) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(value) if bool(value.isfinite()) else None
