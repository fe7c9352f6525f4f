"""Folding: batch norm layers that are gone, in the weights of the layers next to them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from batchnorm.errors import ArgumentError
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.tools.feeding import eager, to_device, untouched
from batchnorm.tools.folding.capture import capture
from batchnorm.tools.folding.example import Example
from batchnorm.tools.folding.plan import plan
from batchnorm.tools.folding.report import FoldedLayer, FoldReport, LeftLayer
from batchnorm.tools.folding.rewrite import rewrite
from batchnorm.tools.folding.timing import speedup
from batchnorm.tools.folding.verify import verify
from batchnorm.tools.layers import every_batch_norm, stepwise


def fold(model: nn.Module, example_inputs: Any, *, measure: bool = False) -> nn.Module:
    """Make a copy of a model for evaluation, without the batch norm layers that can do without.

        z = BN(W·x + b) = (s·W)·x + (s·b + β − s·mean)        s = γ / √(var + eps)

    A convolution (1-D to 3-D, grouped, depthwise, transposed), a linear layer or another batch norm
    next to a batch norm takes it over, computed in float64 and rounded once; of the layer is left
    `nn.Identity`, or what it did besides: activation, residual. A batch norm *before* a convolution
    or linear layer is folded if that does not pad with zeros, or the batch norm does not shift.
    The copy has the class, the structure and the names of the model; it is in eval() and only for
    evaluation. The model itself is left as it is.

    Who reads whose output is learnt from torch.fx, of the whole model or of its parts, and from
    torch.export: not from names or order. A layer of which it is not certain stays; `fold_report`
    says why. If torch.fx cannot follow the whole model, because Python code asks for shapes or
    values, the copy is for inputs that lead that code the same way, and a note in the report says
    so. Then the copy is verified: in float64 on the example, on noise like it and on its first
    sample (and, with such code, on the negative and on larger inputs), again with other statistics
    and parameters in the place of the model's, and in the model's own dtype against its own
    rounding error.

    Args:
        model: with any batch norm layers, ours or torch's. Of layers with banks the bank in use is
            folded, or their own statistics; the copy has no banks.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
            Arguments that are no tensors must always be as they are here: other flags may lead
            other ways. Their shapes may be others later.
        measure: find out how much faster the copy is; takes 62 runs of 5 ms or more.

    Returns:
        The copy. Its attribute `fold_report`, a `FoldReport`, says what was folded, what was left
        and why, how exact the copy is, and how fast.

    Raises:
        ArgumentError: there are no batch norm layers, or the model is compiled, scripted, wrapped
            in DistributedDataParallel, lazy or without values.
        FoldError: the copy is not the same function, or nothing could be compared. Rather no model
            than a wrong one.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import BatchNorm, fold
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), BatchNorm(8, activation="relu"), nn.Conv2d(8, 8, 3)
        ... )
        >>> folded = fold(model, torch.randn(2, 3, 8, 8))
        >>> folded[1]
        Folded(rank=4, activation='relu')
        >>> print(folded.fold_report)
        1 of 1 batch norm layers folded
    """
    _check_model(model)
    example = _example(model, example_inputs)
    with untouched(model):
        prepared = _prepared(model)
        with eager():
            captured = capture(prepared, example)
            steps, left = plan(prepared, captured)
            note = captured.note() if steps else None
            errors = verify(prepared, steps, example, other_ways=note is not None)
        speed = speedup(prepared, steps, example) if measure else (None, None)
        folded = rewrite(prepared, steps)
    folded.__dict__["fold_report"] = FoldReport(
        tuple(FoldedLayer(step.layer, step.into, step.after) for step in steps),
        tuple(LeftLayer(layer, reason) for layer, reason in left.items()),
        errors.error64,
        errors.error,
        errors.original_error,
        (*errors.notes, *((note,) if note else ())),
        *speed,
    )
    return folded


def _check_model(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError(
            "expected a torch.nn.Module, got one that torch.jit has compiled; fold it before that"
        )
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise ArgumentError(
            "expected a torch.nn.Module, got one that torch.compile has wrapped; fold "
            "model._orig_mod, and compile what comes out"
        )
    every_batch_norm(model)
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise ArgumentError(
                "expected a torch.nn.Module, got one that DistributedDataParallel has wrapped"
                f"{f' at {name!r}' if name else ''}; fold its .module"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (UninitializedBuffer, UninitializedParameter)) or tensor.is_meta:
            raise ArgumentError(
                f"expected a model with values, got none in {name!r}; run a lazy model once, load "
                "a checkpoint into one on the meta device"
            )


def _example(model: nn.Module, inputs: Any) -> Example:
    if isinstance(inputs, Mapping):
        return Example((), to_device(dict(inputs), model))
    if not isinstance(inputs, (tuple, list)) or isinstance(inputs, PackedSequence):
        inputs = (inputs,)
    return Example(to_device(tuple(inputs), model), {})


def _prepared(model: nn.Module) -> nn.Module:
    """A copy in eval(), whose layers have the statistics that the model would use now."""
    # Pruning, the older weight_norm and models that keep what they computed leave results of a
    # computation in the model, which torch refuses to copy.
    results = [
        value
        for module in model.modules()
        for value in tree_leaves(module.__dict__)
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    prepared = copy.deepcopy(model, {id(value): value.detach().clone() for value in results}).eval()
    prepared.zero_grad()
    by_step = stepwise(model)  # they choose among their banks themselves
    pairs = [
        pair
        for pair in zip(model.modules(), prepared.modules(), strict=True)
        if pair[0] not in by_step
    ]
    for one, other in pairs:
        if isinstance(one, BatchNorm) and isinstance(other, BatchNorm) and "banks" in one._modules:
            if one._bank is not None:
                used = other.banks[one._bank]
                other.load_state_dict(used.state_dict(), strict=False)
            del other.banks
    return prepared
