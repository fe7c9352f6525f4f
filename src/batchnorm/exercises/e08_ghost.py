"""Exercise 8: ghost batches."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from batchnorm.exercises.answer import Answer
from batchnorm.exercises.compare import Mistake, but_channel, draw, pick, same
from batchnorm.exercises.e01_forward import UNBIASED
from batchnorm.exercises.exercise import Check, Exercise, Text

_WHOLE = Text(
    "这是整批一起归一化的结果，没有分组。",
    "This is the whole batch normalized together, without groups.",
)
_DROPPED = Text(
    "最后一组比 size 小，被丢掉了。它也要归一化。",
    "The last group is smaller than size and was dropped. It is normalized, too.",
)
_STRIDED = Text(
    "这是隔着取的组。一组是相邻的 size 个样本：x[:size]、x[size : 2 * size]……",
    "These groups take samples that are apart. A group is size samples next to each other: "
    "x[:size], x[size : 2 * size] …",
)
_EVEN = Text(
    "这是把样本平均分给各组（torch.chunk）。每组 size 个，最后一组拿剩下的：torch.split。",
    "This shares the samples out evenly (torch.chunk). Each group has size, and the last one what "
    "is left: torch.split.",
)
_LEFT_ALONE = Text(
    "最后一组没有归一化，原样返回了。", "The last group came back as it was, not normalized."
)
_PADDED = Text(
    "最后一组补了零，零进了统计量。",
    "The last group was padded with zeros, which are in its statistics.",
)
_JOINED = Text(
    "剩下的样本并进了前一组。它们自成一组。",
    "The samples that are left went into the group before. They are a group of their own.",
)


def _alone(x: Tensor, correction: int = 0, rows: int | None = None) -> Tensor:
    """One group, normalized; by the statistics of its first rows, where they are given."""
    of, axes = x[:rows], but_channel(x)
    mean = of.mean(axes, keepdim=True)
    var = of.var(axes, correction=correction, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt()


def _padded(x: Tensor, size: int) -> Tensor:
    filled = torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])])
    return _alone(filled)[: len(x)]


def _strided(x: Tensor, groups: int) -> Tensor:
    y = torch.empty_like(x)
    for first in range(groups):
        y[first::groups] = _alone(x[first::groups])
    return y


def _compare(answer: Answer, x: Tensor, size: int) -> None:
    wide = x.double()
    groups = list(wide.split(size))
    done = [_alone(group) for group in groups]
    *full, last = groups
    mistakes = [Mistake(_alone(wide), _WHOLE)] if full else []
    if full:
        kept = done[:-1]
        joined = [*done[:-2], _alone(torch.cat(groups[-2:]))]
        mistakes += [
            Mistake(torch.cat(kept), _DROPPED),
            Mistake(torch.cat([*kept, last]), _LEFT_ALONE),
            Mistake(torch.cat([*kept, _padded(last, size)]), _PADDED),
            Mistake(torch.cat(joined), _JOINED),
            Mistake(_strided(wide, len(groups)), _STRIDED),
            Mistake(torch.cat([_alone(part) for part in wide.chunk(len(groups))]), _EVEN),
        ]
    mistakes.append(Mistake(torch.cat([_alone(group, correction=1) for group in groups]), UNBIASED))
    same(answer.call("ghost", x, size), torch.cat(done), "y", mistakes)


def _even(answer: Answer, random: Generator) -> None:
    size = pick(random, 3, 5)
    _compare(answer, draw(random, 3 * size, 2), size)


def _ragged(answer: Answer, random: Generator) -> None:
    size = pick(random, 6, 8)
    _compare(answer, draw(random, 2 * size + pick(random, 2, 3), 3), size)


def _images(answer: Answer, random: Generator) -> None:
    _compare(answer, draw(random, 3, 2, pick(random, 2, 4), 3), 2)


def _one_group(answer: Answer, random: Generator) -> None:
    _compare(answer, draw(random, pick(random, 3, 6), 2), 8)


EXERCISE = Exercise(
    number=8,
    title=Text("幽灵批次", "Ghost batches"),
    chapter="05-advantages.md",
    task=Text(
        """
把一个大批次切成相邻的 `size` 个样本一组，每组用自己的均值和有偏方差归一化（不带 γ 和 β）。样本数除不尽时，最后一组小一些，也自成一组。

`x` 的形状是 (N, C) 或 (N, C, H, W)；`size` 可能比 N 大，那就只有一组。返回的形状和顺序与 `x` 相同。
""",  # noqa: E501 (a line break would show as a space)
        """
Split a large batch into groups of `size` samples next to each other, and
normalize each by its own mean and biased variance (without γ and β). Where N is
no multiple of `size`, the last group is smaller, and a group of its own.

`x` has the shape (N, C) or (N, C, H, W); `size` may be larger than N: then
there is one group. What comes back has the shape and the order of `x`.
""",
    ),
    names=("ghost",),
    summary=Text(
        "每 size 个样本一组，各自归一化。", "Normalize each group of size samples by itself."
    ),
    start='''import torch


def ghost(x, size, eps=1e-5):
    """{summary}"""
    raise NotImplementedError
''',
    checks=(
        Check(Text("除得尽", "groups of equal size"), _even),
        Check(Text("最后一组较小", "a smaller last group"), _ragged),
        Check(Text("图像 (N, C, H, W)", "images (N, C, H, W)"), _images),
        Check(Text("size 比 N 大", "a size larger than N"), _one_group),
    ),
    solution="""import torch


def ghost(x, size, eps=1e-5):
    axes = [axis for axis in range(x.dim()) if axis != 1]

    def normalized(group):
        mean = group.mean(axes, keepdim=True)
        var = group.var(axes, correction=0, keepdim=True)
        return (group - mean) / torch.sqrt(var + eps)

    return torch.cat([normalized(group) for group in x.split(size)])
""",
)
