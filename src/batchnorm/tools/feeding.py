"""How the tools run a model: over any iterable of batches, leaving no trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
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

    Of a tuple, nothing else is looked at: mostly labels. Tensors go to the model's device, where it
    has one.
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
    if isinstance(batches, (tuple, list)) and _is_one(batches):
        raise ArgumentError(
            "expected batches, such as a DataLoader or a list of them, got what looks like one: "
            f"tensors of shapes {', '.join(str(tuple(t.shape)) for t in batches)}; put it in a list"
        )
    if step is not None and not callable(step):
        raise ArgumentError(f"expected step to be a function of model and batch, got {step!r}")


def _is_one(batches: Sequence[Any]) -> bool:
    """Whether these are the fields of one batch: tensors that are not all of one kind."""
    if not all(isinstance(batch, Tensor) for batch in batches):
        return False
    return len({(batch.dim(), batch.is_floating_point()) for batch in batches}) > 1


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
        (module, name, buffer, None if buffer is None else buffer.detach().clone(), _writes(buffer))
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    gradients = [
        (p, p.grad, None if p.grad is None else p.grad.clone(), _writes(p.grad))
        for p in model.parameters()
    ]
    with torch.no_grad(), rewound():
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for module, name, buffer, value, writes in buffers:
                _put_back(buffer, value, writes)
                module._buffers[name] = buffer
            for parameter, gradient, value, writes in gradients:
                _put_back(gradient, value, writes)
                parameter.grad = gradient


def _writes(tensor: Tensor | None) -> int:
    """How often it was written to; tensors of inference mode do not count."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _put_back(tensor: Tensor | None, value: Tensor | None, writes: int) -> None:
    # What nobody has written to may be such that nobody can (`expand`); and autograd refuses a
    # backward pass that needs what has been. Who writes to `.data` is not counted.
    if tensor is None or value is None or (_writes(tensor) == writes and _alike(tensor, value)):
        return
    with torch.inference_mode() if tensor.is_inference() else nullcontext():
        tensor.copy_(value)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Bit for bit; False where that cannot be seen."""
    if one.layout is not torch.strided or one.is_meta or one.is_quantized:
        return False

    def octets(tensor: Tensor) -> Tensor:
        flat = tensor.detach().flatten()
        return flat.clone(memory_format=torch.contiguous_format).view(torch.uint8)

    return torch.equal(octets(one), octets(other))


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Within, buffers are copies, and there are no gradients: nobody writes to the model's own.

    Then a backward pass that is still to come finds what it needs, and tensors of inference mode,
    which nobody can write to, are no obstacle.
    """
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    copies = {id(b): b.detach().clone() for _, _, b in buffers if b is not None}
    try:
        for module, name, buffer in buffers:
            if buffer is not None:
                module._buffers[name] = copies[id(buffer)]
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for parameter, gradient in gradients:
            parameter.grad = gradient


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


def seed(number: int) -> None:
    """Begin random numbers anew, within `rewound`."""
    # Not torch.manual_seed, which also seeds devices whose numbers nobody would put back.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    random.seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number)
