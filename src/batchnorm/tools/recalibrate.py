"""Recalibration: running statistics that are exactly those of the data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.errors import ArgumentError, SyncError
from batchnorm.sync import Group, Synchronizer, check_group, resolve
from batchnorm.tools.feeding import Step, call, check_batches, untouched
from batchnorm.tools.freeze import is_frozen
from batchnorm.tools.layers import every_batch_norm, is_fixed, keepers
from batchnorm.tools.observe import observe
from batchnorm.tools.passes import Walk, evaluating
from batchnorm.tools.progress import Tell, progress_of
from batchnorm.tools.recalibration import Part, Recalibration

METHODS = ("batch", "layerwise")


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    step: Step | None = None,
    method: str = "batch",
    process_group: Group = None,
    max_batches: int | None = None,
    progress: bool | Tell = False,
) -> Recalibration:
    """Replace the running statistics by those of the data, exactly, in place.

        running_mean = Σ x / n        running_var = Σ (x − running_mean)² / (n − 1)

    over everything that comes into a layer from all batches together: batches count by what is in
    them, the variance between batches is there, and nothing is computed as E[x²] − E[x]². The old
    statistics have no part in it, nor has momentum. The variance is the unbiased one, as it is in
    training.

    What comes into a layer depends on what the layers before it normalise by, and so does the
    answer:

    - `method="batch"`: each batch by its own statistics, in one pass over the data. The first
      layer's answer is exact whatever the batches; deeper layers see activations a little different
      from those of evaluation, the smaller the batches the more so. (A batch is normalised as one:
      `virtual_batch_size`, `renorm` and a layer's `process_group` are set aside.)
    - `method="layerwise"`: by the new statistics of the layers before it. The result is that of
      the network which evaluation runs: there, what comes into each layer has just the mean and
      variance that the layer keeps, however the data are split into batches, even of one. It takes
      a pass for each layer that comes after another, only as far as that layer, over the same
      batches in each pass; random numbers repeat.

    Everything else is in evaluation: dropout is off. Left alone are layers that are frozen
    (`freeze`, or a class that never trains), paused, in `eval()` while the model is in `train()`,
    or never reached, and those without running statistics. Banks count as layers: the one in use is
    recalibrated. A layer that is called several times takes in all calls together; layerwise, until
    its own statistics are there it is normalised by the batch, so the result is exact where its
    output does not come back to it, as in a network with two inputs. If anything is raised, nothing
    has changed.

    Args:
        model: with any batch norm layers. It may be compiled, which is not used here; of what is
            wrapped in DistributedDataParallel, the buffers are not broadcast meanwhile.
        batches: any iterable of batches as the model takes them: tensors; tuples, whose first
            element is the input; dicts of keyword arguments, such as a mask. Not an iterator, for
            "layerwise".
        step: called as step(model, batch) in place of that.
        method: "batch" or "layerwise".
        process_group: pool what all processes of a torch.distributed group have, or "world" for
            all processes; they may have any number of batches, also none, for they meet only after
            a pass. None: this process alone, also where layers share their statistics in training.
        max_batches: use no more than these; there may be fewer.
        progress: True for a bar on standard error, if that is a terminal (needs rich); or a
            function that is called as progress(done, total) after each batch of each pass, where
            total is None while nobody knows it.

    Returns:
        How far off the old statistics were, and which layers were left alone, and why.
        `num_batches_tracked` becomes the number of batches with momentum=None, where it is the
        weight of what is there against what comes later; else it is only raised to that, for
        `Renorm` goes by it.

    Raises:
        ArgumentError: an option is impossible, or there is no layer to recalibrate.
        InputError: there are no batches, or too little in them; the step or the model's forward
            calls train(); with "batch", a batch has a single
            value per channel; with "layerwise", passes differ in their number of batches, or
            batches in the order of the layers.
        SyncError: the processes do not agree, did not all come, or another one had an error; of an
            error on one, all are told when they have gone through their batches.

    Warns:
        NonFiniteWarning: what came into some channels was not finite. They go without those
            batches, or keep their old statistics if nothing else came.

    Source: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", https://arxiv.org/abs/2105.07576

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import BatchNorm, recalibrate
        >>> model, data = nn.Sequential(BatchNorm(4)), 5 + 2 * torch.randn(50, 4)
        >>> report = recalibrate(model, data.split([20, 20, 10]))
        >>> torch.allclose(model[0].running_var, data.var(0)), report.batches
        (True, 3)
    """
    check_batches(batches, step)
    check_options(batches, method, max_batches)
    check_group(process_group)
    layers, left = _chosen(model)
    group = resolve(process_group)
    sync = None if group is None else Synchronizer(group, "recalibrate")
    parts = [
        Part(name if keeper is layer else _name_of(model, keeper), layer, keeper)
        for layer, name in layers.items()
        for keeper in keepers(layer)
    ]
    with progress_of("Recalibrating", progress) as tell:
        if sync is not None:
            _agree(sync, parts, method)
        walk = Walk(model, batches, step or call, max_batches, parts, method, sync, tell)
        with untouched(model), evaluating(model), observe(layers, walk.see):
            walk.scout()
            if method == "layerwise":
                walk.layer_by_layer()
    done = [part for part in parts if part.batches]
    left |= {part.name: "never reached" for part in parts if not part.batches}
    # What may be raised, a warning too, comes before what is changed.
    reports = tuple(part.report() for part in done)
    for part in done:
        part.warn()
    for part in done:
        part.write(shared=sync is not None)
    return Recalibration(method, walk.total_batches, walk.passes, reports, left)


def check_options(batches: Iterable[Any], method: str, max_batches: int | None) -> None:
    """Refuse what cannot be.

    Raises:
        ArgumentError: an option is impossible, or `batches` can be used once only, for "layerwise".
    """
    if method not in METHODS:
        raise ArgumentError(f'expected method to be "batch" or "layerwise", got {method!r}')
    if max_batches is not None and (type(max_batches) is not int or max_batches < 1):
        raise ArgumentError(f"expected max_batches to be positive or None, got {max_batches!r}")
    if method == "layerwise" and isinstance(batches, Iterator):
        raise ArgumentError(
            f"expected batches that can be gone through again for each layer, got an iterator "
            f"({type(batches).__name__}); pass a DataLoader, or list(batches)"
        )


def _chosen(model: nn.Module) -> tuple[dict[_BatchNorm, str], dict[str, str]]:
    """The layers to recalibrate with their names; and why not, by name, of all others."""
    every = every_batch_norm(model)
    for name, module in model.named_modules():
        tensors = *module._parameters.values(), *module._buffers.values()
        if any(is_lazy(tensor) for tensor in tensors):
            raise ArgumentError(
                f"expected a model whose parameters are there, got {type(module).__name__} at "
                f"{name!r}, which waits for its first input; run the model on a batch before"
            )
    reasons = {name: _reason(model, layer) for name, layer in every}
    layers = {layer: name for name, layer in every if reasons[name] is None}
    left = {name: reason for name, reason in reasons.items() if reason is not None}
    if not layers:
        shown = "; ".join(f"{name!r}: {reason}" for name, reason in left.items())
        raise ArgumentError(f"expected a batch norm layer to recalibrate, got none: {shown}")
    return layers, left


def _reason(model: nn.Module, layer: Any) -> str | None:
    """Why a layer is left alone."""
    if is_fixed(layer):
        return "of a class that never trains"
    if layer.running_mean is None or layer.running_var is None:
        return "keeps no running statistics"
    if is_frozen(layer):
        return "frozen"
    if layer.track_running_stats is False:
        return "paused"
    if model.training and not layer.training:
        return "in eval() while the model is in train()"
    return None


def _name_of(model: nn.Module, keeper: Any) -> str:
    names: Iterator[str] = (name for name, module in model.named_modules() if module is keeper)
    return next(names)


def _agree(sync: Synchronizer, parts: list[Part], method: str) -> None:
    """Compare what must be the same on all processes.

    Raises:
        SyncError: it is not.
    """
    facts = method, [(part.name, len(part.old[0])) for part in parts]
    digest = int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:7])
    described = torch.tensor([digest], device=parts[0].device)
    if (sync.gather(described) != described).any():
        raise SyncError(
            "expected the same method and the same batch norm layers to recalibrate on all "
            "processes, got others on some; are there layers frozen, or in eval(), on one only?"
        )
