"""BatchNorm that learns the number of channels from its first input: what a lazy layer becomes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.rnn import PackedSequence

from batchnorm.errors import InputError
from batchnorm.layers.batch_norm import BatchNorm

#: torch's own.
LAZY = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)


_UNINITIALIZED = (UninitializedParameter, UninitializedBuffer)


class LazyBatchNorm(LazyModuleMixin, BatchNorm):
    """A converted lazy layer until its first input, which makes a `BatchNorm` of it.

    It is never constructed: `convert` changes the class of a lazy layer of torch's, whose own hooks
    do the rest.
    """

    cls_to_become = BatchNorm

    def initialize_parameters(self, x: Tensor | PackedSequence, *_: Any, **__: Any) -> None:
        """Give every tensor the number of channels of the input."""
        data = x.data if isinstance(x, PackedSequence) else x
        if not -data.dim() <= self.channel_dim < data.dim():
            raise InputError(
                f"expected an axis {self.channel_dim} of x, with the channels, got x of shape "
                f"{tuple(data.shape)}"
            )
        channels = data.shape[self.channel_dim]
        tensors = [*self._parameters.values(), *self._buffers.values()]
        lazy = [tensor for tensor in tensors if isinstance(tensor, _UNINITIALIZED)]
        for tensor in lazy:
            tensor.materialize((channels,))
        # From a state dict they have come already.
        sized = next((tensor for tensor in tensors if tensor is not None and tensor.dim()), None)
        self.num_features = channels if sized is None else len(sized)
        if lazy:
            self.reset_parameters()
