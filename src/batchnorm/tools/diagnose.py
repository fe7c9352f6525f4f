"""Diagnosis: what is wrong with the batch norm layers of a real model, and where."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.errors import ArgumentError
from batchnorm.sync import Group
from batchnorm.tools.diagnosis import configuration, gap, inputs, processes, statistics
from batchnorm.tools.diagnosis.modes import normalizing_by, switchable
from batchnorm.tools.diagnosis.watch import Seen, Trace, Watch
from batchnorm.tools.feeding import Step, call, check_batches, take, untouched
from batchnorm.tools.findings import CODES, Diagnosis, Finding, LayerReport, ordered
from batchnorm.tools.layers import every_batch_norm

#: Batches for which the gap after recalibration is measured: two more passes each.
RECALIBRATED_BATCHES = 8


def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    step: Step | None = None,
    max_batches: int = 32,
    optimizer: torch.optim.Optimizer | None = None,
    process_group: Group = None,
    ignore: Sequence[str] = (),
) -> Diagnosis:
    """Find out why a model is good in `train()` and bad in `eval()`, and what else is wrong.

    The model runs over the batches with its batch norm layers normalising by the batch, and again
    by their running statistics, everything else as in evaluation; one layer at a time is switched
    from the one to the other; and one training step is rehearsed. Afterwards the model is as it
    was: modes, statistics, gradients, random numbers. A healthy model has no findings.

    It takes about 2 forward passes a batch, 2 more for the first few, and 4 for each layer of which
    it measures what it alone does to the output (the 40 whose statistics are farthest off).

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
            batch, or a code does not exist.
        InputError: there are no batches, or the model gives nothing that could be compared.

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
    unknown = [code for code in ignore if code not in CODES]
    if isinstance(ignore, str) or unknown:
        raise ArgumentError(f"expected codes of findings, such as ('BN202',), got {ignore!r}")
    if max_batches < 1:
        raise ArgumentError(f"expected max_batches of at least 1, got {max_batches}")
    findings = configuration.check_modes(model, named)
    findings += configuration.check_weight_decay(named, optimizer)
    if process_group is not None:
        findings += processes.check_processes(model, process_group)
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        if "torch._dynamo" in sys.modules:
            # Compiled code does not see hooks that come later.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        examination = _Examination(model, named, take(batches, max_batches), step or call)
        examination.run()
    findings += examination.findings()
    findings = [finding for finding in findings if finding.code not in ignore]
    return Diagnosis(
        ordered(findings),
        examination.reports(),
        examination.gap,
        tuple(examination.notes),
    )


