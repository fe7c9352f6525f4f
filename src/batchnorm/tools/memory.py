"""Memory: of a layer's input and output, the graph keeps one and makes the other again."""

from __future__ import annotations

import warnings
from contextlib import ContextDecorator, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from batchnorm.errors import ArgumentError
from batchnorm.kernels import calls
from batchnorm.tools.graph import UNSEEN, Account, Keeper, unpack
from batchnorm.tools.layers import own_batch_norms

_TAKEN = "other hooks around the block see what is saved, and torch asks only the innermost"
_INSTEAD = "Enter save_memory first, then save_on_cpu, checkpointing, or what else has these hooks."


@dataclass
class MemorySavings:
    """What a `save_memory` block has not kept for the backward passes of its graphs.

    Attributes:
        layers: bytes by layer, of all its calls; 0 for a layer that saves nothing.
        reasons: why a layer saves nothing, or nothing in some call of it.
    """

    layers: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all layers together."""
        return sum(self.layers.values())

    def __str__(self) -> str:
        lines = [f"{self.bytes:,} bytes not kept"]
        for name, number in self.layers.items():
            reason = self.reasons.get(name)
            lines.append(f"  {name}: {number:,}" + (f" ({reason})" if reason else ""))
        return "\n".join(lines)


def save_memory(model: nn.Module, keep: str = "input") -> MemoryBlock:
    """Graphs made within keep one of a layer's input and output, and make the other again.

    Usually they keep both: the layer saves its input, and what comes next, a convolution, saves its
    output. Values, running statistics and what is differentiated are as without; only the forward
    pass needs to be within. `backward` may come later, twice, and be differentiated itself.

    `keep="input"`: an output is made again in the backward pass, to the bit, so gradients are the
    very same (but where something was changed through `.data`, which no one sees). Nothing is
    inverted: γ may be zero. So is what an activation makes of it as an operation of its own (ReLU,
    leaky ReLU, SiLU, GELU, ReLU6, Hardswish), and the output of a call with a residual, where that
    is kept anyway, as the output of every other block is.

    `keep="output"`: the input is made again from the output, x̂ = (φ⁻¹(y) − β)/γ, as well as y's
    rounding lets it be, in channels where |β/γ| + |mean|/σ is at most 8. The others, γ near zero
    among them, keep their input. (Which those are must be read back from a GPU, once a call.) For
    calls in training, by the batch's moments, without a mask, a residual or ghost batches, and
    without an activation or with a fused "leaky_relu"; ReLU has no inverse. An input that shares
    its memory with other tensors that are saved, or with a larger one, is kept.

    These work as usual, and save nothing: calls with `renorm`, or with a function as `activation`;
    a layer right after one that saves; outputs that nothing saves, or of which something saves a
    copy in another dtype (autocast may make one); calls within `torch.utils.checkpoint` and
    `forward_together`, or in other threads; the steps of `BatchNormLSTM`, which take a slower way
    here, with other roundings. What the block yields says why. In compiled code this does nothing:
    that goes by its own plan; around it or within.

    Blocks may be one within the other, of one model or of several. Other hooks that see what is
    saved (`torch.autograd.graph.save_on_cpu`, checkpointing) belong within the block: around it
    they keep what they have, and the block does nothing and warns.

    Args:
        model: whose batch norm layers are all `BatchNorm`.
        keep: "input" or "output".

    Returns:
        What `with` takes, as often as wanted, and gives what is saved: `MemorySavings`, which grows
        with each forward pass. Or a decorator.

    Raises:
        ArgumentError: `keep` is something else; or, by `with`, there are no layers, or others than
            ours.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import BatchNorm, save_memory
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 16, 3), BatchNorm(16), nn.ReLU(), nn.Conv2d(16, 8, 3)
        ... )
        >>> with save_memory(model) as saved:
        ...     loss = model(torch.randn(4, 3, 10, 10)).square().mean()
        >>> loss.backward()
        >>> saved.layers  # 4 · 16 · 8 · 8 numbers of 4 bytes
        {'1': 16384}
    """
    if keep not in ("input", "output"):
        raise ArgumentError(f'expected keep to be "input" or "output", got {keep!r}')
    return MemoryBlock(model, keep)


class MemoryBlock(ContextDecorator):
    """What `with` takes: see `save_memory`."""

    def __init__(self, model: nn.Module, keep: str) -> None:
        self._model, self._keep = model, keep
        #: By those that are open; None: within compiled code.
        self._open: list[ExitStack | None] = []

    def __enter__(self) -> MemorySavings:
        if torch.compiler.is_compiling():
            self._open.append(None)
            return MemorySavings()
        layers = own_batch_norms(self._model)
        names = [name for name, _ in layers]
        savings = MemorySavings(dict.fromkeys(names, 0), dict.fromkeys(names, UNSEEN))
        with ExitStack() as stack:
            keeper = _keeper(self._keep == "input")
            if keeper is None:
                savings.reasons.update(dict.fromkeys(names, _TAKEN))
                message = f"save_memory does nothing here: {_TAKEN}. {_INSTEAD}"
                warnings.warn(message, stacklevel=2)
            else:
                for name, layer in layers:
                    account = Account(name, savings.layers, savings.reasons)
                    stack.enter_context(_Watch(keeper, account, layer))
                stack.enter_context(saved_tensors_hooks(keeper, unpack))
            self._open.append(stack.pop_all())
        return savings

    def __exit__(self, *_: object) -> None:
        stack = self._open.pop()
        if stack is not None:
            stack.close()


def _keeper(keep_input: bool) -> Keeper | None:
    """Of a new block: that of the block around it, where it can be; None: others were first.

    To hand those what is not dropped would not be right: a layer's call is read off its node in the
    forward pass, all of which checkpointing would then do again; and it gives each tensor once.
    """
    top = calls.hooks()
    if top is None:
        return Keeper(keep_input)
    if not isinstance(top[0], Keeper):
        return None
    return top[0] if top[0].inexact is not keep_input else Keeper(keep_input)


class _Watch:
    """What a layer tells of its calls, as long as the block is open.

    Blocks may be closed in another order than they were opened, by generators for one.
    """

    def __init__(self, keeper: Keeper, account: Account, layer: Any) -> None:
        self.keeper, self.account, self.layer, self.open = keeper, account, layer, True
        self.before: _Watch | None = layer.__dict__["_watched"]

    def __call__(self, *call: Any) -> None:
        self.keeper.passed(self.account, *call)
        before = self.before
        while before is not None:
            if before.open:
                before.account.missed("a save_memory block within this one counts its calls")
            before = before.before

    def __enter__(self) -> None:
        self.layer.__dict__["_watched"] = self

    def __exit__(self, *_: object) -> None:
        self.open, last = False, self.layer.__dict__["_watched"]
        while last is not None and not last.open:
            last = last.before
        self.layer.__dict__["_watched"] = last
