"""Who is measured: our layer, torch as a user writes it, and torch.compile of the same.

All of them start from the same tensors and the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from batchnorm.bench.cases import Case
from batchnorm.layers.batch_norm import BatchNorm

OURS, EAGER, COMPILE, COPY = "batchnorm", "torch eager", "torch.compile", "copy"

PEERS = (EAGER, COMPILE)

#: On a GPU: torch eager kept from cuDNN where it would call that; torch.compile that tries more.
NATIVE, AUTOTUNE = "torch eager, no cuDNN", "torch.compile, max-autotune"

GPU_PEERS = (EAGER, NATIVE, COMPILE, AUTOTUNE)

#: max-autotune without its CUDA graphs, which copy every argument into memory of their own at each
#: call: inside a model they would not, and the copies would count against it here.
_AUTOTUNE_MODE = "max-autotune-no-cudagraphs"

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
        # Where they are wanted: gigabytes would be long in coming from the CPU.
        there = torch.Generator(device).manual_seed(seed) if device != "cpu" else generator

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator)

        def data(spread: float, offset: float) -> Tensor:
            tensor = torch.randn(case.shape, generator=there, device=device)
            tensor = tensor.mul_(spread).add_(offset).to(case.dtype)
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

    def copy(self, device: str | None = None) -> Problem:
        """Return the same in other memory, of another device if one is given."""
        x, residual, dy = (
            v.detach().to(device or v.device, copy=True) for v in (self.x, self.residual, self.dy)
        )
        return Problem(x.requires_grad_(), residual.requires_grad_(), dy, self.state)


@contextmanager
def _no_cudnn() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    # All of them are named: what is not, it sets to a default of its own.
    with cudnn.flags(
        enabled=False,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        allow_tf32=cudnn.allow_tf32,
    ):
        yield


def raised_by(name: str) -> str:
    """The note that an exception of this contender has."""
    return f"raised by {name}"


@dataclass(frozen=True)
class Contender:
    """One way to compute a fusion, and the layer whose parameters it uses.

    Attributes:
        cudnn: whether torch may call cuDNN; it asks that of a global, see `settings`.
    """

    name: str
    layer: nn.BatchNorm1d | nn.Module
    expression: Expression
    add: bool
    cudnn: bool = field(default=True, kw_only=True)

    @contextmanager
    def settings(self) -> Iterator[None]:
        """What to be in while calling it; what it raises then gets a note that names it."""
        try:
            with nullcontext() if self.cudnn else _no_cudnn():
                yield
        except Exception as error:
            error.add_note(raised_by(self.name))
            raise

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


def without_cudnn(case: Case, fusion: str, device: str) -> Contender:
    """The eager expression by torch's own kernels."""
    plain = eager(case, fusion, device)
    return Contender(NATIVE, plain.layer, plain.expression, plain.add, cudnn=False)


def compiled(case: Case, fusion: str, device: str) -> Contender:
    """torch.compile of the eager expression, for this very shape. Nothing is compiled yet."""
    return _compiled(COMPILE, None, eager(case, fusion, device))


def autotuned(case: Case, fusion: str, device: str) -> Contender:
    """The same, and it tries what is the fastest."""
    return _compiled(AUTOTUNE, _AUTOTUNE_MODE, eager(case, fusion, device))


def _compiled(name: str, mode: str | None, plain: Contender) -> Contender:
    # Graphs of other shapes would make this one's sizes symbolic, as a second shape does.
    torch.compiler.reset()
    expression = torch.compile(plain.expression, mode=mode)
    return Contender(name, plain.layer, expression, plain.add)


MAKERS: Mapping[str, Callable[[Case, str, str], Contender]] = MappingProxyType(
    {EAGER: eager, NATIVE: without_cudnn, COMPILE: compiled, AUTOTUNE: autotuned}
)


def takes_part(name: str, case: Case, *, compiles: bool) -> bool:
    """Whether a peer has something of its own to show in a case.

    Args:
        name: of the peer.
        case: what is measured.
        compiles: whether there is time to compile it.
    """
    if name == NATIVE:  # elsewhere torch's own kernels are what it calls anyway
        return case.dtype is not torch.bfloat16 and len(case.shape) > 2
    return name == EAGER or compiles
