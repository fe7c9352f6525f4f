"""Where what comes into batch norm layers is from, and what becomes of what they give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from batchnorm.tools.diagnosis.watch import given


@dataclass(frozen=True, eq=False)
class Origin:
    """What made a tensor: a function of torch's.

    Attributes:
        function: its name, such as "conv2d".
        bias: the bias it added, if it did.
        dropout: probability of a dropout that its input comes from; 0: none.
    """

    function: str
    bias: Tensor | None = None
    dropout: float = 0.0


_AFFINE = {"linear"} | {f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)}
_RELU = {"relu", "relu_", "relu6"}


class Trace(TorchFunctionMode):
    """Learns, over one pass, what feeds each layer directly, and whose output a ReLU takes.

    Modules and functions alike. What views a tensor (transposed, flattened) has its memory, which
    is how it is known; so all that matters is kept until the pass has ended. What was changed in
    place since is another tensor: versions tell.

    Attributes:
        before: what made each layer's input, where that is known.
        activated: layers whose output goes to a ReLU.
        dropouts: how many dropouts that drop anything there were.
    """

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.before: dict[Any, Origin] = {}
        self.activated: set[Any] = set()
        self.dropouts = 0
        self._layers = layers
        self._made: dict[_Memory, Origin] = {}
        self._dropped: dict[_Memory, float] = {}
        self._outputs: dict[_Memory, Any] = {}
        self._kept: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        # nn.ReLU6 is a hardtanh from 0 on.
        relu = name in _RELU or (name == "hardtanh" and kwargs.get("min_val") == 0)
        matters = name in _AFFINE or relu or "dropout" in name
        x = args[0] if args else kwargs.get("input")
        # Before the function runs, which may work in place.
        memory = _memory(x) if matters and isinstance(x, Tensor) else None
        out = function(*args, **kwargs)
        if memory is not None and isinstance(out, Tensor):
            self._note(name, args, kwargs, memory, out)
        return out

    def _note(self, name: str, args: Any, kwargs: Any, memory: _Memory, out: Tensor) -> None:
        if name in _AFFINE:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            self._made[_memory(out)] = Origin(name, bias, self._dropped.get(memory, 0.0))
        elif "dropout" in name:
            probability = float(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
            if probability > 0:
                self.dropouts += 1
                self._dropped[_memory(out)] = probability
        elif memory in self._outputs:
            self.activated.add(self._outputs[memory])
        self._kept.append(out)

    @contextmanager
    def hooks(self) -> Iterator[Trace]:
        """While it lasts, functions and layers are watched."""
        with ExitStack() as stack:
            stack.callback(self._forget)
            for layer in self._layers:
                for handle in (
                    layer.register_forward_pre_hook(self._before, with_kwargs=True),
                    layer.register_forward_hook(self._after),
                ):
                    stack.callback(handle.remove)
            stack.enter_context(self)
            yield self

    def _forget(self) -> None:
        for of_memory in (self._made, self._dropped, self._outputs, self._kept):
            of_memory.clear()

    def _before(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        x, _ = given(layer, args, kwargs)
        if x is None:
            return
        memory = _memory(x)
        if memory in self._dropped:
            # In evaluation a dropout gives back what it got: whatever made it is not what is next.
            self.before[layer] = Origin("dropout", dropout=self._dropped[memory])
        elif memory in self._made:
            self.before[layer] = self._made[memory]

    def _after(self, layer: nn.Module, _: Any, y: Any) -> None:
        if isinstance(y, Tensor):
            self._outputs[_memory(y)] = layer
            self._kept.append(y)


class WithoutBias(TorchFunctionMode):
    """While it lasts, linear functions do not add these biases."""

    def __init__(self, biases: list[Tensor]) -> None:
        super().__init__()
        self._biases = {id(bias) for bias in biases}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in _AFFINE:
            if len(args) > 2 and id(args[2]) in self._biases:
                args = (*args[:2], None, *args[3:])
            elif id(kwargs.get("bias")) in self._biases:
                kwargs = {**kwargs, "bias": None}
        return function(*args, **kwargs)


_Memory = tuple[int, int]


def _memory(tensor: Tensor) -> _Memory:
    """Where its values are, and how often they were changed in place."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return id(tensor), 0  # sparse, nested and wrapped tensors show no memory
    # Those of inference mode do not count changes.
    return tensor.untyped_storage().data_ptr(), 0 if tensor.is_inference() else tensor._version
