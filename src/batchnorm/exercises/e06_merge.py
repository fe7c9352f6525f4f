"""Exercise 6: merge the moments of two parts."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from batchnorm.exercises.answer import Answer
from batchnorm.exercises.compare import Mistake, draw, hinted, parts, pick, same
from batchnorm.exercises.exercise import Check, Exercise, Text, Wrong

Triple = tuple[int, Tensor, Tensor]

_UNWEIGHTED = Text(
    "这是两个均值的平均。个数多的一方分量更重：μ = μ_a + (n_b / n)·d。",
    "This is the mean of the two means. The larger part weighs more: μ = μ_a + (n_b / n)·d.",
)
_NO_BETWEEN = Text(
    "只加了 M_a + M_b，少了两组之间的一项：(n_a·n_b / n)·d²。",
    "This is M_a + M_b alone. What is between the parts is missing: (n_a·n_b / n)·d².",
)
_AVERAGED = Text("M 是平方和：相加，不取平均。", "M is a sum of squares: add, do not average.")
_NO_COUNT = Text("d² 的系数是 n_a·n_b / n。", "The factor of d² is n_a·n_b / n.")
_NAN = Text(
    "两边都空时 n = 0，不能除以它。", "Where both are empty, n = 0: it cannot be divided by."
)
_FAR = Text(
    "均值十亿时 n·μ² 的舍入误差有几百。用 d = μ_b − μ_a：先相减，再平方。",
    "With a mean of a billion, the rounding of n·μ² is hundreds. Use d = μ_b − μ_a: subtract "
    "first, then square.",
)
_COUNT_IS = Text("n = {count}", "n = {count}")


def _of(x: Tensor) -> Triple:
    if not len(x):
        return 0, x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
    # Around a row: exact however far from zero the data are.
    near = x - x[:1]
    mean = near.mean(0)
    return len(x), x[0] + mean, (near - mean).square().sum(0)


def _moments(*parts: Tensor) -> Triple:
    return _of(torch.cat(parts))


def _compare(answer: Answer, x: Tensor, y: Tensor) -> None:
    a, b = _moments(x), _moments(y)
    expected = _moments(x, y)
    found = parts(answer.call("merge", a, b), ("count", "mean", "m2"))
    _same(found, a, b, expected)


def _same(found: tuple[object, ...], a: Triple, b: Triple, expected: Triple) -> None:
    count, mean, m2 = found
    if not isinstance(count, (int, float, Tensor)) or count != expected[0]:
        raise Wrong(_COUNT_IS.filled(count=expected[0]), Text.of(count))
    nothing = torch.full_like(expected[1], torch.nan)
    square = (b[1] - a[1]).square()
    same(
        mean,
        expected[1],
        "mean",
        (Mistake((a[1] + b[1]) / 2, _UNWEIGHTED), Mistake(nothing, _NAN)),
        dtype=torch.float64,
    )
    same(
        m2,
        expected[2],
        "m2",
        (
            Mistake(a[2] + b[2], _NO_BETWEEN),
            Mistake((a[2] + b[2]) / 2, _AVERAGED),
            Mistake(a[2] + b[2] + square, _NO_COUNT),
            Mistake(a[2] + b[2] + a[0] * b[0] * square, _NO_COUNT),
            Mistake(nothing, _NAN),
        ),
        dtype=torch.float64,
    )


def _data(random: Generator, low: int, high: int) -> Tensor:
    return draw(random, pick(random, low, high), 3, dtype=torch.float64)


def _two(answer: Answer, random: Generator) -> None:
    _compare(answer, _data(random, 2, 4), _data(random, 5, 9))


def _one(answer: Answer, random: Generator) -> None:
    _compare(answer, _data(random, 4, 8), _data(random, 1, 1))
    _compare(answer, _data(random, 1, 1), _data(random, 4, 8))


def _empty(answer: Answer, random: Generator) -> None:
    nothing = torch.zeros(0, 3, dtype=torch.float64)
    _compare(answer, nothing, _data(random, 3, 6))
    _compare(answer, _data(random, 3, 6), nothing)
    _compare(answer, nothing, nothing)


def _far(answer: Answer, random: Generator) -> None:
    _two(answer, random)
    x, y = 1e9 + _data(random, 4, 6), 1e9 + _data(random, 7, 9)
    with hinted(_FAR):
        _, _, m2 = parts(answer.call("merge", _moments(x), _moments(y)), ("count", "mean", "m2"))
        # The means themselves are rounded to 1e-7 there.
        same(m2, _moments(x, y)[2], "m2", dtype=torch.float64, tolerance=1e-5)


EXERCISE = Exercise(
    number=6,
    title=Text("合并两组统计量", "Merging two sets of statistics"),
    chapter="07-small-batches.md",
    task=Text(
        """
两组数据各有个数、均值、离差平方和：`a` 与 `b` 都是 `(count, mean, m2)`，`count` 是整数，后两个是形状 (C,) 的 float64 张量。不看数据，返回合起来的 `(count, mean, m2)`。

幽灵批次、多进程、重新校准，用的都是它。`count` 可能为零，那时 `mean` 和 `m2` 也是零；均值可能是十亿。
""",  # noqa: E501 (a line break would show as a space)
        """
Two sets of data have a count, a mean and a sum of squared deviations each: `a`
and `b` are both `(count, mean, m2)`, where `count` is a whole number and the
other two are float64 tensors of the shape (C,). Without the data, return the
`(count, mean, m2)` of both together.

Ghost batches, several processes, recalibration: all are made of this. `count`
may be zero, and then so are `mean` and `m2`; a mean may be a billion.
""",
    ),
    names=("merge",),
    summary=Text(
        "合并两个 (count, mean, m2)。", "The (count, mean, m2) of two sets of data together."
    ),
    start='''import torch


def merge(a, b):
    """{summary}"""
    raise NotImplementedError
''',
    checks=(
        Check(Text("大小不同的两组", "two parts of different sizes"), _two),
        Check(Text("其中一组只有一个值", "one of them a single value"), _one),
        Check(Text("空的一组，两组都空", "an empty part, and both empty"), _empty),
        Check(Text("均值十亿", "a mean of a billion"), _far),
    ),
    solution="""def merge(a, b):
    count = a[0] + b[0]
    share = b[0] / max(count, 1)
    d = b[1] - a[1]
    return count, a[1] + share * d, a[2] + b[2] + a[0] * share * d**2
""",
)
