"""How the tools run a model: over any iterable of batches, leaving no trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from batchnorm.errors import ArgumentError, InputError

Step = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch, in place of `call`."""


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: a tensor, a tuple with the input first, or keyword arguments.

    Tensors go to the model's device, where it has one.
    """
    first = isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence)
    batch = to_device(batch[0] if first else batch, model)
    return model(**batch) if isinstance(batch, dict) else model(batch)


def to_device(batch: Any, model: nn.Module) -> Any:
    """The batch where the model is; as it is for a model on several devices, or without tensors."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        return batch
    (device,) = devices

    def move(leaf: Any) -> Any:  # a PackedSequence moves by the same call
        return leaf.to(device) if hasattr(leaf, "to") else leaf

    return tree_map(move, batch)


def check_batches(batches: Any, step: Step | None) -> None:
    """Refuse one batch where several are asked for.

    Raises:
        ArgumentError: `batches` is a tensor or a dict, or cannot be iterated; `step` is no
            function.
    """
    if isinstance(batches, (Tensor, dict, PackedSequence)) or not isinstance(batches, Iterable):
        raise ArgumentError(
            f"expected batches, such as a DataLoader or a list of them, got one "
            f"{type(batches).__name__}; put it in a list"
        )
    if step is not None and not callable(step):
        raise ArgumentError(f"expected step to be a function of model and batch, got {step!r}")


def take(batches: Iterable[Any], most: int) -> list[Any]:
    """The first batches.

    Raises:
        InputError: there are none.
    """
    taken = list(islice(batches, most))
    if not taken:
        raise InputError(
            "expected at least one batch, got none; an iterator that has been used is empty: pass "
            "a list or a DataLoader"
        )
    return taken


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever happens within, also an exception: the model is afterwards as it was.

    Modes, buffers (values and objects), parameters' gradients, and the state of every random
    number generator. Nothing is differentiated within. Hooks are for who adds them to remove.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    gradients = [
        (parameter, parameter.grad, None if parameter.grad is None else parameter.grad.clone())
        for parameter in model.parameters()
    ]
    # Out of inference mode, what was made in it cannot be written to: copies take its place.
    sealed = {
        id(buffer): value
        for _, _, buffer, value in buffers
        if buffer is not None and buffer.is_inference() and not torch.is_inference_mode_enabled()
    }
    with torch.no_grad(), rewound():
        try:
            for module, name, buffer, _ in buffers:
                if id(buffer) in sealed:
                    module._buffers[name] = sealed[id(buffer)]
            yield
        finally:
            for module, training in modes:
                module.training = training
            for module, name, buffer, value in buffers:
                if buffer is not None and value is not None and _writable(buffer):
                    buffer.copy_(value)
                module._buffers[name] = buffer
            for parameter, gradient, value in gradients:
                if gradient is not None and value is not None:
                    gradient.copy_(value)
                parameter.grad = gradient


def _writable(buffer: Tensor) -> bool:
    """Not one that repeats a value (`expand`) or is of inference mode: torch lets nobody write."""
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        return False
    if buffer.layout is not torch.strided:
        return True
    return all(size < 2 or step for size, step in zip(buffer.shape, buffer.stride(), strict=True))


@contextmanager
def eager() -> Iterator[None]:
    """What was compiled is not used: its code does not call hooks that came later."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def rewound() -> Iterator[None]:
    """Afterwards torch's, Python's and NumPy's random number generators are where they were.

    What shuffles and augments by them does so the same way in each of several such blocks.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.callback(random.setstate, random.getstate())
        if "numpy" in sys.modules:
            numpy: Any = sys.modules["numpy"]
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        yield
