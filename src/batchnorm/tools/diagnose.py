"""Diagnosis: what is wrong with the batch norm layers of a real model, and where."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.errors import ArgumentError
from batchnorm.sync import Group
from batchnorm.tools.diagnosis import configuration, processes, whole
from batchnorm.tools.diagnosis.examination import Examination
from batchnorm.tools.diagnosis.modes import still
from batchnorm.tools.feeding import Step, apart, call, check_batches, take, untouched
from batchnorm.tools.findings import Diagnosis, check_codes, ordered
from batchnorm.tools.layers import every_batch_norm
from batchnorm.tools.passes import evaluating


def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    step: Step | None = None,
    max_batches: int = 32,
    optimizer: torch.optim.Optimizer | None = None,
    process_group: Group = None,
    ignore: Collection[str] = (),
) -> Diagnosis:
    """Find out why a model is good in `train()` and bad in `eval()`, and what else is wrong.

    The model runs over the batches with its batch norm layers normalising by the batch, and again
    by their running statistics, everything else as in evaluation; one layer at a time is switched
    from the one to the other; and one training step is rehearsed. Afterwards the model is as it
    was: modes, statistics, gradients, random numbers. A healthy model has no findings.

    It takes 2 forward passes a batch (3 with dropout) and 1 more for the first 8; for each layer 2
    to measure its share of the gap (1 if there are more than 40 layers), and 2 for what it alone
    does to the output (of the 40 whose statistics are farthest off; 4 where that is much); and a
    few. The most memory goes to the batches, the outputs of the first 8, and the activations of
    one.

    Where layers share statistics among processes, all must call, with as many batches.

    Args:
        model: with batch norm layers of any class: ours, torch's, frozen ones.
        batches: as the model is trained with, of its usual size, preprocessing and order: tensors;
            tuples, whose first element is the input; or dicts of keyword arguments.
        step: called as step(model, batch) in place of that; what it returns is compared.
        max_batches: so many are taken. All are in memory at once.
        optimizer: to look at its weight decay.
        process_group: compare the running statistics of these processes ("world" or a group); all
            of them must call.
        ignore: codes of findings that are not wanted, such as "BN202".

    Returns:
        Findings, a report of each layer, and the gap between training and evaluation.

    Raises:
        ArgumentError: there are no batch norm layers, a lazy one has not run yet, `batches` is one
            batch, a code does not exist, or the optimizer is not the model's.
        InputError: there are no batches, or none that training has statistics of; or the model
            gives nothing that could be compared.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import diagnose
        >>> model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8))
        >>> batches = [torch.randn(64, 4) + 2 for _ in range(8)]
        >>> for finding in diagnose(model, batches).findings:  # it was never trained
        ...     print(finding.code, finding.layer, finding.title)
        BN105 1 running statistics were never updated
    """
    named = every_batch_norm(model)
    for name, layer in named:
        if any(is_lazy(t) for t in (*layer._parameters.values(), *layer._buffers.values())):
            raise ArgumentError(
                f"expected layers that have run, got the lazy {type(layer).__name__} at {name!r}: "
                "run the model on one batch first"
            )
    check_batches(batches, step)
    ignored = check_codes(ignore)
    if max_batches < 1:
        raise ArgumentError(f"expected max_batches of at least 1, got {max_batches}")
    configuration.check_optimizer(model, optimizer)
    findings = configuration.check_modes(model, named)
    findings += configuration.check_weight_decay(named, optimizer)
    if process_group is not None:
        findings += processes.check_processes(model, process_group)
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        taken, held = take(batches, max_batches), still(model, named)
        stack.enter_context(apart(model))
        stack.enter_context(evaluating(model))
        examination = Examination(model, named, held, taken, step or call)
        examination.run()
    findings += examination.findings()
    findings += whole.check_gap(examination.gap, findings, examination.reports())
    findings = [finding for finding in findings if finding.code not in ignored]
    return Diagnosis(
        ordered(findings),
        examination.reports(),
        examination.gap,
        tuple(examination.notes),
    )
