"""Batch normalization along a sequence: each step has running statistics of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module

from batchnorm import autograd_kernels, functional
from batchnorm.errors import BatchNormError
from batchnorm.kernels import calls, native, select
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.moments import Moments, accumulation_dtype
from batchnorm.running import Running, sound

#: Fewest sequences that make statistics of a step in training.
FEWEST = 2

#: Statistics of a step as the kernels keep them, their count, and whether they are the batch's.
OfStep = tuple[Tensor, float, bool]

_BANK = "step{}"
_NOTHING: Running = (None, None, None)


def add_steps(norm: BatchNorm, length: int) -> None:
    """Give a layer a bank for each step but the last; its own statistics are those of all after."""
    for step in range(length - 1):
        norm.add_bank(_BANK.format(step))


def steps_by_batch(sizes: Sequence[int]) -> int:
    """How many steps the batch normalises in training, if so many sequences go on at each."""
    return max(1, sum(size >= FEWEST for size in sizes))  # of one at first, the layer complains


def along(norm: BatchNorm, sizes: Sequence[int], reached: int, length: int) -> Steps:
    """A layer on its way along a batch of sequences.

    In training, the batch normalises as long as enough sequences go on. Else running statistics do,
    those of the same step; or, of one that no batch has reached, of the last that one has.

    Args:
        norm: the layer, with banks by `add_steps`.
        sizes: how many sequences go on at each step, never more than before.
        reached: how many steps batches have had in training, this one too; 0: not known.
        length: how many steps have running statistics of their own.
    """
    by_batch = steps_by_batch(sizes) if norm.training else 0
    last = (reached or len(sizes)) - 1
    places = (step if step < by_batch else min(step, last) for step in range(len(sizes)))
    names = [_BANK.format(place) if place < length - 1 else None for place in places]
    if (norm.training and sizes[0] < FEWEST) or _needs_its_call(norm):
        return Steps(norm, sizes, by_batch, names)
    if norm._frozen:
        by_batch = 0
    learns = norm.weight.requires_grad or (norm.bias is not None and norm.bias.requires_grad)
    if by_batch or (learns and torch.is_grad_enabled()):
        return ByFunction(norm, sizes, by_batch, names)
    return _Affine(norm, sizes, by_batch, names)


class Steps:
    """By calls of the layer, which all see that look on: hooks, and tools."""

    def __init__(
        self, norm: BatchNorm, sizes: Sequence[int], by_batch: int, names: Sequence[str | None]
    ) -> None:
        self.norm = norm
        self.sizes = sizes
        self.by_batch = by_batch
        self.names = names

    def each(self, x: Tensor) -> Sequence[Tensor]:
        """What every step makes of its rows of x, which come one step after the other."""
        return [self.at(step, part) for step, part in enumerate(x.split(self.sizes))]

    def at(self, step: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """What a step makes of x, and the residual added."""
        # Not by nn.Module's way of setting attributes, which takes as long as all else here.
        own = self.norm.__dict__
        training = own["training"]
        own["training"], own["_bank"] = step < self.by_batch, self.names[step]
        try:
            y: Tensor = self.norm(x, None, residual)
        finally:
            own["training"], own["_bank"] = training, None
        return y

    def _running(self) -> list[Running]:
        """The running statistics of each step."""
        banks: Any = self.norm._modules.get("banks")
        keepers = (self.norm if name is None else banks[name] for name in self.names)
        # Modules look their tensors up by a slow way.
        buffers = [keeper._buffers for keeper in keepers]
        return [
            (of["running_mean"], of["running_var"], of["num_batches_tracked"]) for of in buffers
        ]


class ByFunction(Steps):
    """The same by the layer's function; all steps at once that do not wait for one another."""

    def __init__(
        self, norm: BatchNorm, sizes: Sequence[int], by_batch: int, names: Sequence[str | None]
    ) -> None:
        super().__init__(norm, sizes, by_batch, names)
        self.weight, self.bias = norm.weight, norm.bias
        self.settings = norm.momentum, norm.eps, 1, None
        self.running = self._running()
        if not norm.track_running_stats:
            self.running[:by_batch] = [_NOTHING] * by_batch
        self.share = autograd_kernels.share_of(norm.momentum, self.running[0][2])

    def each(self, x: Tensor) -> Sequence[Tensor]:
        """What every step makes of its rows of x, which come one step after the other."""
        steps, size = len(self.sizes), self.sizes[0]
        if self.by_batch < steps or self.sizes[-1] < size:
            return super().each(x)
        runnings: Any = self.running if self.norm.track_running_stats else []
        try:
            served = autograd_kernels.step_each(
                x.unflatten(0, (steps, size)), self.weight, self.bias, runnings, self.settings
            )
        except BatchNormError as error:
            self.norm.locate(error)
            raise
        if served is None:
            return super().each(x)
        y, refused = served
        if refused is not None:
            self.norm.warn_nonfinite(refused)
        return y.unbind()

    def at(self, step: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """What a step makes of x, and the residual added."""
        try:
            y, refused = functional.step(
                x, self.weight, self.bias, residual, None, self.running[step],
                step < self.by_batch, self.settings,
            )  # fmt: skip
        except BatchNormError as error:
            self.norm.locate(error)
            raise
        if refused is not None:
            self.norm.warn_nonfinite(refused)
        return y

    def serves(self, x: Tensor, residual: Tensor) -> bool:
        """Whether `forward` and `backward` may be used for what is like these."""
        return (
            native.serves(x, self.weight, self.bias, residual)
            and calls.saves(x, self.weight, self.bias, residual)
            and x.dtype == residual.dtype == self.weight.dtype
            and self.share is not None
            and all(calls.serves_buffer(b) for running in self.running for b in running[:2])
        )

    def forward(
        self, step: int, x: Tensor, residual: Tensor | None = None, *, later: bool = False
    ) -> tuple[Tensor, OfStep]:
        """`at` by the C++ kernels, without autograd; and what `backward` needs.

        Args:
            step: which.
            x: its input.
            residual: what is added.
            later: running statistics are left to `keep`.

        Raises:
            NotServedError: they leave this to others; nothing has been changed.
        """
        by_batch = step < self.by_batch
        mean, var, counter = self.running[step]
        flags = calls.KEEP | (calls.TRAINING if by_batch else 0)
        y, statistics, count, refused = native.forward(
            *(x, self.weight, self.bias, residual, None, mean, var, counter),
            *(self.share, self.settings[1], 1),
            flags | (calls.LATER if later and by_batch else 0),
        )
        if refused == calls.NOT_SERVED:
            raise autograd_kernels.NotServedError
        of_step = statistics, count, by_batch
        if not later:
            self._kept(step, of_step, refused)
        return y, of_step

    def keep(self, step: int, of_step: OfStep) -> None:
        """The running statistics of a step that `forward` left for later."""
        mean, var, counter = self.running[step]
        statistics, count, by_batch = of_step
        if by_batch and mean is not None and var is not None:
            of_mean, of_var = statistics.unbind()
            refused = native.update(of_mean, of_var, count, mean, var, counter, self.share)
            self._kept(step, of_step, refused)

    def _kept(self, step: int, of_step: OfStep, refused: int) -> None:
        """What follows once running statistics are changed, as in `autograd_kernels.step`."""
        mean, var, counter = self.running[step]
        statistics, count, by_batch = of_step
        if not by_batch or mean is None or var is None:
            return
        torch.autograd.graph.increment_version(
            (mean, var) if counter is None else (mean, var, counter)
        )
        if refused:
            batch_mean, batch_var = statistics
            of_batch = Moments(statistics.new_tensor(count), batch_mean, batch_var * count)
            together = self.settings[0] is None
            self.norm.warn_nonfinite(~sound(of_batch, mean, var, together=together))

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        statistics: Tensor,
        count: float,
        by_batch: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x (the residual's is dy), γ and β.

        Raises:
            NotServedError: as `forward`.
        """
        flags = calls.WANT_X | calls.WANT_PARAMETERS | (calls.TRAINING if by_batch else 0)
        dx, _, d_weight, d_bias, served = native.backward(
            *(dy, x, None, statistics, weight, None, None, None),
            *(count, self.settings[1], 1, flags),
        )
        if served == calls.NOT_SERVED:
            raise autograd_kernels.NotServedError
        return dx, d_weight, d_bias

    def again(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        statistics: Tensor,
        _: float,
        by_batch: bool,
    ) -> Tensor:
        """What `forward` gave, as a function that autograd knows; no statistics are kept."""
        running = _NOTHING if by_batch else (*statistics, None)
        return functional.step(x, weight, bias, residual, None, running, by_batch, self.settings)[0]


class _Affine(Steps):
    """The same by running statistics where none of the parameters learns: an affine map of x."""

    def __init__(
        self, norm: BatchNorm, sizes: Sequence[int], by_batch: int, names: Sequence[str | None]
    ) -> None:
        super().__init__(norm, sizes, by_batch, names)
        means, variances, _ = zip(*self._running(), strict=True)
        mean, var = torch.stack(means), torch.stack(variances)
        with torch.no_grad():
            scale = norm.weight / (var.to(accumulation_dtype(var.device)) + norm.eps).sqrt()
            shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
        # Rounded to the size of mean / √var, as x itself is.
        self.scale, self.shift = scale.to(var.dtype), shift.to(var.dtype)
        self.maps = list(zip(self.shift, self.scale, strict=True))

    def each(self, x: Tensor) -> Sequence[Tensor]:
        steps, size = len(self.sizes), self.sizes[0]
        if self.sizes[-1] < size:
            return super().each(x)
        y = torch.addcmul(self.shift[:, None], x.unflatten(0, (steps, size)), self.scale[:, None])
        return y.to(x.dtype).unbind()

    def at(self, step: int, x: Tensor, residual: Tensor | None = None) -> Tensor:
        shift, scale = self.maps[step]
        if residual is None:
            return torch.addcmul(shift, x, scale).to(x.dtype)
        dtype = torch.promote_types(x.dtype, residual.dtype)
        return torch.addcmul(residual + shift, x, scale).to(dtype)


def _needs_its_call(norm: BatchNorm) -> bool:
    """Whether a call of the layer is, or may be, more than `functional.step`."""
    return bool(
        type(norm) is not BatchNorm  # by parametrization, too
        or "forward" in norm.__dict__  # somebody's own
        or norm._forward_pre_hooks
        or norm._forward_hooks
        or norm._backward_pre_hooks
        or norm._backward_hooks
        or module._has_any_global_hook()
        or norm._collect is not None
        or norm._together is not None
        or norm.virtual_batch_size is not None
        or norm.renorm is not None
        or norm.process_group is not None
        or norm.activation is not None
        # Checkpointing does passes again, and a transform must be told of buffers.
        or select.recomputing()
        or (not torch.compiler.is_compiling() and calls.hooked())
        or (not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active())
    )
