"""Acting on a copy of a model: new weights, and what is left of a batch norm layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.errors import InputError
from batchnorm.kernels.reference import ACTIVATIONS
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.tools.folding.algebra import put
from batchnorm.tools.folding.steps import Step, Work
from batchnorm.validation import Activation


class Checked(nn.Identity):
    """What is left of a batch norm layer of torch's that was folded away: what it would refuse.

    Args:
        rank: of the input; with any other, the layer had its channels on another axis than the
            layer that it was folded into. None for any rank.
    """

    def __init__(self, rank: int | None) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        """The input as it is.

        Raises:
            InputError: it has another rank.
        """
        return self._checked(input)

    def extra_repr(self) -> str:
        """What it does."""
        parts = [] if self.rank is None else [f"rank={self.rank}"]
        if isinstance(getattr(self, "activation", None), str):
            parts.append(f"activation={self.activation!r}")
        return ", ".join(parts)

    def _checked(self, x: Tensor) -> Tensor:
        if self.rank is not None and not isinstance(x, fx.Proxy) and x.dim() != self.rank:
            raise InputError(
                f"expected an input of rank {self.rank}, for which a batch norm was folded away "
                f"here, got shape {tuple(x.shape)}; fold the model with such an example"
            )
        return x


class Folded(Checked):
    """What is left of a layer of ours that was folded away: its arguments, and what came after.

        y = activation(x + residual)

    Args:
        rank: as of `Checked`.
        activation: as the layer's.
    """

    def __init__(self, rank: int | None, activation: Activation) -> None:
        super().__init__(rank)
        self.activation = activation

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,  # noqa: ARG002  for callers of the layer
        residual: Tensor | None = None,
    ) -> Tensor:
        """Add and activate; a mask decides statistics only.

        Raises:
            InputError: the input has another rank.
        """
        x = self._checked(x)
        if residual is not None:
            x = x + residual
        if self.activation is None:
            return x
        if callable(self.activation):
            return self.activation(x)
        if self.activation == "relu":
            return torch.relu(x)
        return nn.functional.leaky_relu(x, ACTIVATIONS[self.activation])


@torch.no_grad()
def rewrite(model: nn.Module, steps: Iterable[Step]) -> nn.Module:
    """Fold, in place; a model like the one that the plan was made for."""
    work = Work(model)
    left: dict[nn.Module, nn.Module] = {}
    for step in steps:
        work.take(step)
        left[work.modules[step.layer]] = _left(work.modules[step.layer], step)
    gone = {step.layer for step in steps}
    for name, weights in work.new.items():
        if name not in gone:
            put(work.modules[name], weights)

    def other(value: Any) -> Any:
        return left.get(value, value) if isinstance(value, nn.Module) else value

    for parent in list(model.modules()):
        parent._modules.update({name: other(child) for name, child in parent._modules.items()})
        for name, value in parent.__dict__.items():
            # Models call layers from plain lists, too.
            if name != "_modules" and any(
                other(leaf) is not leaf for leaf in tree_leaves(value)
            ):  # mutant: work
                parent.__dict__[name] = tree_map(other, value)
    return model


def _left(layer: nn.Module, step: Step) -> nn.Module:
    if isinstance(layer, BatchNorm):
        return Folded(step.rank, layer.activation).eval()
    return (nn.Identity() if step.rank is None else Checked(step.rank)).eval()
