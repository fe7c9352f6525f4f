"""Exercise 10: the backward pass by hand."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from batchnorm.exercises.answer import Answer
from batchnorm.exercises.compare import Mistake, draw, parts, pick, same, signed
from batchnorm.exercises.exercise import Check, Exercise, Text, Wrong

_BY_HAND = Text(
    "自动求导在这里是关着的：按第 3 章的公式写。",
    "Autograd is off here: write the formula of chapter 3.",
)
_EVALUATION = Text(
    "这是评估模式的梯度 γ·dy/s，把均值和方差当成了常数。它们也是 x 的函数。",
    "This is the gradient in evaluation, γ·dy/s, with mean and variance as constants. They depend "
    "on x, too.",
)
_NO_MEAN = Text(
    "少了经过均值的一条路：− (1/m)·Σ dy。", "The way through the mean is missing: − (1/m)·Σ dy."
)
_NO_VARIANCE = Text(
    "少了经过方差的一条路：− x̂·(1/m)·Σ dy·x̂。",
    "The way through the variance is missing: − x̂·(1/m)·Σ dy·x̂.",
)
_NO_GAMMA = Text("dx 里少了 γ。", "γ is missing in dx.")
_NO_SCALE = Text("dx 没有除以 s = √(σ² + ε)。", "dx was not divided by s = √(σ² + ε).")
_SUMS = Text("括号里是平均，不是求和：除以 m。", "The brackets hold means, not sums: divide by m.")
_UNBIASED = Text(
    "这是无偏方差的结果。前向用的是有偏方差。",
    "This is with the unbiased variance. The forward pass uses the biased one.",
)
_NO_EPS = Text("这是没有加 ε 的结果。", "This is the result without ε.")
_RAW = Text("dγ 乘的是 x̂，不是 x。", "dγ is a sum of dy·x̂, not of dy·x.")
_CENTRED = Text(
    "dγ 乘的是 x̂ = (x − μ)/s，这里少除了 s。",
    "dγ is a sum of dy·x̂ with x̂ = (x − μ)/s, here without the division by s.",
)
_SWAPPED = Text(
    "dγ 和 dβ 的次序反了：返回 (dx, dγ, dβ)。", "dγ and dβ are swapped: return (dx, dγ, dβ)."
)
_MEANS = Text("dγ 和 dβ 是求和，不是平均。", "dγ and dβ are sums, not means.")
#: What torch says to whoever asks it for a gradient meanwhile.
_OFF = ("does not require grad", "nference tensor")
_NAMES = ("dx", "dgamma", "dbeta")


def _forward(inputs: tuple[Tensor, ...], eps: float) -> Tensor:
    """The function whose gradients they are; autograd does the rest."""
    x, gamma, beta = inputs
    return gamma * (x - x.mean(0)) / (x.var(0, correction=0) + eps).sqrt() + beta


def _by_formula(
    dy: Tensor, x: Tensor, gamma: Tensor, eps: float, *, correction: int = 0
) -> tuple[Tensor, Tensor]:
    """dx and dγ with another variance or ε than the forward pass has."""
    scale = (x.var(0, correction=correction) + eps).sqrt()
    x_hat = (x - x.mean(0)) / scale
    return gamma / scale * (dy - dy.mean(0) - x_hat * (dy * x_hat).mean(0)), (dy * x_hat).sum(0)


def _compare(answer: Answer, x: Tensor, random: Generator, eps: float) -> None:
    channels = x.shape[1]
    gamma, dy = signed(random, channels), torch.randn(x.shape, generator=random, dtype=x.dtype)
    wide = x.double()
    inputs = tuple(value.double().requires_grad_() for value in (x, gamma, torch.zeros(channels)))
    dx, dgamma, dbeta = torch.autograd.grad(_forward(inputs, eps), inputs, dy.double())
    with torch.inference_mode():
        try:
            found = answer.call("backward", dy, x, gamma, eps)
        except Wrong as wrong:
            if wrong.came.en.startswith("RuntimeError") and any(s in wrong.came.en for s in _OFF):
                wrong.hint = _BY_HAND
            raise
        found_dx, found_dgamma, found_dbeta = parts(found, _NAMES)
    g, dy = gamma.double(), dy.double()
    scale = (wide.var(0, correction=0) + eps).sqrt()
    centred = wide - wide.mean(0)
    x_hat = centred / scale
    through_mean, through_variance = dy.mean(0), x_hat * (dy * x_hat).mean(0)
    other_dx, other_dgamma = _by_formula(dy, wide, g, eps, correction=1)
    no_eps_dx, no_eps_dgamma = _by_formula(dy, wide, g, 0.0)
    count = len(x)
    mistakes_dx = (
        Mistake(g / scale * dy, _EVALUATION),
        Mistake(g / scale * (dy - through_variance), _NO_MEAN),
        Mistake(g / scale * (dy - through_mean), _NO_VARIANCE),
        Mistake(dx / g, _NO_GAMMA),
        Mistake(dx * scale, _NO_SCALE),
        Mistake(g / scale * (dy - count * (through_mean + through_variance)), _SUMS),
        Mistake(other_dx, _UNBIASED),
        Mistake(no_eps_dx, _NO_EPS),
    )
    mistakes_dgamma = (
        Mistake(dbeta, _SWAPPED),
        Mistake((dy * wide).sum(0), _RAW),
        Mistake((dy * centred).sum(0), _CENTRED),
        Mistake(dgamma / count, _MEANS),
        Mistake(other_dgamma, _UNBIASED),
        Mistake(no_eps_dgamma, _NO_EPS),
    )
    same(found_dbeta, dbeta, "dbeta", (Mistake(dgamma, _SWAPPED), Mistake(dbeta / count, _MEANS)))
    same(found_dgamma, dgamma, "dgamma", mistakes_dgamma)
    same(found_dx, dx, "dx", mistakes_dx)


def _ordinary(answer: Answer, random: Generator) -> None:
    channels = pick(random, 2, 4)
    _compare(answer, draw(random, pick(random, 5, 9), channels), random, 1e-5)


def _large_eps(answer: Answer, random: Generator) -> None:
    _compare(answer, draw(random, pick(random, 5, 9), 3), random, 0.5)


def _pair(answer: Answer, random: Generator) -> None:
    # Two samples are ±1 whatever they were: with a small ε hardly any gradient is left.
    _compare(answer, draw(random, 2, pick(random, 2, 4)), random, 0.1)


EXERCISE = Exercise(
    number=10,
    title=Text("手写反向", "The backward pass by hand"),
    chapter="03-mathematics.md",
    task=Text(
        """
