"""Exercise 1: the forward pass in training."""

from __future__ import annotations

from torch import Generator, Tensor

from batchnorm.exercises.answer import Answer
from batchnorm.exercises.compare import Mistake, draw, pick, same, signed
from batchnorm.exercises.exercise import Check, Exercise, Text

UNBIASED = Text(
    "这是用无偏方差（除以 m − 1）得到的。归一化用有偏方差，除以 m；torch.var 要写 correction=0。",
    "This is what the unbiased variance (divided by m − 1) gives. The biased one normalizes, "
    "divided by m: torch.var needs correction=0.",
)
_OUTSIDE = Text(
    "这是把 ε 加在标准差上得到的。ε 在根号里：√(σ² + ε)。",
    "This is what ε added to the standard deviation gives. It stands under the root: √(σ² + ε).",
)
_NO_EPS = Text("这是没有加 ε 的结果。", "This is the result without ε.")
_FIXED_EPS = Text(
    "这是 ε = 1e-5 的结果，而调用时给的是别的 ε。用参数 eps。",
    "This is the result for ε = 1e-5, but another ε was given. Use the argument eps.",
)
_ROWS = Text(
    "这是按行（每个样本）求的统计量，是层归一化。批量归一化按列：dim=0。",
    "These are statistics of each row (sample): layer normalization. Those of a batch are by "
    "column: dim=0.",
)
_WHOLE = Text(
    "这是所有通道共用一个均值和方差的结果。每个通道要有自己的：dim=0。",
    "This is one mean and variance for all channels. Each has its own: dim=0.",
)
_NOT_CENTRED = Text("减去均值了吗？", "Was the mean subtracted?")
_NOT_ROOTED = Text(
    "这是除以方差的结果。要除以标准差，即方差的平方根。",
    "This is divided by the variance. Divide by its root, the standard deviation.",
)
_NO_GAMMA = Text("这是没有乘 γ 的结果。", "This is the result without γ.")
_NO_BETA = Text("这是没有加 β 的结果。", "This is the result without β.")
_SWAPPED = Text("γ 和 β 用反了：γ 乘，β 加。", "γ and β are swapped: γ multiplies, β is added.")


def _expected(
    x: Tensor, gamma: Tensor | float, beta: Tensor | float, eps: float = 1e-5, correction: int = 0
) -> Tensor:
    x = x.double()
    deviation = (x.var(0, correction=correction) + eps).sqrt()
    return gamma * (x - x.mean(0)) / deviation + beta


def _ordinary(answer: Answer, random: Generator) -> None:
    channels = pick(random, 2, 5)
    x = draw(random, channels + pick(random, 1, 4), channels)
    gamma, beta = signed(random, channels), signed(random, channels)
    wide = x.double()
    mean, var = wide.mean(0), wide.var(0, correction=0)
    rows = (wide - wide.mean(1, keepdim=True)) / (
        wide.var(1, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    whole = (wide - wide.mean()) / (wide.var(correction=0) + 1e-5).sqrt()
    mistakes = (
        Mistake(_expected(x, gamma, beta, correction=1), UNBIASED),
        Mistake(gamma * rows + beta, _ROWS),
        Mistake(gamma * whole + beta, _WHOLE),
        Mistake(gamma * wide / (var + 1e-5).sqrt() + beta, _NOT_CENTRED),
        Mistake(gamma * (wide - mean) / (var + 1e-5) + beta, _NOT_ROOTED),
        Mistake(_expected(x, 1, beta), _NO_GAMMA),
        Mistake(_expected(x, gamma, 0), _NO_BETA),
        Mistake(_expected(x, beta, gamma), _SWAPPED),
    )
    same(answer.call("forward", x, gamma, beta), _expected(x, gamma, beta), "y", mistakes)


def _hardly_varies(answer: Answer, random: Generator) -> None:
    channels = pick(random, 2, 5)
    x = draw(random, pick(random, 6, 9), channels) / 20
    gamma, beta, eps = signed(random, channels), signed(random, channels), 0.02
    centred = x.double() - x.double().mean(0)
    deviation = centred.square().mean(0).sqrt()
    mistakes = (
        Mistake(gamma * centred / (deviation + eps) + beta, _OUTSIDE),
        Mistake(gamma * centred / deviation + beta, _NO_EPS),
        Mistake(_expected(x, gamma, beta), _FIXED_EPS),
        Mistake(_expected(x, gamma, beta, eps, correction=1), UNBIASED),
    )
    same(answer.call("forward", x, gamma, beta, eps), _expected(x, gamma, beta, eps), "y", mistakes)


def _constant(answer: Answer, random: Generator) -> None:
    x = draw(random, pick(random, 3, 6), 2)
    x[:, 1] = 2.0
    gamma, beta = signed(random, 2), signed(random, 2)
    expected = _expected(x, gamma, beta)
    divided = expected.clone()
    divided[:, 1] = float("nan")
    mistakes = (
        Mistake(divided, _NO_EPS),
        Mistake(_expected(x, gamma, beta, correction=1), UNBIASED),
    )
    same(answer.call("forward", x, gamma, beta), expected, "y", mistakes)


EXERCISE = Exercise(
    number=1,
    title=Text("前向", "The forward pass"),
    chapter="02-principles.md",
    task=Text(
        """
写出训练模式下批量归一化的前向。`x` 的形状是 (N, C)：N 个样本，C 个通道；`gamma` 与 `beta` 各有 C 个值。

    μ = 每个通道的均值    σ² = 每个通道的有偏方差
    y = γ · (x − μ) / √(σ² + ε) + β

用 PyTorch 的基本运算写，不要调用现成的批量归一化。
""",  # noqa: E501 (a line break would show as a space)
        """
Write the forward pass of batch normalization in training. `x` has the shape (N,
C): N samples, C channels; `gamma` and `beta` have C values each.

    μ = mean of each channel    σ² = biased variance of each channel
    y = γ · (x − μ) / √(σ² + ε) + β

Write it with plain operations of PyTorch, not by calling a batch normalization
that is there.
""",
    ),
    names=("forward",),
    summary=Text(
        "训练模式下，对形状为 (N, C) 的 x 做批量归一化。",
        "Batch normalization of x, of the shape (N, C), in training.",
    ),
    start='''import torch


def forward(x, gamma, beta, eps=1e-5):
    """{summary}"""
    raise NotImplementedError
''',
    checks=(
        Check(Text("普通的一批", "an ordinary batch"), _ordinary),
        Check(
            Text("几乎不变的通道，ε 较大", "channels that hardly vary, a large ε"), _hardly_varies
        ),
        Check(Text("一个常数通道", "a constant channel"), _constant),
    ),
    solution="""import torch


def forward(x, gamma, beta, eps=1e-5):
    mean = x.mean(0)
    var = x.var(0, correction=0)
    return gamma * (x - mean) / torch.sqrt(var + eps) + beta
""",
)
