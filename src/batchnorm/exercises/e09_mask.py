"""Exercise 9: statistics without the padding."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from batchnorm.exercises.answer import Answer
from batchnorm.exercises.compare import Mistake, draw, parts, pick, same, signed
from batchnorm.exercises.exercise import Check, Exercise, Text

_IGNORED = Text("填充也算进去了：没有用 mask。", "The padding was counted: mask was not used.")
_ALL = Text(
    "和是对的，却除以了全部 N·L 个。除以 mask 里 True 的个数。",
    "The sum is right, but divided by all N·L. Divide by how many of mask are True.",
)
_INVERTED = Text(
    "mask 用反了：True 表示算数。", "The mask is the wrong way round: True means that it counts."
)
_ZEROS = Text(
    "填充换成零之后，(0 − μ)² 仍进了方差。减去均值之后再换一次。",
    "With zeros in place of padding, (0 − μ)² is still in the variance. Replace it again after the "
    "mean was subtracted.",
)
_UNBIASED = Text(
    "这是无偏方差。要有偏的，除以个数。",
    "This is the unbiased variance. The biased one is wanted, divided by the count.",
)
_EACH = Text(
    "这是先求每个序列的均值再平均。序列长短不一：所有算数的值放在一起求。",
    "This is the mean of each sequence's mean. They are of different lengths: take all values that "
    "count together.",
)
_NAN = Text(
    "填充里的 NaN 进来了。乘 mask 没有用，0 · NaN 还是 NaN：用 torch.where，或按 mask 取出元素。",
    "NaN of the padding got in. To multiply by mask does not help, as 0 · NaN is NaN: use "
    "torch.where, or index by mask.",
)
_NAN_GRADIENT = Text(
    "前向是对的，反向却得到 0 · NaN：where 放在了运算之后。先把填充换掉，再做减法和平方。",
    "The forward pass is right, but on the way back there is 0 · NaN: where came after the "
    "arithmetic. Replace the padding first, then subtract and square.",
)


def _padded(random: Generator, value: float) -> tuple[Tensor, Tensor]:
    """Sequences of different lengths, one of them all padding."""
    count, length = pick(random, 4, 6), pick(random, 5, 7)
    x = draw(random, count, 3, length) + 3 * signed(random, 1)
    lengths = torch.randint(1, length, (count,), generator=random)
    lengths[0], lengths[1], lengths[2] = length, 2, 0
    mask = torch.arange(length) < lengths[:, None]
    return x.masked_fill(~mask[:, None], value), mask


def _counted(x: Tensor, mask: Tensor) -> Tensor:
    """The elements that count, (how many, C)."""
    return x.double().transpose(1, 2)[mask]


def _compare(answer: Answer, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What the answer finds, if it is right."""
    mean, var = parts(answer.call("statistics", x, mask), ("mean", "var"))
    x = x.detach()
    inside, outside = _counted(x, mask), _counted(x, ~mask)
    right, every = inside.mean(0), x.double().transpose(1, 2).flatten(0, 1)
    share = len(inside) / len(every)
    nothing = torch.full_like(right, torch.nan)
    squares = (inside - right).square().sum(0)
    left_out = len(every) - len(inside)
    rows = [row[:, keep].double().mean(1) for row, keep in zip(x, mask, strict=True) if keep.any()]
    same(
        mean,
        right,
        "mean",
        (
            Mistake(nothing, _NAN),
            Mistake(every.mean(0), _IGNORED),
            Mistake(share * right, _ALL),
            Mistake(outside.mean(0), _INVERTED),
            Mistake(torch.stack(rows).mean(0), _EACH),
        ),
    )
    same(
        var,
        squares / len(inside),
        "var",
        (
            Mistake(nothing, _NAN),
            Mistake(every.var(0, correction=0), _IGNORED),
            Mistake((squares + left_out * right.square()) / len(inside), _ZEROS),
            Mistake((squares + left_out * right.square()) / len(every), _ZEROS),
            Mistake(squares / len(every), _ALL),
            Mistake(squares / (len(inside) - 1), _UNBIASED),
        ),
    )
    return mean, var


def _zeros(answer: Answer, random: Generator) -> None:
    _compare(answer, *_padded(random, 0.0))


def _rubbish(answer: Answer, random: Generator) -> None:
    _compare(answer, *_padded(random, 1e4))


def _nan(answer: Answer, random: Generator) -> None:
    _compare(answer, *_padded(random, torch.nan))


def _gradient(answer: Answer, random: Generator) -> None:
    x, mask = _padded(random, torch.nan)
    d_mean, d_var = signed(random, 3), signed(random, 3)
    wide = _counted(x, mask).requires_grad_()
    totals = d_mean.double() @ wide.mean(0) + d_var.double() @ wide.var(0, correction=0)
    (inside,) = torch.autograd.grad(totals, wide)
    expected = torch.zeros_like(x, dtype=torch.float64).transpose(1, 2)
    expected[mask] = inside
    mean, var = _compare(answer, x.requires_grad_(), mask)
    (found,) = torch.autograd.grad(d_mean @ mean + d_var @ var, x)
    expected = expected.transpose(1, 2)
    rotten = expected.masked_fill(~mask[:, None], torch.nan)
    everywhere = torch.full_like(expected, torch.nan)
    spread = (Mistake(value, _NAN_GRADIENT) for value in (rotten, everywhere))
    same(found, expected, "dx", spread)


EXERCISE = Exercise(
    number=9,
    title=Text("带掩码的统计量", "Statistics without the padding"),
    chapter="06-drawbacks.md",
    task=Text(
        """
`x` 的形状是 (N, C, L)，是 N 个长短不一、补到 L 的序列；`mask` 的形状是 (N, L)，True 表示算数。返回 `(mean, var)`：每个通道在算数的值上的均值和有偏方差。

填充里可能是任何东西，NaN 也不例外。它不得进入统计量，也不得进入梯度：填充处的梯度是零。
""",  # noqa: E501 (a line break would show as a space)
        """
`x` has the shape (N, C, L): N sequences of different lengths, filled up to L.
`mask` has the shape (N, L), and True means that it counts. Return `(mean,
var)`: mean and biased variance of each channel over the values that count.

The padding may hold anything, NaN included. It must get neither into the
statistics nor into the gradient, which is zero there.
""",
    ),
    names=("statistics",),
    summary=Text(
        "只在 mask 为 True 处求 (mean, var)。", "(mean, var) of each channel where mask is True."
    ),
    start='''import torch


def statistics(x, mask):
    """{summary}"""
    raise NotImplementedError
''',
    checks=(
        Check(Text("填充是零", "zeros in the padding"), _zeros),
        Check(Text("填充是很大的数", "large numbers in the padding"), _rubbish),
        Check(Text("填充是 NaN", "NaN in the padding"), _nan),
        Check(Text("填充是 NaN 时的梯度", "the gradient with NaN in the padding"), _gradient),
    ),
    solution="""import torch


def statistics(x, mask):
    keep = mask.unsqueeze(1)
    count = mask.sum()
    x = torch.where(keep, x, 0.0)
    mean = x.sum((0, 2)) / count
    centred = torch.where(keep, x - mean.unsqueeze(-1), 0.0)
    return mean, torch.square(centred).sum((0, 2)) / count
""",
)