训练模式的反向。`dy` 是输出的梯度，`x` 的形状是 (N, C)。返回 `(dx, dγ, dβ)`：输入、γ 和 β 的梯度。前向是

    y = γ · (x − μ) / √(σ² + ε) + β

检查用随机的 `dy`，与 float64 的自动求导比较；运行你的代码时，自动求导是关着的。
""",  # noqa: E501 (a line break would show as a space)
        """
The backward pass in training. `dy` is the gradient of the output, and `x` has
the shape (N, C). Return `(dx, dγ, dβ)`: the gradients of the input, of γ and of
β. The forward pass is

    y = γ · (x − μ) / √(σ² + ε) + β

The checks take random `dy` and compare with autograd in float64; while your
code runs, autograd is off.
""",
    ),
    names=("backward",),
    summary=Text("返回 (dx, dγ, dβ)。", "Return (dx, dγ, dβ)."),
    start='''import torch


def backward(dy, x, gamma, eps=1e-5):
    """{summary}"""
    raise NotImplementedError
''',
    checks=(
        Check(Text("普通的一批", "an ordinary batch"), _ordinary),
        Check(Text("ε 较大", "a large ε"), _large_eps),
        Check(Text("只有两个样本", "two samples"), _pair),
    ),
    solution="""import torch


def backward(dy, x, gamma, eps=1e-5):
    scale = torch.sqrt(x.var(0, correction=0) + eps)
    x_hat = (x - x.mean(0)) / scale
    dx = gamma / scale * (dy - dy.mean(0) - x_hat * (dy * x_hat).mean(0))
    return dx, (dy * x_hat).sum(0), dy.sum(0)
""",
)
