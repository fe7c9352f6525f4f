"""Exercise 5: the variance of data that are far from zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from batchnorm.exercises.answer import Answer
from batchnorm.exercises.compare import Mistake, draw, hinted, pick, same
from batchnorm.exercises.e01_forward import UNBIASED
from batchnorm.exercises.exercise import Check, Exercise, Text

#: Steps of float32 are 1/16 at a million, and a mean that is updated row by row is off by several:
#: squared, some percent of a variance of 1. E[x²] − E[x]² is off by thousands of variances.
ENOUGH = 0.1

_CANCELLED = Text(
    "E[x²] − E[x]² 就这样出错：x² 在 {square} 附近，{dtype} 只留 {digits} 位，相减之后"
    "全是舍入误差。先减去均值再平方。",
    "So fails E[x²] − E[x]²: x² is near {square}, of which {dtype} keeps {digits} digits, and the "
    "difference is all rounding. Subtract the mean first, then square.",
)
_NOTHING = Text(
    "常数的方差是零，E[x²] − E[x]² 却剩下舍入误差，甚至是负的：先减去均值再平方。",
    "Constants have no variance, but E[x²] − E[x]² leaves its rounding, even below zero: subtract "
    "the mean first, then square.",
)
_STANDARD = Text(
    "这是标准差。要的是方差。", "This is the standard deviation. The variance is wanted."
)
_WHOLE = Text("每个通道要有自己的方差：dim=0。", "Each channel has its own variance: dim=0.")
_DIGITS = {torch.float32: 7, torch.float64: 16}


def _compare(found: Any, x: Tensor, tolerance: float | None = None) -> None:
    # Around a row, which is exact: far from zero the mean of float64 is rounded, too.
    near = x.double() - x[:1].double()
    biased = near.var(0, correction=0)
    mistakes = (
        Mistake(near.var(0), UNBIASED),
        Mistake(biased.sqrt(), _STANDARD),
        Mistake(x.double().var(correction=0), _WHOLE),
    )
    same(found, biased, "σ²", mistakes, dtype=x.dtype, tolerance=tolerance)


def _near(answer: Answer, random: Generator) -> None:
    x = draw(random, pick(random, 5, 9), pick(random, 2, 4))
    _compare(answer.call("variance", x), x)


def _offset(answer: Answer, random: Generator, offset: float, dtype: torch.dtype) -> None:
    _near(answer, random)
    x = (draw(random, pick(random, 60, 90), 3, dtype=torch.float64) + offset).to(dtype)
    name = str(dtype).removeprefix("torch.")
    with hinted(_CANCELLED.filled(square=f"{offset**2:.0e}", dtype=name, digits=_DIGITS[dtype])):
        _compare(answer.call("variance", x), x, ENOUGH)


def _million(answer: Answer, random: Generator) -> None:
    _offset(answer, random, 1e6, torch.float32)


def _billion(answer: Answer, random: Generator) -> None:
    _offset(answer, random, 1e9, torch.float64)


def _constants(answer: Answer, random: Generator) -> None:
    _near(answer, random)
    values = 1000 + torch.rand(5, generator=random, dtype=torch.float64)
    x = values.float().expand(pick(random, 30, 60), 5).contiguous()
    with hinted(_NOTHING):
        found = answer.call("variance", x)
        same(found, torch.zeros(5, dtype=torch.float64), "σ²", tolerance=ENOUGH)


EXERCISE = Exercise(
    number=5,
    title=Text("远离零的方差", "A variance far from zero"),
    chapter="09-implementation.md",
    task=Text(
        """
求 `x`（形状 (N, C)）每个通道的有偏方差，类型与 `x` 相同。标准差在 1 到 2 之间，均值却可能是一百万（float32）或十亿（float64）；误差不超过 10%。

有一个只读一遍数据的公式，E[x²] − E[x]²。它在纸上是对的；试一试它。不要调用 `torch.var`。
""",  # noqa: E501 (a line break would show as a space)
        """
Take the biased variance of each channel of `x`, of the shape (N, C), in the
dtype of `x`. The standard deviation is between 1 and 2, but the mean may be a
million (float32) or a billion (float64); be right to 10%.

There is a formula that reads the data once, E[x²] − E[x]². On paper it is
right; try it. Do not call `torch.var`.
""",
    ),
    names=("variance",),
    summary=Text("每个通道的有偏方差。", "The biased variance of each channel."),
    start='''import torch


def variance(x):
    """{summary}"""
    raise NotImplementedError
''',
    checks=(
        Check(Text("零附近的数据", "data near zero"), _near),
        Check(Text("均值一百万，float32", "a mean of a million, float32"), _million),
        Check(Text("均值十亿，float64", "a mean of a billion, float64"), _billion),
        Check(Text("常数，方差为零", "constants, with no variance"), _constants),
    ),
    solution="""import torch


def variance(x):
    centred = x - x.mean(0)
    # The mean is rounded, so what is left has a small mean of its own.
    return torch.square(centred - centred.mean(0)).mean(0)
""",
)
