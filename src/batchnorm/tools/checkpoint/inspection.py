"""Inspection: what a checkpoint's batch norm layers tell without the model."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from itertools import groupby

import torch

from batchnorm.tools.checkpoint.channels import said
from batchnorm.tools.checkpoint.inputs import inputs
from batchnorm.tools.checkpoint.kept import Kept, read
from batchnorm.tools.checkpoint.statistics import began_at_one, never_updated, statistics
from batchnorm.tools.checkpoint.whole import copies, counters
from batchnorm.tools.findings import Diagnosis, Finding, LayerReport, check_codes, ordered

_UNKNOWN = (
    "A checkpoint tells neither momentum nor ε (torch's defaults, 0.1 and 1e-5, are assumed), nor "
    "whether a layer is a batch norm or an instance norm that tracks statistics. Whether the "
    "statistics are those of the data, `diagnose` can tell."
)
_NONE = (
    "No batch norm layers: nothing in the file is called running_mean or running_var. Layers with "
    "track_running_stats=False leave none, nor do other normalizations."
)


@torch.no_grad()
def inspect_checkpoint(path: str | os.PathLike[str], *, ignore: Collection[str] = ()) -> Diagnosis:
    """Look at the running statistics, γ and β that a file keeps, without the model and its data.

    Layers are found by their keys (`NAME.running_mean`, …), however deep in the file: state dicts,
    checkpoints with an optimizer beside them, several models, averaged copies, banks. In a file
    with one state dict they are named as in the model, in one with several, by their path.

    Nothing in the file is run: torch reads it with `weights_only=True`, and of safetensors and
    torch's zip archives, tensors that no batch norm layer keeps are not even read from the disk.

    Found are statistics that are not finite (BN103), without variance (BN104), never updated
    (BN105), hardly updated (BN102), in half precision (BN106) or no pair (BN109); dead channels
    (BN304), inputs below ε (BN306) and far from zero (BN307); layers that count more than others
    (BN206) and averaged weights with statistics that are not theirs (BN101).

    Args:
        path: of a file by torch.save, of either format; of a .safetensors file; or of the index of
            one that is in parts (`….index.json`).
        ignore: codes that are not to be reported, such as {"BN304"}.

    Returns:
        Findings, and a line for each layer. Nothing is found in a file without batch norm layers,
        and a note says so.

    Raises:
        ArgumentError: there is no such file, or `ignore` names no code.
        InputError: it is no checkpoint, it is damaged, or only code could rebuild what is in it.
        MissingDependencyError: safetensors is not installed.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from torch import nn
        >>> from batchnorm import BatchNorm, inspect_checkpoint
        >>> model = nn.Sequential(nn.Linear(4, 8), BatchNorm(8))
        >>> model[1].running_var[3] = float("nan")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.pt")
        ...     torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
        ...     found = inspect_checkpoint(path)
        >>> [(finding.code, finding.layer) for finding in found.findings]
        [('BN103', '1')]
    """
    ignored = check_codes(ignore)
    layers, notes = read(path)
    places = [list(of_one) for _, of_one in groupby(layers, key=lambda layer: layer.place)]
    several = len(places) > 1

    def named(layer: Kept) -> str:
        return f"{layer.place}.{layer.name}".strip(".") if several else layer.name

    findings: list[Finding] = []
    for of_one in places:
        from_one = {
            count: began_at_one([layer for layer in of_one if layer.updates == count], count or 0)
            for count in {layer.updates for layer in of_one}
        }
        for layer in of_one:
            findings += statistics(layer, named(layer), from_one=from_one[layer.updates])
            if not never_updated(layer):
                findings += inputs(layer, named(layer))
            notes += [f"{named(layer)}: {text}" for text in _diverged(layer)]
        found, note = counters(of_one[0].place, of_one, named)
        findings += found
        notes += [note] if note else []
    findings += copies(places, named)
    return Diagnosis(
        findings=ordered([finding for finding in findings if finding.code not in ignored]),
        layers=tuple(_report(layer, named(layer)) for layer in layers),
        notes=(*notes, _UNKNOWN if layers else _NONE),
    )


def _diverged(layer: Kept) -> Iterator[str]:
    """Of parameters that are lost; no finding, for they are no matter of batch normalization."""
    for letter, tensor in (("γ", layer.weight), ("β", layer.bias)):
        if tensor is not None and not bool(tensor.isfinite().all()):
            yield f"{letter} is not finite in {said(~tensor.isfinite())}: training has diverged."


def _report(layer: Kept, name: str) -> LayerReport:
    kept = layer.mean if layer.mean is not None else layer.var
    channels = 0 if kept is None else kept.numel()
    return LayerReport(name, "batch norm", channels, updates=layer.updates)
