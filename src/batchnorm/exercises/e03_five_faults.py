"""Exercise 3: the teaching sample and its five faults."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from batchnorm.exercises.answer import Answer, described
from batchnorm.exercises.compare import Mistake, but_channel, by_channel, draw, pick, same
from batchnorm.exercises.e01_forward import UNBIASED
from batchnorm.exercises.e02_running import GRAPH, NO_GRAPH
from batchnorm.exercises.exercise import Check, Exercise, Text, Wrong

_STORED_BIASED = Text(
    "这是存有偏方差的结果。归一化用有偏的，存的是无偏的：两个方差。",
    "This is what storing the biased variance gives. The biased one normalizes, the unbiased one "
    "is stored: two variances.",
)
_UPDATE_ALONE = Text(
    "把更新放进 with torch.no_grad(): 里。", "Put the update into a with torch.no_grad(): block."
)
_OUTPUT_GRAD = Text("输出需要梯度", "an output that needs a gradient")
_NO_OUTPUT_GRAD = Text("requires_grad 为 False", "requires_grad is False")
_TOO_MUCH = Text(
    "no_grad 里只放更新，不放归一化。", "Only the update goes under no_grad, not the normalization."
)
_CONSTANT = Text(
    "这是把均值和方差当作常数的梯度。归一化要用没有 detach 的统计量。",
    "This is the gradient with mean and variance as constants. Normalize by statistics that are "
    "not detached.",
)
_VALUE_ERROR = Text("ValueError", "a ValueError")
_NO_ERROR = Text("没有报错", "no error")
_ASSERT = Text(
    "python -O 会删掉 assert。写 if …: raise ValueError(…)。",
    "python -O removes assert. Write if …: raise ValueError(…).",
)
_COUNT = Text(
    "每个通道不到 2 个值就 raise ValueError，在更新缓冲区之前。",
    "With less than 2 values a channel, raise ValueError, before the buffers are updated.",
)
_CHANNELS = Text(
    "比较 x.shape[1] 与 features，不符就 raise ValueError。",
    "Compare x.shape[1] with features; where they differ, raise ValueError.",
)
_MESSAGE = Text("说明出了什么问题的消息", "a message that says what is wrong")
_EMPTY = Text("空的 ValueError", "an empty ValueError")
_UNTOUCHED = Text("{name} 保持原样", "{name} as it was")
_TOUCHED = Text("报错之前已经改了它", "it was changed before the error")
_BUFFER = Text("一个叫 {name} 的缓冲区", "a buffer called {name}")
_NO_BUFFER = Text("没有", "none")

_BUFFERS = ("running_mean", "running_var")


def _buffers(layer: Any) -> tuple[Tensor, Tensor]:
    found = dict(layer.named_buffers())
    for name in _BUFFERS:
        if name not in found:
            raise Wrong(_BUFFER.filled(name=name), _NO_BUFFER)
    mean, var = (found[name] for name in _BUFFERS)
    return mean, var


def _expected(x: Tensor, correction: int = 0) -> Tensor:
    wide, axes = x.double(), but_channel(x)
    mean, var = wide.mean(axes), wide.var(axes, correction=correction)
    return (wide - by_channel(mean, x)) / (by_channel(var, x) + 1e-5).sqrt()


def _compare(answer: Answer, x: Tensor) -> None:
    layer = answer.call("BatchNorm", x.shape[1])
    y = answer.call(layer, x)
    same(y, _expected(x), "y", [Mistake(_expected(x, correction=1), UNBIASED)])


def _normalizes(answer: Answer, random: Generator) -> None:
    _compare(answer, draw(random, pick(random, 2, 6), pick(random, 2, 5)))


def _stores(answer: Answer, random: Generator) -> None:
    x = draw(random, pick(random, 2, 6), 3)
    layer = answer.call("BatchNorm", 3)
    answer.call(layer, x)
    mean, var = _buffers(layer)
    wide = x.double()
    biased = 0.9 + 0.1 * wide.var(0, correction=0)
    same(mean, 0.1 * wide.mean(0), "running_mean")
    same(var, 0.9 + 0.1 * wide.var(0), "running_var", [Mistake(biased, _STORED_BIASED)])
    layer.eval()
    y = answer.call(layer, x[:1])
    same(y, (wide[:1] - mean) / (var.double() + 1e-5).sqrt(), "y")


def _graph(answer: Answer, random: Generator) -> None:
    x = draw(random, 6, 3).requires_grad_()
    layer = answer.call("BatchNorm", 3)
    y = answer.call(layer, x)
    if any(buffer.requires_grad for buffer in _buffers(layer)):
        raise Wrong(NO_GRAPH, GRAPH, _UPDATE_ALONE)
    if not y.requires_grad:
        raise Wrong(_OUTPUT_GRAD, _NO_OUTPUT_GRAD, _TOO_MUCH)
    dy = torch.randn(y.shape, generator=random)
    (found,) = torch.autograd.grad(y, x, dy)
    wide = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(_expected(wide), wide, dy.double())
    deviation = (wide.detach().var(0, correction=0) + 1e-5).sqrt()
    same(found, expected, "dx", [Mistake(dy / deviation, _CONSTANT)])


def _refused(answer: Answer, layer: Any, x: Tensor, hint: Text) -> None:
    before = [buffer.clone() for buffer in _buffers(layer)]
    error = answer.raised(layer, x)
    if not isinstance(error, ValueError):
        came = Text.of(described(error)) if error else _NO_ERROR
        raise Wrong(_VALUE_ERROR, came, _ASSERT if isinstance(error, AssertionError) else hint)
    if not str(error):
        raise Wrong(_MESSAGE, _EMPTY)
    for name, buffer, was in zip(_BUFFERS, _buffers(layer), before, strict=True):
        if not torch.equal(buffer, was):
            raise Wrong(_UNTOUCHED.filled(name=name), _TOUCHED, hint)


def _single(answer: Answer, random: Generator) -> None:
    layer = answer.call("BatchNorm", 3)
    x = draw(random, 1, 3)
    _refused(answer, layer, x, _COUNT)
    layer.eval()
    same(answer.call(layer, x), x.double() / (1 + 1e-5) ** 0.5, "y")


def _more_axes(answer: Answer, random: Generator) -> None:
    _compare(answer, draw(random, pick(random, 2, 4), 3, pick(random, 4, 6)))
    _compare(answer, draw(random, 1, 3, 2, pick(random, 2, 4)))


def _channels(answer: Answer, random: Generator) -> None:
    layer = answer.call("BatchNorm", 3)
    _refused(answer, layer, draw(random, 5, 4), _CHANNELS)
    # This one would broadcast, and nobody would notice.
    _refused(answer, layer, draw(random, 5, 1), _CHANNELS)


EXERCISE = Exercise(
    number=3,
    title=Text("教学代码的五处错误", "Five faults of a teaching sample"),
    chapter="09-implementation.md",
    task=Text(
        """
