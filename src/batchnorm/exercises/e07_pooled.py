"""Exercise 7: exact statistics of many batches."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from batchnorm.exercises.answer import Answer
from batchnorm.exercises.compare import Mistake, draw, parts, pick, same, signed
from batchnorm.exercises.exercise import Check, Exercise, Text, Wrong

_UNWEIGHTED = Text(
    "这是各批均值的平均。批次大小不同，要按个数加权。",
    "This is the mean of the batches' means. They are of different sizes: weigh them by count.",
)
_OF_VARIANCES = Text(
    "这是各批方差的平均，少了各批均值之间的差别。合并 (count, mean, m2)，见练习 6。",
    "This is the mean of the batches' variances, without what is between their means. Merge "
    "(count, mean, m2), as in exercise 6.",
)
_WEIGHTED = Text(
    "加权对了，但仍少了各批均值之间的差别。合并 (count, mean, m2)，见练习 6。",
    "The weights are right, but what is between the batches' means is still missing. Merge "
    "(count, mean, m2), as in exercise 6.",
)
_BIASED = Text(
    "这是有偏方差。运行统计量存的是无偏的：m2 / (count − 1)。",
    "This is the biased variance. Running statistics keep the unbiased one: m2 / (count − 1).",
)
_LAST = Text("这只是最后一批的统计量。", "These are the statistics of the last batch alone.")
_MOVING = Text(
    "这是动量 0.1 的滑动平均，离精确还远。",
    "This is a moving average with a momentum of 0.1, far from exact.",
)
_NAN = Text(
    "只有一个样本的批次没有无偏方差（0/0）。各批留平方和，最后才除。",
    "A batch of one sample has no unbiased variance (0/0). Keep sums of squares, and divide at the "
    "end.",
)
_ONCE = Text(
    "batches 是生成器，只能读一遍：第二个 for 什么也得不到。",
    "batches is a generator and can be read once: a second for gets nothing.",
)


def _batches(random: Generator, *sizes: int) -> list[Tensor]:
    """Batches that differ in their means, as those of real data do."""
    data = (draw(random, size, 3, dtype=torch.float64) for size in sizes)
    return [batch + 3 * signed(random, 3, dtype=torch.float64) for batch in data]


def _compare(answer: Answer, given: object, batches: list[Tensor]) -> None:
    mean, var = parts(answer.call("pooled", given), ("mean", "var"))
    every = torch.cat(batches)
    means = torch.stack([batch.mean(0) for batch in batches])
    biased = torch.stack([batch.var(0, correction=0) for batch in batches])
    unbiased = torch.stack(
        [batch.var(0) if len(batch) > 1 else torch.full_like(batch[0], torch.nan)
         for batch in batches]
    )  # fmt: skip
    counts = torch.tensor([[len(batch)] for batch in batches], dtype=torch.float64)
    shares = counts / counts.sum()
    moving_mean, moving_var = torch.zeros_like(every[0]), torch.ones_like(every[0])
    for one_mean, one_var in zip(means, unbiased, strict=True):
        moving_mean = 0.9 * moving_mean + 0.1 * one_mean
        moving_var = 0.9 * moving_var + 0.1 * one_var
    same(
        mean,
        every.mean(0),
        "mean",
        (
            Mistake(means.mean(0), _UNWEIGHTED),
            Mistake(means[-1], _LAST),
            Mistake(moving_mean, _MOVING),
        ),
        dtype=torch.float64,
    )
    same(
        var,
        every.var(0),
        "var",
        (
            Mistake(torch.full_like(every[0], torch.nan), _NAN),
            Mistake(every.var(0, correction=0), _BIASED),
            Mistake(biased.mean(0), _OF_VARIANCES),
            Mistake(unbiased.mean(0), _OF_VARIANCES),
            Mistake((shares * biased).sum(0), _WEIGHTED),
            Mistake((shares * unbiased).sum(0), _WEIGHTED),
            Mistake(((counts - 1) * unbiased).sum(0) / (counts.sum() - len(counts)), _WEIGHTED),
            Mistake((counts * biased).sum(0) / (counts.sum() - 1), _WEIGHTED),
            Mistake(unbiased[-1], _LAST),
            Mistake(moving_var, _MOVING),
        ),
        dtype=torch.float64,
    )


def _unequal(answer: Answer, random: Generator) -> None:
    batches = _batches(random, pick(random, 7, 9), pick(random, 3, 6), 2)
    _compare(answer, batches, batches)


def _one_sample(answer: Answer, random: Generator) -> None:
    batches = _batches(random, pick(random, 4, 6), 1, pick(random, 7, 9))
    _compare(answer, batches, batches)


def _once(answer: Answer, random: Generator) -> None:
    batches = _batches(random, 5, pick(random, 2, 4), 6)

    _compare(answer, batches, batches)
    try:
        _compare(answer, (batch.clone() for batch in batches), batches)
    except Wrong as wrong:
        # A list of the same was right: whatever else it looks like, it is the reading once.
        wrong.hint = _ONCE
        raise


EXERCISE = Exercise(
    number=7,
    title=Text("重新校准：许多批次的精确统计量", "Recalibration: exact statistics of many batches"),
    chapter="04-train-and-eval.md",
    task=Text(
        """
`batches` 依次给出许多批次，每批的形状是 (N, C)，N 各不相同，类型 float64。返回全部数据的 `(mean, var)`：每个通道的均值和无偏方差，精确，与数据怎样分批无关。

`recalibrate` 做的就是这件事。`batches` 可能是生成器，只能读一遍。
""",  # noqa: E501 (a line break would show as a space)
        """
`batches` gives many batches one by one, of the shape (N, C), each with an N of
its own, in float64. Return `(mean, var)` of all the data: the mean and the
unbiased variance of each channel, exact, and whatever the data were split
into.

This is what `recalibrate` does. `batches` may be a generator, which can be read
only once.
""",
    ),
    names=("pooled",),
    summary=Text(
        "全部批次合起来的均值和无偏方差。", "Mean and unbiased variance of all batches together."
    ),
    start='''import torch


def pooled(batches):
    """{summary}"""
    raise NotImplementedError
''',
    checks=(
        Check(Text("大小不同的批次", "batches of different sizes"), _unequal),
        Check(Text("其中一批只有一个样本", "one of them a single sample"), _one_sample),
        Check(Text("只能读一遍", "to be read once"), _once),
    ),
    solution="""import torch


def pooled(batches):
    count, mean, m2 = 0, 0.0, 0.0
    for batch in batches:
        own = batch.mean(0)
        d = own - mean
        total = count + len(batch)
        m2 = m2 + torch.square(batch - own).sum(0) + count * len(batch) / total * d**2
        mean = mean + len(batch) / total * d
        count = total
    return mean, m2 / (count - 1)
""",
)
