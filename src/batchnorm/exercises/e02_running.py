"""Exercise 2: the running update."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from batchnorm.exercises.answer import Answer
from batchnorm.exercises.compare import Mistake, but_channel, draw, pick, same, signed
from batchnorm.exercises.exercise import Check, Exercise, Text, Wrong

_IN_PLACE = Text(
    "缓冲区没有变。要就地改写，running_mean.mul_(…).add_(…)；running_mean = … 只是换了名字。",
    "The buffer is as it was. Write into it, running_mean.mul_(…).add_(…): running_mean = … only "
    "gives the name to another tensor.",
)
_SENSE = Text(
    "动量用反了，这是 Keras 的含义。PyTorch 里它是新值的份额：(1 − α)·旧 + α·新。",
    "The momentum is the wrong way round, as in Keras. In PyTorch it is the share of the new "
    "value: (1 − α)·old + α·new.",
)
_BIASED = Text(
    "这是存有偏方差的结果。PyTorch 存无偏的，除以 m − 1。",
    "This is what storing the biased variance gives. PyTorch stores the unbiased one, divided by "
    "m − 1.",
)
_STANDARD = Text("这是标准差。要存方差。", "This is the standard deviation. Store the variance.")
_REPLACED = Text(
    "旧值不见了：这是这一批自己的统计量。",
    "The old value is gone: these are the statistics of this batch alone.",
)
_ADDED = Text(
    "旧值没有乘 (1 − α)，缓冲区会一直变大。",
    "The old value was not multiplied by (1 − α): the buffer will grow and grow.",
)
_SAMPLES = Text(
    "m 是每个通道的元素个数 N × H × W，不是样本数 N。",
    "m is how many values a channel has, N × H × W, not the number of samples N.",
)
NO_GRAPH = Text("缓冲区不连着计算图", "buffers that hang on no graph")
GRAPH = Text("requires_grad 为 True", "requires_grad is True")
_NO_GRAD = Text(
    "在 torch.no_grad() 里更新，或先 x.detach()：否则每一步的计算图都会留在内存里。",
    "Update under torch.no_grad(), or x.detach() first: else the graph of every step stays in "
    "memory.",
)


def _statistics(x: Tensor, correction: int = 1) -> tuple[Tensor, Tensor]:
    axes = but_channel(x)
    return x.double().mean(axes), x.double().var(axes, correction=correction)


def _compare(answer: Answer, random: Generator, *shape: int) -> None:
    mean = signed(random, shape[1])
    var = signed(random, shape[1]).abs()
    share = 0.3
    given = (mean.clone(), var.clone())
    before = (mean.double(), var.double())
    x = draw(random, *shape)
    answer.call("update", *given, x, share, changes=2)
    expected = _blend(before, _statistics(x), share)
    mistakes = _mistakes(before, x, share)
    for found, right, name, known in zip(
        given, expected, ("running_mean", "running_var"), mistakes, strict=True
    ):
        same(found, right, name, known)


def _blend(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], share: float
) -> tuple[Tensor, Tensor]:
    mean, var = ((1 - share) * a + share * b for a, b in zip(old, new, strict=True))
    return mean, var


def _mistakes(
    old: tuple[Tensor, Tensor], x: Tensor, share: float
) -> tuple[list[Mistake], list[Mistake]]:
    new, biased = _statistics(x), _statistics(x, correction=0)
    samples = (biased[0], biased[1] * x.shape[0] / (x.shape[0] - 1))
    kept = (1 - share, share)
    both = [
        [
            Mistake(old[i], _IN_PLACE),
            Mistake(share * old[i] + (1 - share) * new[i], _SENSE),
            Mistake(new[i], _REPLACED),
            Mistake(old[i] + share * new[i], _ADDED),
        ]
        for i in (0, 1)
    ]
    both[1] += [
        Mistake(_blend(old, biased, share)[1], _BIASED),
        Mistake(share * old[1] + (1 - share) * biased[1], _SENSE),
        Mistake(biased[1], _REPLACED),
        Mistake(kept[0] * old[1] + kept[1] * new[1].sqrt(), _STANDARD),
        Mistake(_blend(old, samples, share)[1], _SAMPLES),
    ]
    return both[0], both[1]


def _dense(answer: Answer, random: Generator) -> None:
    _compare(answer, random, pick(random, 2, 6), pick(random, 2, 5))


def _images(answer: Answer, random: Generator) -> None:
    _compare(answer, random, pick(random, 2, 3), 3, 2, pick(random, 1, 3))


def _graph(answer: Answer, random: Generator) -> None:
    buffers = (torch.zeros(3), torch.ones(3))
    x = draw(random, 5, 3).requires_grad_()
    answer.call("update", *buffers, x, 0.1, changes=2)
    if any(buffer.requires_grad for buffer in buffers):
        raise Wrong(NO_GRAPH, GRAPH, _NO_GRAD)
    same(buffers[0], 0.1 * x.detach().double().mean(0), "running_mean")


EXERCISE = Exercise(
    number=2,
    title=Text("运行统计量", "Running statistics"),
    chapter="04-train-and-eval.md",
    task=Text(
        """
一个训练批次 `x` 之后，更新运行均值和运行方差。两者就地改写，什么都不返回。

    running ← (1 − α) · running + α · 新值

- 动量 α 是新值的份额，和 PyTorch 一样。
- 存下来的方差是无偏的，除以 m − 1；m 是每个通道的元素个数。
- `x` 的形状是 (N, C) 或 (N, C, H, W)。
- 输入可能需要梯度；缓冲区不能因此连上计算图。
""",
        """
After a batch `x` of training, update the running mean and the running variance.
Write into both, and return nothing.

    running ← (1 − α) · running + α · new value

- The momentum α is the share of the new value, as in PyTorch.
- The variance that is stored is the unbiased one, divided by m − 1; m is how
  many values a channel has.
- `x` has the shape (N, C) or (N, C, H, W).
- The input may need a gradient; the buffers must not hang on its graph.
""",
    ),
    names=("update",),
    summary=Text("就地更新运行统计量。", "Update the running statistics in place."),
    start='''import torch


def update(running_mean, running_var, x, momentum=0.1):
    """{summary}"""
    raise NotImplementedError
''',
    checks=(
        Check(Text("普通的一批 (N, C)", "an ordinary batch (N, C)"), _dense),
        Check(Text("图像 (N, C, H, W)", "images (N, C, H, W)"), _images),
        Check(Text("需要梯度的输入", "an input that needs a gradient"), _graph),
    ),
    solution="""import torch


@torch.no_grad()
def update(running_mean, running_var, x, momentum=0.1):
    axes = [axis for axis in range(x.dim()) if axis != 1]
    running_mean.mul_(1 - momentum).add_(x.mean(axes), alpha=momentum)
    running_var.mul_(1 - momentum).add_(x.var(axes, correction=1), alpha=momentum)
""",
)
