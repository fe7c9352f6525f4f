"""What the checks compare with: data of any scale, values in float64, mistakes that are known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from batchnorm.exercises.exercise import Text, Wrong

#: Relative to the largest value: what the roundings of a sum leave, with two digits to spare; and
#: far below the least that any of the mistakes makes.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}

_TENSOR = Text("{name} 是张量", "{name} to be a tensor")
_SHAPE = Text("{name} 的形状为 {shape}", "{name} of shape {shape}")
_DTYPE = Text("{name} 的类型为 {dtype}", "{name} in {dtype}")
_CONVERT = Text(
    "把结果转换成 x 的类型：.to(x.dtype)。",
    "Convert the result to the dtype of x: .to(x.dtype).",
)
_PARTS = Text("返回 {count} 个结果：{names}", "{count} results: {names}")
_VALUE = Text(
    "{found}（{total} 个元素中有 {count} 个不对）", "{found} ({count} of {total} are wrong)"
)


class Mistake(NamedTuple):
    """What a usual mistake would give, and what to say to it."""

    value: Tensor
    hint: Text


def same(
    found: Any,
    expected: Tensor,
    name: str,
    mistakes: Iterable[Mistake] = (),
    *,
    dtype: torch.dtype = torch.float32,
    tolerance: float | None = None,
) -> None:
    """Refuse what is not, to within rounding, the tensor that is expected.

    Args:
        found: what came.
        expected: the right values, in float64.
        name: what it is called.
        mistakes: to be recognised.
        dtype: that of what should have come.
        tolerance: other than the dtype's own.

    Raises:
        Wrong: it is another.
    """
    if not isinstance(found, Tensor):
        raise Wrong(_TENSOR.filled(name=name), Text.of(f"{type(found).__name__}: {found!r:.60}"))
    allowed = tolerance or TOLERANCE[dtype]
    known = (mistake.hint for mistake in mistakes if _close(found, mistake.value, allowed))
    hint = next(known, None)
    if found.shape != expected.shape:
        raise Wrong(
            _SHAPE.filled(name=name, shape=tuple(expected.shape)),
            Text.of(tuple(found.shape)),
            hint,
        )
    wrong = ~_near(found, expected, allowed)
    if wrong.any():
        raise _worst(found, expected, wrong, name, hint)
    if found.dtype != dtype:
        raise Wrong(_DTYPE.filled(name=name, dtype=dtype), Text.of(found.dtype), _CONVERT)


def _near(found: Tensor, expected: Tensor, allowed: float) -> Tensor:
    finite = expected.detach().double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.isclose(
        found.detach().double(),
        expected.detach().double(),
        rtol=0.0,
        atol=allowed * (scale or 1.0),
        equal_nan=True,
    )


def _close(found: Tensor, expected: Tensor, allowed: float) -> bool:
    return found.shape == expected.shape and bool(_near(found, expected, allowed).all())


def _worst(found: Tensor, expected: Tensor, wrong: Tensor, name: str, hint: Text | None) -> Wrong:
    """Name the element that is farthest off, so that the reader can look at it."""
    off = (found.detach().double() - expected).abs().nan_to_num(nan=torch.inf)
    at = int(torch.where(wrong, off, -1.0).argmax())
    place = [int(index) for index in torch.unravel_index(torch.tensor(at), found.shape)]
    label = f"{name}{place or ''}"
    right, value = _told_apart(float(expected.flatten()[at]), float(found.detach().flatten()[at]))
    total, count = found.numel(), int(wrong.sum())
    came = _VALUE.filled(found=value, count=count, total=total) if total > 1 else Text.of(value)
    return Wrong(Text.of(f"{label} = {right}"), came, hint)


def _told_apart(*values: float) -> list[str]:
    """As many digits as it takes to see that they differ, and at least 6."""
    every = ([f"{value:.{digits}g}" for value in values] for digits in range(6, 18))
    return next((said for said in every if len(set(said)) > 1), [str(value) for value in values])


def parts(found: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    """The several results of a function.

    Raises:
        Wrong: there are more or fewer.
    """
    if not isinstance(found, (tuple, list)) or len(found) != len(names):
        kind = type(found).__name__
        size = f"{kind} ({len(found)})" if isinstance(found, (tuple, list)) else kind
        raise Wrong(_PARTS.filled(count=len(names), names=", ".join(names)), Text.of(size))
    return tuple(found)


def pick(random: Generator, low: int, high: int) -> int:
    """A whole number, both ends included."""
    return int(torch.randint(low, high + 1, (), generator=random))


def draw(random: Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Data whose channels, on axis 1, differ in mean and spread."""
    channels = (1, shape[1], *(1 for _ in shape[2:]))
    offset = signed(random, shape[1], dtype=torch.float64).reshape(channels)
    spread = signed(random, shape[1], dtype=torch.float64).reshape(channels)
    noise = torch.randn(shape, generator=random, dtype=torch.float64)
    return (2 * offset + spread * noise).to(dtype)


def signed(random: Generator, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of both signs, none near 0 or ±1, which would hide a factor that was forgotten."""
    values = 1.25 + 0.75 * torch.rand(size, generator=random, dtype=torch.float64)
    sign = torch.randint(2, (size,), generator=random) * 2 - 1
    return (values * sign).to(dtype)


def by_channel(values: Tensor, x: Tensor) -> Tensor:
    """View one value a channel so that it broadcasts along axis 1 of x."""
    return values.reshape(1, -1, *(1 for _ in x.shape[2:]))


def but_channel(x: Tensor) -> list[int]:
    """All axes but the channels'."""
    return [axis for axis in range(x.dim()) if axis != 1]


@contextmanager
def hinted(hint: Text) -> Iterator[None]:
    """What to say to whatever is wrong here, though it was right with easier data."""
    try:
        yield
    except Wrong as wrong:
        wrong.hint = wrong.hint or hint
        raise
