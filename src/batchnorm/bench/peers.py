"""Who is measured: our layer, torch as a user writes it, and torch.compile of the same.

All of them start from the same tensors and the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from batchnorm.bench.cases import Case
from batchnorm.layers.batch_norm import BatchNorm

OURS, EAGER, COMPILE, COPY = "batchnorm", "torch eager", "torch.compile", "copy"

PEERS = (EAGER, COMPILE)

_TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}

Expression = Callable[[Tensor, Tensor | None], Tensor]
"""y = expression(x, residual)."""


@dataclass(frozen=True)
class Problem:
    """The tensors of a case: data, and what a layer starts with."""

    x: Tensor
    residual: Tensor
    dy: Tensor
    state: dict[str, Tensor]

    @classmethod
    def of(cls, case: Case, device: str, seed: int) -> Problem:
        """Draw them; the same case and seed give the same tensors."""
        generator = torch.Generator().manual_seed(seed)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator)

        def data(spread: float, offset: float) -> Tensor:
            tensor = draw(case.shape).mul_(spread).add_(offset).to(device, case.dtype)
            if case.channels_last:
                tensor = tensor.to(memory_format=torch.channels_last)
            return tensor

        channels = (case.shape[1],)
        state = {
            "weight": 1 + 0.25 * draw(channels),
            "bias": 0.5 * draw(channels),
            "running_mean": draw(channels),
            "running_var": 1 + draw(channels).square(),
            "num_batches_tracked": torch.tensor(0),
        }
        return cls(data(1.5, 0.5).requires_grad_(), data(1, 0).requires_grad_(), data(1, 0), state)


@dataclass(frozen=True)
class Contender:
    """One way to compute a fusion, and the layer whose parameters it uses."""

    name: str
    layer: nn.BatchNorm1d | nn.Module
    expression: Expression
    add: bool

    def reset(self, problem: Problem, *, training: bool) -> None:
        """Put the layer into its first state: what runs have changed is undone."""
        self.layer.load_state_dict(problem.state)
        self.layer.train(training)

    def leaves(self, problem: Problem) -> dict[str, Tensor]:
        """Return what gradients are taken of, by name."""
        given = {"x": problem.x, "residual": problem.residual} if self.add else {"x": problem.x}
        return {**given, **dict(self.layer.named_parameters())}

    def step(self, problem: Problem, mode: str) -> Callable[[], object]:
        """Return what is timed: one pass, its output dropped.

        Whether autograd records is up to the caller: `inference` is to be called under no_grad().
        """
        expression, x, dy = self.expression, problem.x, problem.dy
        residual = problem.residual if self.add else None
        if mode != "forward+backward":
            return lambda: expression(x, residual)
        leaves = tuple(self.leaves(problem).values())
        return lambda: torch.autograd.grad(expression(x, residual), leaves, dy)


def ours(case: Case, fusion: str, device: str) -> Contender:
    """Our layer, with what follows it fused."""
    layer = BatchNorm(case.shape[1], activation=None if fusion == "bn" else "relu", device=device)
    if fusion == "bn+add+relu":
        return Contender(OURS, layer, lambda x, residual: layer(x, residual=residual), True)
    return Contender(OURS, layer, lambda x, _: layer(x), False)


def eager(case: Case, fusion: str, device: str) -> Contender:
    """Torch's layer and operations, as a user writes them."""
    layer = _TORCH[len(case.shape)](case.shape[1], device=device)
    expressions: dict[str, Expression] = {
        "bn": lambda x, _: layer(x),
        "bn+relu": lambda x, _: functional.relu(layer(x)),
        "bn+add+relu": lambda x, residual: functional.relu(layer(x) + residual),
    }
    return Contender(EAGER, layer, expressions[fusion], fusion == "bn+add+relu")


def compiled(case: Case, fusion: str, device: str) -> Contender:
    """torch.compile of the eager expression, for this very shape. Nothing is compiled yet."""
    # Graphs of other shapes would make this one's sizes symbolic, as a second shape does.
    torch.compiler.reset()
    plain = eager(case, fusion, device)
    return Contender(COMPILE, plain.layer, torch.compile(plain.expression), plain.add)
