"""The steps of a plan, and the weights that they lead to, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from batchnorm.tools.folding import algebra
from batchnorm.tools.folding.algebra import Affine, Weights


@dataclass(frozen=True)
class Step:
    """One batch norm layer to fold away.

    Attributes:
        layer: the batch norm's name.
        into: the layer that takes it over.
        after: whether the batch norm comes after that layer; else before.
        rank: the one rank of input for which this is right; None for all that the layer accepts.
        unshifted: right only because the batch norm's shift is 0.
    """

    layer: str
    into: str
    after: bool
    rank: int | None = None
    unshifted: bool = False


class Work:
    """New weights of a model, in float64, as step by step they come to be."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.new: dict[str, Weights] = {}

    def weights(self, name: str) -> Weights:
        """Of a layer, as they are so far."""
        return self.new[name] if name in self.new else Weights.of(self.modules[name])

    def affine(self, name: str) -> Affine:
        """What a batch norm layer does in evaluation so far."""
        return algebra.affine(self.modules[name], self.weights(name))

    def after(self, step: Step) -> Weights:
        """What the layer that takes over would have."""
        weights, affine = self.weights(step.into), self.affine(step.layer)
        return weights.then(affine) if step.after else weights.following(affine)

    def take(self, step: Step) -> None:
        """Do a step."""
        self.new[step.into] = self.after(step)