class _Examination:
    """The passes over the data, and what they show."""

    def __init__(
        self, model: nn.Module, named: list[tuple[str, Any]], batches: list[Any], step: Step
    ) -> None:
        self.model, self.named, self.batches, self.step = model, named, batches, step
        self.layers = [layer for _, layer in named]
        self.switched = {layer for layer in self.layers if switchable(layer)}
        self.outputs = gap.Outputs(model, self.layers, batches, step)
        self.watch = Watch(self.layers)
        self.trace = Trace(self.layers)
        self.notes: list[str] = []
        self.alone: dict[Any, float] = {}
        self.repair: dict[Any, float] = {}
        self.dropout_shift: dict[Any, float] = {}
        self.counted: dict[Any, tuple[int, int]] = {}

    def run(self) -> None:
        """All passes. The model is in evaluation, but for layers that are switched."""
        self.model.eval()
        distances = []
        for index, batch in enumerate(self.batches):
            self.watch.next_batch()
            with ExitStack() as stack:
                stack.enter_context(self.watch.hooks())
                if index == 0:
                    stack.enter_context(self.trace.hooks())
                trained = self.outputs.of(batch, self.switched)
            distances.append(gap.distance(trained, self.outputs.of(batch, set())))
        self.drifts = {
            layer: statistics.drift_of(layer, self.seen(layer).batches()) for layer in self.layers
        }
        self.gap = gap.gap_of(distances, self._recalibrated())
        self._attribute()
        if self.trace.dropouts:
            self._drop_out()
        self._rehearse()

    def seen(self, layer: Any) -> Seen:
        """What came into a layer."""
        return self.watch.seen[layer]

    def reached(self, layer: Any) -> bool:
        """Whether a batch ever came."""
        return any(self.seen(layer).calls)

    def _recalibrated(self) -> list[gap.Distance] | None:
        exact = {layer: self.seen(layer).population() for layer in self.switched}
        before = [
            (buffer, buffer.clone())
            for layer in self.switched
            for buffer in (layer.running_mean, layer.running_var)
        ]
        trained = [
            self.outputs.of(batch, self.switched) for batch in self.batches[:RECALIBRATED_BATCHES]
        ]
        try:
            for layer, population in exact.items():
                if population is not None:
                    gap.set_statistics(layer, population)
            return [
                gap.distance(one, self.outputs.of(batch, set()))
                for one, batch in zip(trained, self.batches, strict=False)
            ]
        finally:
            for buffer, value in before:
                buffer.copy_(value)

    def _attribute(self) -> None:
        """Each layer alone by its running statistics, and alone by the batch's."""
        drifting = [
            layer for layer in self.layers if layer in self.switched and self.reached(layer)
        ]
        drifting.sort(key=lambda layer: -(d.score if (d := self.drifts[layer]) else 0))
        for layer in drifting[: gap.MOST_LAYERS]:
            others = self.switched - {layer}
            some = self.outputs.distances(self.switched, others, gap.BATCHES)
            self.alone[layer] = gap.ratio(some)
        if len(drifting) > gap.MOST_LAYERS:
            self.notes.append(
                f"what a layer alone does to the output was measured for {gap.MOST_LAYERS} of "
                f"{len(drifting)} layers, those whose statistics are farthest off"
            )
        whole = gap.ratio(self.outputs.distances(self.switched, set(), gap.BATCHES))
        if not whole > 0:
            return
        for layer in self.alone:
            left = gap.ratio(self.outputs.distances(self.switched, {layer}, gap.BATCHES))
            self.repair[layer] = 1 - left / whole

    def _drop_out(self) -> None:
        """What dropout does to the variance that comes in."""
        watch = Watch(self.layers, deep=False)
        self.model.train()
        with watch.hooks(), normalizing_by(self.layers, self.switched):
            for batch in self.batches:
                watch.next_batch()
                self.step(self.model, batch)
        self.model.eval()
        for layer in self.layers:
            one, other = watch.seen[layer].population(), self.seen(layer).population()
            if one is None or other is None:
                continue
            own, without = one.variance(), other.variance()
            varies = (own > 0) & (without > 0)
            if bool(varies.any()):
                self.dropout_shift[layer] = float((own / without)[varies].log().mean())

    def _rehearse(self) -> None:
        """One training step: how often the layers count, and how often they are called."""
        counters = {
            layer: int(layer.num_batches_tracked)
            for layer in self.switched
            if getattr(layer, "num_batches_tracked", None) is not None
        }
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not counters or not parameters:
            return
        watch = Watch(list(counters), deep=False)
        watch.next_batch()
        self.model.train()
        try:
            with torch.enable_grad():
                with watch.hooks():
                    output = self.step(self.model, self.batches[0])
                calls = {layer: len(watch.seen[layer].calls[0]) for layer in counters}
                gap.loss_of(output).backward()
        except Exception as error:
            # Not every model can: inference only, custom functions, a step without gradients.
            reason = "".join(str(error).splitlines()[:1])
            self.notes.append(
                "double counting by activation checkpointing was not looked for: a training step "
                f"failed with {type(error).__name__}: {reason}"
            )
            return
        finally:
            self.model.eval()
        for layer, before in counters.items():
            self.counted[layer] = calls[layer], int(layer.num_batches_tracked) - before

    def findings(self) -> list[Finding]:
        """Of all layers, in their order."""
        found: list[Finding] = []
        for name, layer in self.named:
            of_buffers = statistics.check_buffers(name, layer)
            found += of_buffers
            if not self.reached(layer):
                found.append(_unreached(name))
                continue
            found += configuration.check_momentum(name, layer)
            broken = any(finding.code in ("BN103", "BN104") for finding in of_buffers)
            if not broken:
                drift, alone = self.drifts[layer], self.alone.get(layer)
                found += statistics.check_drift(name, layer, drift, alone)
            origin, shift = self.trace.before.get(layer), self.dropout_shift.get(layer)
            found += configuration.check_origin(name, layer, origin, shift)
            found += configuration.check_calls(name, self.seen(layer).calls)
            if layer in self.counted:
                found += configuration.check_double_counting(name, *self.counted[layer])
            activated = layer in self.trace.activated
            found += inputs.check_inputs(name, layer, self.seen(layer), activated)
        return found

    def reports(self) -> tuple[LayerReport, ...]:
        """One for each layer."""
        return tuple(self._report(name, layer) for name, layer in self.named)

    def _report(self, name: str, layer: Any) -> LayerReport:
        seen, drift = self.seen(layer), self.drifts[layer]
        count = getattr(layer, "num_batches_tracked", None)
        channels = next(
            len(t)
            for t in (layer.running_mean, layer._parameters.get("weight"), *seen.means())
            if t is not None
        )
        batches = seen.batches()
        return LayerReport(
            name=name,
            kind=type(layer).__name__,
            channels=channels,
            updates=None if count is None else int(count),
            momentum=layer.__dict__.get("momentum"),
            calls=sum(map(len, seen.calls)) / len(seen.calls),
            values=sum(float(m.count) for m in batches) / len(batches) if batches else None,
            mean_drift=drift.mean if drift else None,
            var_drift=drift.var if drift else None,
            gap=self.alone.get(layer),
            repair=self.repair.get(layer),
        )


def _unreached(name: str) -> Finding:
    return Finding(
        "BN208",
        "info",
        name,
        "no batch reached this layer",
        {},
        "if the model uses it in training only, look at it there; else it can go",
    )
