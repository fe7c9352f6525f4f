"""Running statistics as a module keeps them: never in half precision, and by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

#: Under this name a layer remembers what it shared last: see `sync_statistics`.
SHARED = "_last_shared"


class WideStatistics(nn.Module):
    """Keeps `running_mean` and `running_var` in float32 at least, whatever the module becomes.

    In bfloat16 a running mean of 100 stalls at 96.
    """

    running_mean: Tensor | None
    running_var: Tensor | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.running_mean, self.running_var
        super()._apply(fn, recurse)
        self._widen_statistics(*before)
        return self

    def _widen_statistics(self, mean: Tensor | None = None, var: Tensor | None = None) -> None:
        """From the values given, if any."""
        for name, exact in (("running_mean", mean), ("running_var", var)):
            buffer = getattr(self, name)
            if buffer is not None and buffer.dtype in (torch.float16, torch.bfloat16):
                source = buffer if exact is None else exact
                setattr(self, name, source.to(buffer.device, torch.float32))

    def reset_running_stats(self) -> None:
        """As if no batch had come; to banks, neither."""
        # A bank's are reset by hand: torch's method is that of its layers.
        self.__dict__.pop(SHARED, None)
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
        counter = getattr(self, "num_batches_tracked", None)
        if counter is not None:
            counter.zero_()
        for bank in getattr(self, "banks", {}).values():
            bank.reset_running_stats()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.__dict__.pop(SHARED, None)
        # With assign=True a checkpoint in half precision brings its own buffers.
        self._widen_statistics()


class StatisticsBank(WideStatistics):
    """One more set of running statistics of a layer, and perhaps of γ and β: see `bank`.

    Attributes:
        running_mean: as the layer's.
        running_var: as the layer's.
        num_batches_tracked: as the layer's.
        weight: γ of its own, or None for the layer's.
        bias: β of its own, or None for the layer's.
    """

    num_batches_tracked: Tensor
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, layer: Any, affine: bool) -> None:
        super().__init__()
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = getattr(layer, name)
            self.register_buffer(name, None if buffer is None else buffer.detach().clone())
        for name in ("weight", "bias"):
            parameter = getattr(layer, name) if affine else None
            if parameter is not None:
                own = parameter.detach().clone()
                parameter = nn.Parameter(own, requires_grad=parameter.requires_grad)
            self.register_parameter(name, parameter)

    def extra_repr(self) -> str:
        """Whether it has γ and β of its own."""
        return f"affine={self.weight is not None}"
