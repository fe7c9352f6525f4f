"""Exercise 4: fold a normalization into the layer before it."""

from __future__ import annotations

from torch import Generator, Tensor

from batchnorm.exercises.answer import Answer
from batchnorm.exercises.compare import Mistake, draw, parts, pick, same, signed
from batchnorm.exercises.exercise import Check, Exercise, Text

_SHIFT = Text(
    "旧偏置也要归一化：b ← (b − μ)·a + β。",
    "The old bias is normalized as well: b ← (b − μ)·a + β.",
)
_NO_EPS = Text("这是没有加 ε 的结果：a = γ / √(σ² + ε)。", "This is without ε: a = γ / √(σ² + ε).")
_NO_ROOT = Text(
    "这是除以方差的结果。要除以它的平方根。", "This is divided by the variance. Divide by its root."
)
_NO_GAMMA = Text("γ 没有进权重。", "γ is not in the weight.")
_INPUTS = Text(
    "这是缩放了输入轴。每个输出通道有自己的 a，也就是权重的第 0 轴。",
    "This scales the axis of the inputs. Each output channel has its a: the weight's axis 0.",
)
_NO_MEAN = Text("均值没有减。", "The mean was not subtracted.")
_NO_BETA = Text("β 没有加。", "β was not added.")
_OLD_LOST = Text("旧偏置不见了。", "The old bias is gone.")


def _compare(answer: Answer, random: Generator, *shape: int, has_bias: bool = True) -> None:
    out, eps = shape[0], 0.1
    weight = draw(random, *shape)
    bias = signed(random, out) if has_bias else None
    mean, gamma, beta = (signed(random, out) for _ in range(3))
    var = signed(random, out).abs()
    found = answer.call("fold", weight, bias, mean, var, gamma, beta, eps)
    new_weight, new_bias = parts(found, ("weight", "bias"))
    wide = weight.double()
    old = 0.0 if bias is None else bias.double()

    def rows(values: Tensor) -> Tensor:
        return values.reshape(-1, *(1 for _ in shape[1:]))

    deviation = (var.double() + eps).sqrt()
    scale = gamma / deviation
    mistakes = [
        Mistake(wide * rows(gamma / var.double().sqrt()), _NO_EPS),
        Mistake(wide * rows(gamma / (var.double() + eps)), _NO_ROOT),
        Mistake(wide / rows(deviation), _NO_GAMMA),
    ]
    if shape[0] == shape[1]:
        mistakes.append(Mistake(wide * scale.reshape(1, -1, *(1 for _ in shape[2:])), _INPUTS))
    same(new_weight, wide * rows(scale), "weight", mistakes)
    same(
        new_bias,
        (old - mean) * scale + beta,
        "bias",
        (
            Mistake(old - mean * scale + beta, _SHIFT),
            Mistake(old * scale + beta, _NO_MEAN),
            Mistake((old - mean) * scale, _NO_BETA),
            Mistake(beta - mean * scale, _OLD_LOST),
            Mistake(old - mean + beta, _SHIFT),
        ),
    )


def _linear(answer: Answer, random: Generator) -> None:
    _compare(answer, random, pick(random, 2, 4), pick(random, 5, 7))


def _square(answer: Answer, random: Generator) -> None:
    _compare(answer, random, 4, 4)


def _convolution(answer: Answer, random: Generator) -> None:
    _compare(answer, random, pick(random, 2, 4), 5, 3, 2)


def _no_bias(answer: Answer, random: Generator) -> None:
    _compare(answer, random, 3, pick(random, 4, 6), has_bias=False)


EXERCISE = Exercise(
    number=4,
    title=Text("折叠进前面的层", "Folding into the layer before"),
    chapter="03-mathematics.md",
    task=Text(
        """
评估时，统计量是常数，批量归一化只是每个通道的一次仿射变换。把它并进前面的线性层或卷积，返回新的权重和偏置 `(weight, bias)`，使得

    新层(x) = 归一化(旧层(x))

- `weight` 的第 0 轴是输出通道：线性层 (O, I)，卷积 (O, I, H, W)。
- `bias` 可能是 `None`：旧层没有偏置。返回的偏置总是张量。
""",  # noqa: E501 (a line break would show as a space)
        """
In evaluation the statistics are constants, and batch normalization is no more
than an affine map of each channel. Fold it into the linear layer or convolution
before it: return a new `(weight, bias)` so that

    new_layer(x) = normalization(old_layer(x))

- Axis 0 of `weight` is the output channels: (O, I) of a linear layer, (O, I, H,
  W) of a convolution.
- `bias` may be `None`, where the old layer has none. The bias that is returned
  is always a tensor.
""",
    ),
    names=("fold",),
    summary=Text(
        "返回折叠之后的 (weight, bias)。", "Return (weight, bias) of the layer with it folded in."
    ),
    start='''import torch


def fold(weight, bias, mean, var, gamma, beta, eps=1e-5):
    """{summary}"""
    raise NotImplementedError
''',
    checks=(
        Check(Text("线性层", "a linear layer"), _linear),
        Check(
            Text("方阵权重的线性层", "a linear layer with a square weight"),
            _square,
        ),
        Check(Text("卷积", "a convolution"), _convolution),
        Check(Text("没有偏置的线性层", "a linear layer without a bias"), _no_bias),
    ),
    solution="""import torch


def fold(weight, bias, mean, var, gamma, beta, eps=1e-5):
    scale = gamma / torch.sqrt(var + eps)
    if bias is None:
        bias = torch.zeros_like(mean)
    rows = scale.reshape(-1, *(1 for _ in weight.shape[1:]))
    return weight * rows, (bias - mean) * scale + beta
""",
)
