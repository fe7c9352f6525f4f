"""Banks of statistics: one layer, several kinds of data."""

from __future__ import annotations

from types import TracebackType

from torch import nn

from batchnorm.errors import ArgumentError
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.tools.layers import own_batch_norms


def bank(model: nn.Module, name: str, *, affine: bool = False) -> Bank:
    """Keep the running statistics of one kind of data apart: real and generated, domains, tasks.

    The first time, each batch norm layer gets a bank of that name: running statistics that begin
    as a copy of the layer's own. Within the block, layers use and update the bank's in place of
    their own. Banks are part of the state dict (`LAYER.banks.NAME.running_mean`, …), and loading
    one makes them.

    Args:
        model: all of whose batch norm layers are `BatchNorm`.
        name: a word.
        affine: the bank has γ and β of its own, too, which begin as copies. An optimizer must be
            told of them: so make the bank before it.

    Returns:
        What `with` takes, as often as wanted. A bank within a bank counts; after it, the outer one.

    Raises:
        ArgumentError: there are no such layers, or others beside them; the name is no word; the
            bank is there already, with another `affine`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import BatchNorm, bank
        >>> model = nn.Sequential(nn.Linear(4, 8), BatchNorm(8))
        >>> fake = bank(model, "fake")
        >>> _ = model(torch.randn(16, 4))
        >>> with fake:
        ...     _ = model(100 * torch.randn(16, 4))
        >>> float(model[1].running_var.max()) < 2 < float(model[1].banks.fake.running_var.max())
        True
    """
    layers = [layer for _, layer in own_batch_norms(model)]
    for layer in layers:
        layer.check_bank(name, affine=affine)
    for layer in layers:
        layer.add_bank(name, affine=affine)
    return Bank(layers, name)


class Bank:
    """A bank of each of some layers, for `with`: see `bank`."""

    def __init__(self, layers: list[BatchNorm], name: str) -> None:
        self._layers = layers
        self._name = name
        self._outer: list[list[str | None]] = []

    def __repr__(self) -> str:
        return f"<bank {self._name!r} of {len(self._layers)} layers>"

    def __enter__(self) -> Bank:
        for layer in self._layers:
            if self._name not in getattr(layer, "banks", ()):
                raise ArgumentError(f"expected a layer with a bank {self._name!r}, got {layer}")
        self._outer.append([layer._bank for layer in self._layers])
        for layer in self._layers:
            layer._bank = self._name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for layer, outer in zip(self._layers, self._outer.pop(), strict=True):
            layer._bank = outer
