"""What comes into batch norm layers, and from where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from batchnorm.kernels import select
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.moments import Moments, accumulation_dtype, expand_mask
from batchnorm.tools.diagnosis.modes import channel_axis
from batchnorm.tools.diagnosis.padding import Padding, padding_in

#: Batches in which padding is looked for: it compares every position with every other's.
PADDED_BATCHES = 2


@dataclass
class Seen:
    """What came into one layer, over all batches of a pass.

    Attributes:
        calls: of each batch, the moments of each call of the layer.
        samples: of each batch, the moments of the samples' own means (first call).
        finite: whether all of it was.
        highest: greatest output of each channel.
        padding: what looks like padding in the first batches, if anything does.
    """

    calls: list[list[Moments]] = field(default_factory=list)
    samples: list[Moments] = field(default_factory=list)
    finite: bool = True
    highest: Tensor | None = None
    padding: list[Padding] = field(default_factory=list)

    def batches(self) -> list[Moments]:
        """Moments of each batch that reached the layer with finite values."""
        merged = [Moments.merge_all(calls) for calls in self.calls if calls]
        return [moments for moments in merged if bool(moments.m2.isfinite().all())]

    def means(self) -> list[Tensor]:
        """Of all calls."""
        return [moments.mean for calls in self.calls for moments in calls]

    def population(self) -> Moments | None:
        """Moments of all batches together."""
        batches = self.batches()
        return Moments.merge_all(batches) if batches else None


class Watch:
    """Hooks on layers that keep what they see, batch by batch, until removed."""

    def __init__(self, layers: list[Any], *, deep: bool = True) -> None:
        self.seen: dict[Any, Seen] = {layer: Seen() for layer in layers}
        self._deep = deep

    @contextmanager
    def hooks(self) -> Iterator[Watch]:
        """While it lasts, the hooks are there."""
        with ExitStack() as stack:
            for layer, seen in self.seen.items():
                for handle in (
                    layer.register_forward_pre_hook(partial(self._before, seen), with_kwargs=True),
                    layer.register_forward_hook(partial(self._after, seen)),
                ):
                    stack.callback(handle.remove)
            yield self

    def next_batch(self) -> None:
        """What comes now belongs to another batch."""
        for seen in self.seen.values():
            seen.calls.append([])

    def _before(self, seen: Seen, layer: nn.Module, args: Any, kwargs: Any) -> None:
        x, mask = given(layer, args, kwargs)
        if x is None or x.dim() < 2 or not x.is_floating_point():
            return  # the layer will say so
        axis = channel_axis(layer, x.dim())
        moments = select.moments(x, mask, axis)
        seen.finite &= bool(moments.m2.isfinite().all())
        first = not seen.calls[-1]
        seen.calls[-1].append(moments)
        if not self._deep or not first:
            return
        seen.samples.append(Moments.of(_sample_means(x, mask, axis)))
        if len(seen.calls) <= PADDED_BATCHES and mask is None and (found := padding_in(x, axis)):
            seen.padding.append(found)

    @staticmethod
    def _after(seen: Seen, layer: nn.Module, _: Any, y: Any) -> None:
        y = y.data if isinstance(y, PackedSequence) else y
        if not isinstance(y, Tensor) or y.dim() < 2 or not y.numel():
            return
        axis = channel_axis(layer, y.dim())
        highest = y.detach().amax([a for a in range(y.dim()) if a != axis])
        seen.highest = highest if seen.highest is None else torch.maximum(seen.highest, highest)


def given(layer: nn.Module, args: Any, kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
    """The input and the mask that a layer was called with."""
    ours = isinstance(layer, BatchNorm)
    x = args[0] if args else kwargs.get("x" if ours else "input")
    mask = (args[1] if len(args) > 1 else kwargs.get("mask")) if ours else None
    if isinstance(x, PackedSequence):
        x = x.data
    return (x.detach(), mask) if isinstance(x, Tensor) else (None, None)


def _sample_means(x: Tensor, mask: Tensor | None, axis: int) -> Tensor:
    """Each sample's own mean of each channel, (N, C); samples of which nothing counts are left out.

    Values of one sample are alike: neighbours in an image, steps of a sequence. How far samples
    differ says how much a batch of them knows.
    """
    wide = accumulation_dtype(x.device)
    first = _flat(x, axis)
    if mask is None:
        return first.mean(2, dtype=wide)
    weights = _flat(expand_mask(mask, x, axis).to(wide), axis)
    total = weights.sum(2)
    means = (torch.where(weights > 0, first, 0.0) * weights).sum(2) / total
    return means[total[:, 0] > 0]


def _flat(x: Tensor, axis: int) -> Tensor:
    """(N, C, rest); where channels come first, all is one sample."""
    x = x.movedim(axis, 1) if axis else x[None]
    return x.reshape(*x.shape[:2], -1)


@dataclass(frozen=True)
class Origin:
    """What made a tensor: a function of torch's.

    Attributes:
        function: its name, such as "conv2d".
        bias: whether it added a bias.
        dropout: probability of a dropout that its input comes from; 0: none.
    """

    function: str
    bias: bool = False
    dropout: float = 0.0


_AFFINE = {"linear"} | {f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)}
_RELU = {"relu", "relu_", "relu6"}


class Trace(TorchFunctionMode):
    """Learns, over one pass, what feeds each layer directly, and whose output a ReLU takes.

    Modules and functions alike. What views a tensor (transposed, flattened) has its memory, which
    is how it is known; so all that matters is kept until the pass has ended.

    Attributes:
        before: what made each layer's input, where that is known.
        activated: layers whose output goes to a ReLU, and nothing but.
        dropouts: how many dropouts that drop anything there were.
    """

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.before: dict[Any, Origin] = {}
        self.activated: set[Any] = set()
        self.dropouts = 0
        self._layers = layers
        self._made: dict[int, tuple[Tensor, int, Origin]] = {}
        self._dropped: dict[int, float] = {}
        self._outputs: dict[int, Any] = {}
        self._kept: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._note(getattr(function, "__name__", ""), args, kwargs or {}, out)
        return out

    def _note(self, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
        x = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input")
        if not isinstance(x, Tensor):
            return
        if name in _AFFINE:
            bias = (args[2] if len(args) > 2 else kwargs.get("bias")) is not None
            origin = Origin(name, bias, self._dropped.get(_memory(x), 0.0))
            self._made[_memory(out)] = out, out._version, origin
        elif "dropout" in name:
            probability = float(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
            if probability > 0:
                self.dropouts += 1
                self._dropped[_memory(out)] = probability
                self._kept.append(out)
        elif name in _RELU and (layer := self._outputs.get(_memory(x))) is not None:
            self.activated.add(layer)

    @contextmanager
    def hooks(self) -> Iterator[Trace]:
        """While it lasts, functions and layers are watched."""
        with ExitStack() as stack:
            for layer in self._layers:
                for handle in (
                    layer.register_forward_pre_hook(self._before, with_kwargs=True),
                    layer.register_forward_hook(self._after),
                ):
                    stack.callback(handle.remove)
            stack.enter_context(self)
            yield self
        self._made.clear()
        self._outputs.clear()
        self._kept.clear()

    def _before(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        x, _ = given(layer, args, kwargs)
        if x is None:
            return
        _, version, origin = self._made.get(_memory(x), (None, None, None))
        if origin is not None and version == x._version:
            self.before[layer] = origin
        elif (probability := self._dropped.get(_memory(x))) is not None:
            self.before[layer] = Origin("dropout", dropout=probability)
        if origin is not None and (probability := self._dropped.get(_memory(x))) is not None:
            # In evaluation a dropout gives back what it got.
            self.before[layer] = Origin("dropout", dropout=probability)

    def _after(self, layer: nn.Module, _: Any, y: Any) -> None:
        if isinstance(y, Tensor):
            self._outputs[_memory(y)] = layer
            self._kept.append(y)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
