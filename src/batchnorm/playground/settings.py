"""What a visitor may choose, and what is refused before anything begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from batchnorm.errors import ArgumentError

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "ReLU": nn.ReLU,
}

#: Variance of a layer's initial weights, by its fan-in and fan-out.
INITS: Mapping[str, Callable[[int, int], float]] = {
    "Xavier": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "He": lambda fan_in, _: 2 / fan_in,
    "0.01": lambda *_: 0.01**2,
    "1": lambda *_: 1.0,
}

#: Steps from one snapshot to the next: an average over so many batches is a curve, not noise.
EVERY = 5


@dataclass(frozen=True)
class Range:
    """From what number to what, whole or real."""

    low: float
    high: float
    whole: bool = True

    def __contains__(self, value: object) -> bool:
        """Whether this is such a number."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        # Says no to NaN, too.
        return self.low <= value <= self.high and (not self.whole or value == int(value))


#: At most about a minute's work. One layer has no middle to look at, but is a fair comparison. A
#: batch of one has no variance.
RANGES = {
    "depth": Range(1, 20),
    "width": Range(8, 256),
    "rate": Range(0.0001, 100, whole=False),
    "batch": Range(2, 512),
    "steps": Range(EVERY, 5000),
    "seed": Range(0, 9999),
}
CHOICES = {"activation": ACTIVATIONS, "init": INITS}


class SettingError(ArgumentError):
    """A setting is none that can be trained with.

    Attributes:
        name: the setting's.
        value: what came.
    """

    def __init__(self, name: str, value: object) -> None:
        self.name, self.value = name, value
        if name in CHOICES:
            expected = f"one of {', '.join(CHOICES[name])}"
        else:
            limits = RANGES[name]
            kind = "a whole number" if limits.whole else "a number"
            expected = f"{kind} from {limits.low:g} to {limits.high:g}"
        super().__init__(f"{name}: expected {expected}, got {value!r}; choose another")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training run.

    >>> Settings(depth=3).depth
    3

    Args:
        depth: hidden layers.
        width: units in each.
        activation: after each hidden layer: a key of `ACTIVATIONS`.
        rate: learning rate, of plain SGD.
        batch: rows in each batch.
        init: of all weights: a key of `INITS`.
        steps: how many.
        seed: of the weights and the order of rows.

    Raises:
        SettingError: One of them is impossible.
    """

    depth: int = 6
    width: int = 64
    activation: str = "sigmoid"
    rate: float = 0.5
    batch: int = 64
    init: str = "Xavier"
    steps: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            possible = RANGES.get(field.name) or tuple(CHOICES[field.name])
            if value not in possible:
                raise SettingError(field.name, value)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Settings:
        """Return the settings that a form holds, where numbers may be text.

        >>> Settings.read({"depth": 3.0, "rate": " 1e-2 "})
        Settings(depth=3, ..., rate=0.01, ...)

        Raises:
            SettingError: As for `Settings`.
        """
        found: dict[str, Any] = {}
        for name, value in values.items():
            if name in CHOICES:
                found[name] = value
                continue
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError):
                raise SettingError(name, value) from None
            if number not in RANGES[name]:
                raise SettingError(name, value)
            found[name] = int(number) if RANGES[name].whole else number
        return cls(**found)
