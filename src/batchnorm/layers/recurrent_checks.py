"""What BatchNormLSTM refuses, before anything changes, and what to do instead."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import ArgumentError, InputError

#: Keys of a state dict that a message shows: nn.LSTM's of one layer in one direction.
_SHOWN = 4

_NORMS = "norms."


def check_options(
    max_length: int, normalize: Collection[str], gamma: float, parts: Collection[str]
) -> None:
    """Refuse options that are impossible; torch's own and BatchNorm's are refused by those."""
    if not isinstance(max_length, Integral) or isinstance(max_length, bool) or max_length < 1:
        raise ArgumentError(
            f"expected max_length of at least 1, the steps with statistics of their own, got "
            f"{max_length!r}"
        )
    several = isinstance(normalize, Collection) and not isinstance(normalize, str)
    if not several or not all(isinstance(part, str) and part in parts for part in normalize):
        raise ArgumentError(
            f"expected normalize to be some of {', '.join(map(repr, parts))}, such as ('input',), "
            f"or () for none, got {normalize!r}"
        )
    if not isinstance(gamma, Real) or isinstance(gamma, bool):
        raise ArgumentError(f"expected gamma to be a number, got {gamma!r}")


def check_input(x: Any, input_size: int, *, batch_first: bool, masked: bool) -> None:
    """Refuse what is no batch of sequences, and no sequence."""
    if not isinstance(x, Tensor):
        raise InputError(
            f"expected a tensor or a PackedSequence, got {type(x).__name__}; torch.as_tensor "
            "converts lists and arrays, torch.nn.utils.rnn.pack_sequence packs lists of tensors"
        )
    shape = tuple(x.shape)
    if len(shape) != 3 and (len(shape) != 2 or masked):
        raise InputError(
            "expected input of shape (L, N, channels), (N, L, channels) with batch_first, or "
            f"(L, channels) and no mask, got {shape}"
        )
    if shape[-1] != input_size:
        order = "L" if len(shape) == 2 else "N, L" if batch_first else "L, N"
        setting = "" if len(shape) == 2 else f" and batch_first={batch_first}"
        places = [axis for axis, size in enumerate(shape) if size == input_size]
        hint = (
            f"axis {places[-1]} has {input_size}: if those are the channels, they go last by "
            f"x.transpose({places[-1]}, {len(shape) - 1})"
            if places
            else f"for {shape[-1]} channels, make it with input_size={shape[-1]}"
        )
        raise InputError(
            f"expected input of shape ({order}, {input_size}), for input_size={input_size}"
            f"{setting}, got {shape}; {hint}"
        )
    check_values(x)


def check_packed(data: Tensor, input_size: int) -> None:
    """Refuse the data of a `PackedSequence`."""
    if data.dim() != 2 or data.shape[1] != input_size:
        raise InputError(
            f"expected a PackedSequence of sequences (length, {input_size}), for "
            f"input_size={input_size}, got data of shape {tuple(data.shape)}"
        )
    check_values(data)


def check_values(x: Tensor) -> None:
    """Refuse what nothing can be computed of."""
    if not x.is_floating_point():
        raise InputError(
            f"expected floating input, got {x.dtype}; convert it first, e.g. x.float()"
        )
    if not x.numel():
        raise InputError(
            f"expected at least one step and one sequence, got input of shape {tuple(x.shape)}"
        )


def check_mask(mask: Any, x: Tensor, *, batch_first: bool) -> None:
    """Refuse a mask that is not of bool, or not of the first two axes of x as it was given."""
    if not isinstance(mask, Tensor):
        raise InputError(
            f"expected mask to be a tensor, got {type(mask).__name__}; torch.as_tensor converts "
            "lists and arrays"
        )
    shape, got = tuple(x.shape[:2]), tuple(mask.shape)
    if mask.dtype is torch.bool and got == shape:
        return
    number, time = shape if batch_first else shape[::-1]
    hint = ""
    if got == (number,) and mask.dtype is not torch.bool:
        steps = f"torch.arange({time}, device=lengths.device)"
        made = f"{steps} < lengths[:, None]" if batch_first else f"{steps}[:, None] < lengths"
        hint = f". If these are lengths, this makes a mask of them: {made}"
    elif got == shape:
        hint = ". mask.bool() makes one of zeros and ones; there are no weights here"
    elif got == shape[::-1]:
        hint = f". The other way round it fits: is batch_first={batch_first} right? Else mask.T"
    raise InputError(
        f"expected a mask of bool and of shape {shape}, got {mask.dtype} and {got}{hint}"
    )


def check_pair(hx: Any) -> None:
    """Refuse what is no start, first of all a mask that came in its place."""
    if hx is None:
        return
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        got = "a tensor" if isinstance(hx, Tensor) else type(hx).__name__
        got = f"{len(hx)} things" if isinstance(hx, (tuple, list)) else got
        raise InputError(f"expected (h_0, c_0), got {got}; a mask goes by its name: mask=mask")
    if not all(isinstance(state, Tensor) for state in hx):
        kinds = " and ".join(type(state).__name__ for state in hx)
        raise InputError(f"expected tensors (h_0, c_0), got {kinds}")


def check_state(h: Tensor, c: Tensor, shapes: tuple[Any, Any], x: Tensor) -> None:
    """Refuse a start that does not go with x."""
    if (h.shape, c.shape) != shapes:
        raise InputError(
            f"expected (h_0, c_0) of shapes {shapes[0]} and {shapes[1]}, got {tuple(h.shape)} "
            f"and {tuple(c.shape)}"
        )
    alike = h.dtype == c.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
    if not alike or not h.device == c.device == x.device:
        raise InputError(
            f"expected (h_0, c_0) of {x.dtype} on {x.device}, as x is, got {h.dtype} on "
            f"{h.device} and {c.dtype} on {c.device}"
        )


def check_steps(given: Iterable[str], lstm: nn.Module, prefix: str = "") -> None:
    """Refuse a state dict that has statistics of other steps, as torch does one of other sizes.

    Layers take any bank: the last step's statistics would serve an earlier one.
    """
    keys = [key.removeprefix(prefix) for key in given if key.startswith(prefix)]
    there, here = _steps(keys), _steps(lstm.state_dict())
    if here and there not in (0, here):
        raise InputError(
            f"expected statistics of {here} steps, for max_length={here}, got those of {there}; "
            f"make it with max_length={there}"
        )


def check_state_dict(given: Collection[str], lstm: nn.Module, *, strict: bool) -> None:
    """Refuse a state dict of other steps; and where all must fit, one with no key of a norm.

    Of such a one, as nn.LSTM's is, torch would name every tensor that is missing, of each step, in
    tens of thousands of characters.
    """
    check_steps(given, lstm)
    if not strict or any(key.startswith(_NORMS) for key in given):
        return
    own = list(lstm.state_dict())
    norms = [key for key in own if key.startswith(_NORMS)]
    rest = [key for key in own if not key.startswith(_NORMS)]
    theirs = ""
    if "weight_ih_l0" in given:
        theirs = (
            ". They look like nn.LSTM's, which is another function: BatchNormLSTM(..., "
            "normalize=()) is that one and loads them; strict=False takes the weights over to "
            "begin training from, without the biases that have no place here"
        )
    raise InputError(
        f"expected the state dict of a BatchNormLSTM: {_some(rest)}, and {len(norms)} keys of what "
        f"normalises, {norms[0]} and so on; got {_some(list(given)) or 'no key'}{theirs}"
    )


def _steps(keys: Iterable[str]) -> int:
    """How many steps have statistics."""
    banks = {
        key.partition(".banks.")[2].partition(".")[0]
        for key in keys
        if key.startswith(_NORMS) and key.endswith(".running_mean")
    }
    return sum(not name or name.startswith("step") for name in banks)  # no bank's: the last step's


def _some(keys: list[str]) -> str:
    rest = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
