"""Exact large batches from micro-batches: all are normalised by the statistics of their union."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from batchnorm.errors import ArgumentError, BatchNormError, InputError
from batchnorm.kernels import select
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.moments import Moments
from batchnorm.tools.accumulate import take
from batchnorm.tools.feeding import Step, call, check_batches
from batchnorm.tools.layers import own_batch_norms


def forward_together(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    step: Step | None = None,
    offload: bool = False,
) -> list[Any]:
    """Run micro-batches through a model as if they were one batch to its batch norm layers.

    Each batch norm layer waits until all micro-batches have come, merges their moments, and
    normalises each by those of all; gradients go through them, to any order. Outputs, gradients,
    running statistics (one update) and the count of batches are those of the union of the
    micro-batches in one forward pass. (Where a forward pass calls a layer with renorm more than
    once, all calls draw toward the running statistics before it.)

    The price: the activations of all micro-batches are kept until the backward pass, as those of
    the large batch would be; every batch norm layer works in plain torch operations, and a compiled
    model runs uncompiled. With `offload` the activations are kept in the host's memory, so the
    device holds those of one layer at a time; each goes there and back once. No forward pass is
    repeated. (`accumulate_statistics` costs nothing, but each micro-batch is normalised by its own
    statistics.)

    Args:
        model: all of whose batch norm layers are `BatchNorm`. In evaluation mode they have nothing
            to wait for.
        batches: micro-batches: tensors; tuples, whose first element is the input; or dicts of
            keyword arguments. They may differ in size, and are all in memory at once.
        step: called as step(model, batch) in place of that; what it returns, such as a loss, is
            what comes back. Each runs in a thread of its own, and they take turns, in order: so
            banks, `pause_statistics` and `accumulate_statistics` belong around this call.
        offload: keep what the backward pass needs in the host's memory.

    Returns:
        What the model, or `step`, gave for each micro-batch. Add the losses and call backward once.

    Raises:
        ArgumentError: `batches` is one batch; there are no such layers, or others beside them; or a
            layer has a virtual_batch_size, which asks for the opposite; or it is called within a
            `step`.
        InputError: the micro-batches did not all pass the same layers, or activation checkpointing
            is used within, whose second forward passes could not wait for each other, or a `step`
            changes what the layers do. Statistics are not updated then, nor if anything else is
            raised.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import BatchNorm, forward_together
        >>> model, batch = nn.Sequential(nn.Linear(4, 8), BatchNorm(8)), torch.randn(10, 4)
        >>> outputs = forward_together(model, batch.split([6, 4]))
        >>> torch.allclose(torch.cat(outputs), model(batch), atol=1e-6)
        True
    """
    check_batches(batches, step)
    if isinstance(threading.current_thread(), _Walker):
        raise ArgumentError("expected one forward_together at a time, got one within another")
    names = {layer: name for name, layer in own_batch_norms(model)}
    for layer, name in names.items():
        if layer.virtual_batch_size is not None and layer.training:
            raise ArgumentError(
                "expected layers without virtual_batch_size, which makes batches smaller where "
                f"this makes them larger; got {layer} at {name!r}"
            )
    walkers = [_Walker(model, batch, step or call, offload) for batch in batches]
    meeting = _Meeting(walkers, {layer: _switches(layer) for layer in names})
    with ExitStack() as stack:
        for layer in names:
            stack.callback(setattr, layer, "_together", layer._together)
            layer._together = meeting.merge
        if "torch._dynamo" in sys.modules:
            # Compiled code cannot wait for anyone.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        results = meeting.hold()
    # All of this may be within activation checkpointing, which does it again.
    for layer, keeper, moments in () if select.recomputing() else meeting.updates:
        take(layer, keeper, moments, names[layer])
    return results


def _switches(layer: BatchNorm) -> tuple[Any, ...]:
    """What the tools that are used with `with` change."""
    return layer._bank, layer.track_running_stats, layer._collect


class _LeaveError(BaseException):
    """Ends a walker's thread; not for `except Exception` within a model."""