`--start` 给出的是第 9 章的教学代码。它有五处错误，改掉它们：

1. 归一化用有偏方差；存进 `running_var` 的是无偏方差。
2. 缓冲区不连着计算图；输出的梯度照样正确。
3. 训练时每个通道只有一个值：`raise ValueError`，此前什么都不改。
4. 通道在第 1 轴，后面可以有任意多个轴：(N, C)、(N, C, L)、(N, C, H, W)。
5. 通道数不对：`raise ValueError`，不用 `assert`。
""",
        """
`--start` gives you the teaching sample of chapter 9. It has five faults; mend
them:

1. The biased variance normalizes; the unbiased one is stored in `running_var`.
2. The buffers hang on no graph; the gradient of the output is right all the
   same.
3. One value a channel in training: `raise ValueError`, and change nothing
   before.
4. Channels are on axis 1, and any number of axes may follow: (N, C), (N, C, L),
   (N, C, H, W).
5. Another number of channels: `raise ValueError`, not `assert`.
""",
    ),
    names=("BatchNorm",),
    summary=Text("批量归一化层，通道在第 1 轴。", "Batch normalization, with channels on axis 1."),
    start='''import torch
from torch import nn


class BatchNorm(nn.Module):
    """{summary}"""

    def __init__(self, features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.features = features
        self.eps = eps
        self.momentum = momentum
        self.gamma = nn.Parameter(torch.ones(features))
        self.beta = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x):
        assert x.dim() == 2

        if self.training:
            mean, var = torch.mean(x, dim=0), torch.var(x, dim=0)
            self.running_mean.mul_(1 - self.momentum).add_(mean * self.momentum)
            self.running_var.mul_(1 - self.momentum).add_(var * self.momentum)
        else:
            mean, var = self.running_mean, self.running_var

        x = (x - mean) / torch.sqrt(var + self.eps)
        return self.gamma * x + self.beta
''',
    checks=(
        Check(Text("1 有偏方差归一化", "1 the biased variance normalizes"), _normalizes),
        Check(Text("1 无偏方差存下来", "1 the unbiased variance is stored"), _stores),
        Check(Text("2 不连计算图，梯度正确", "2 no graph is kept, gradients are right"), _graph),
        Check(Text("3 每个通道一个值", "3 one value a channel"), _single),
        Check(Text("4 更多的轴", "4 more axes"), _more_axes),
        Check(Text("5 通道数不对", "5 another number of channels"), _channels),
    ),
    solution="""import torch
from torch import nn


class BatchNorm(nn.Module):
    def __init__(self, features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.features = features
        self.eps = eps
        self.momentum = momentum
        self.gamma = nn.Parameter(torch.ones(features))
        self.beta = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x):
        if x.dim() < 2 or x.shape[1] != self.features:
            raise ValueError(f"expected {self.features} channels on axis 1, got {tuple(x.shape)}")
        axes = [axis for axis in range(x.dim()) if axis != 1]
        if self.training:
            count = x.numel() // self.features
            if count < 2:
                raise ValueError(f"expected more than 1 value per channel, got {tuple(x.shape)}")
            mean, var = x.mean(axes), x.var(axes, correction=0)
            with torch.no_grad():
                unbiased = var * count / (count - 1)
                self.running_mean.mul_(1 - self.momentum).add_(mean, alpha=self.momentum)
                self.running_var.mul_(1 - self.momentum).add_(unbiased, alpha=self.momentum)
        else:
            mean, var = self.running_mean, self.running_var

        def along(values):
            return values.reshape(-1, *(1 for _ in x.shape[2:]))

        x = (x - along(mean)) / along(torch.sqrt(var + self.eps))
        return along(self.gamma) * x + along(self.beta)
""",
)