class _Walker(threading.Thread):
    """One micro-batch on its way through the model."""

    def __init__(self, model: nn.Module, batch: Any, step: Step, offload: bool) -> None:
        super().__init__(daemon=True)
        self.work = lambda: step(model, batch)
        self.offload = offload
        self.surroundings = _Surroundings()
        self.may_go = threading.Semaphore(0)
        self.has_stopped = threading.Semaphore(0)
        self.hooks: Any = None
        self.at: BatchNorm | None = None
        self.brought: Moments | None = None
        self.taken: Moments | BatchNormError | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = False

    def run(self) -> None:
        self.may_go.acquire()
        try:
            with ExitStack() as stack:
                self.surroundings.enter(stack)
                if self.offload:
                    stack.enter_context(
                        torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
                    )
                self.hooks = _hooks()
                self.result = self.work()
        except BaseException as error:
            self.error = error
        self.done = True
        self.at = None
        self.has_stopped.release()

    def go_on(self) -> None:
        """Called by who holds the meeting: returns when this one waits at a layer, or is done."""
        self.may_go.release()
        self.has_stopped.acquire()

    def wait(self, layer: BatchNorm, moments: Moments) -> Moments:
        """Called within `run`, at a layer: the moments of all."""
        self.at, self.brought, self.taken = layer, moments, None
        self.has_stopped.release()
        self.may_go.acquire()
        if self.taken is None:
            raise _LeaveError
        if isinstance(self.taken, BatchNormError):
            raise self.taken
        return self.taken


class _Surroundings:
    """What torch keeps for each thread: as where this was made."""

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        kinds = ["cpu"]
        if torch.accelerator.is_available():
            kinds.append(torch.accelerator.current_accelerator().type)  # type: ignore[union-attr]
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in kinds
        ]
        self.device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
        self.default_device = torch.get_default_device()
        self.inference = torch.is_inference_mode_enabled()
        self.hooks = _hooks()

    def enter(self, stack: ExitStack) -> None:
        if self.inference:
            stack.enter_context(torch.inference_mode())
        else:
            stack.enter_context(torch.set_grad_enabled(self.grad))
        if self.hooks is not None:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*self.hooks))
        for kind, dtype, enabled in self.autocast:
            # Without its cache: weights cast once would be those of this thread's graph.
            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        if self.device is not None:
            stack.enter_context(torch.cuda.device(self.device))
            stack.enter_context(torch.cuda.stream(self.stream))
        if self.default_device != torch.get_default_device():
            stack.enter_context(self.default_device)


class _Meeting:
    """Lets walkers go one at a time, and merges what they bring to a layer."""

    def __init__(self, walkers: list[_Walker], switches: dict[BatchNorm, tuple[Any, ...]]) -> None:
        self.walkers = walkers
        self.switches = switches
        self.updates: list[tuple[BatchNorm, Any, Moments]] = []

    def hold(self) -> list[Any]:
        """The results of all."""
        try:
            for walker in self.walkers:
                walker.start()
            while True:
                for walker in self.walkers:
                    walker.go_on()
                    if walker.error is not None:
                        raise walker.error
                if all(walker.done for walker in self.walkers):
                    return [walker.result for walker in self.walkers]
                self._merge()
        finally:
            for walker in self.walkers:
                walker.taken = None
                while walker.is_alive() and not walker.done:
                    walker.go_on()
                if walker.ident is not None:
                    walker.join()

    def _merge(self) -> None:
        at = [walker.at for walker in self.walkers]
        layer = at[0]
        if layer is None or any(other is not layer for other in at):
            raise InputError(
                "expected all micro-batches to pass the same batch norm layers in one order, got "
                + ", ".join(
                    "one done" if one is None else f"one at {one}" for one in dict.fromkeys(at)
                )
            )
        brought = [walker.brought for walker in self.walkers]
        total: Moments | BatchNormError
        try:
            total = Moments.merge_all([moments for moments in brought if moments is not None])
            total = layer.shared(total)
        except BatchNormError as error:
            total = error  # which the layer raises, with its name
        for walker in self.walkers:
            walker.taken, walker.brought = total, None

    def merge(self, layer: BatchNorm, keeper: Any) -> Callable[[Moments], Moments] | None:
        """What turns a micro-batch's moments at this layer into those of all; None elsewhere.

        Raises:
            InputError: activation checkpointing is used, or the layer was changed.
        """
        walker = threading.current_thread()
        if not isinstance(walker, _Walker) or walker not in self.walkers:
            return None
        if _hooks() != walker.hooks or torch.is_grad_enabled() != walker.surroundings.grad:
            raise InputError(
                "expected no activation checkpointing (nor torch.no_grad, by which it works) "
                "within forward_together: in the backward pass a micro-batch could not wait for "
                "the others; keep activations in the host's memory instead, with offload=True"
            )
        if _switches(layer) != self.switches[layer]:
            raise InputError(
                "expected banks, pause_statistics and accumulate_statistics around "
                "forward_together, got one within: micro-batches take turns, and it would hold for "
                "all of them"
            )

        def meet(moments: Moments) -> Moments:
            total = walker.wait(layer, moments)
            empty = select.concrete(total.count) and not bool(total.count)
            if walker is self.walkers[0] and layer.track_running_stats and not empty:
                detached = (total.count, total.mean.detach(), total.m2.detach())
                self.updates.append((layer, keeper, Moments(*detached)))
            return total

        return meet


def _hooks() -> Any:
    # No public name exists for them; checkpointing works by such.
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
