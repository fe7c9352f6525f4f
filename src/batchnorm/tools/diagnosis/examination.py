"""The passes over the data, and what they show."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.tools.diagnosis import configuration, gap, inputs, statistics
from batchnorm.tools.diagnosis.modes import normalizing_by, processes_of, switchable
from batchnorm.tools.diagnosis.rehearsal import in_training, rehearse
from batchnorm.tools.diagnosis.trace import Trace, WithoutBias
from batchnorm.tools.diagnosis.watch import OneValueError, Seen, Watch
from batchnorm.tools.feeding import Step
from batchnorm.tools.findings import Finding, Gap, LayerReport
from batchnorm.tools.layers import named_keepers, stepwise


class Examination:
    """What `diagnose` does with a model that it will put back as it was.

    Attributes:
        gap: between training and evaluation.
        notes: what could not be looked at, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        named: list[tuple[str, Any]],
        still: set[Any],
        batches: list[Any],
        step: Step,
    ) -> None:
        self.model, self.named, self.still = model, named, still
        self.batches, self.step = batches, step
        self.layers = [layer for _, layer in named]
        self.switched = {layer for layer in self.layers if switchable(layer)} - still
        self.outputs = gap.Outputs(model, self.layers, step)
        self.by_step = stepwise(model)
        self.watch = Watch(self.layers, by_step=self.by_step)
        self.trace, self.trace_of_training = Trace(self.layers), Trace(self.layers)
        self.notes: list[str] = []
        self.alone: dict[Any, float] = {}
        self.exact: dict[Any, float] = {}
        self.share: dict[Any, float] = {}
        self.without_bias: dict[Any, float] = {}
        self.dropout_shift: dict[Any, float] = {}
        self.counted: dict[Any, tuple[int, int]] = {}
        self.in_training_only: set[Any] = set()

    def run(self) -> None:
        """All passes. The model is in evaluation, but for layers that are switched."""
        distances = self._compare()
        banked = any(seen.banked for seen in self.watch.seen.values())
        if banked:
            self.notes.append(
                "calls with a bank of statistics (in a recurrent network, each step) were not "
                "looked at, except in what they do to the output; recalibrate reaches them"
            )
        self.drifts = {layer: self._drift(layer) for layer in self.layers}
        populations = {layer: self.seen(layer).population() for layer in self.switched}
        with gap.exact_statistics(populations):
            recalibrated = self.outputs.moved(set(), gap.KEPT)
        # One batch's own statistics are those of training, and say nothing of others. Those of
        # banks are as they were.
        told = len(self.batches) > 1 and not banked
        self.gap: Gap = gap.gap_of(distances, recalibrated if told else None)
        self._measure_alone()
        self._share_out(distances)
        self._leave_out_biases()
        self._try("double counting by activation checkpointing was not", self._rehearse)
        if self.trace_of_training.dropouts:
            self._try("what dropout does to the statistics was not", self._drop_out)

    def seen(self, layer: Any) -> Seen:
        """What came into a layer."""
        return self.watch.seen[layer]

    def reached(self, layer: Any) -> bool:
        """Whether a batch ever came."""
        return any(self.seen(layer).calls)

    def _drift(self, layer: Any) -> statistics.Drift | None:
        seen = self.seen(layer)
        return statistics.drift_of(layer, seen.batches(), inputs.effective_values(seen))

    def _compare(self) -> list[gap.Distance]:
        """Each batch in training and in evaluation; batches of one value are dropped."""
        distances: list[gap.Distance] = []
        kept: list[Any] = []
        name, empty = "", 0
        for index, batch in enumerate(self.batches):
            self.watch.next_batch()
            try:
                with ExitStack() as stack:
                    stack.enter_context(self.watch.hooks())
                    if not kept:
                        stack.enter_context(self.trace.hooks())
                    trained = self.outputs.of(batch, index, self.switched)
            except OneValueError as error:
                name = self._name(error.layer)
                self.watch.drop_batch()
                continue
            if not trained:
                self.watch.drop_batch()
                empty += 1
                continue
            self.outputs.keep(batch, index, trained)
            distances.append(gap.distance(trained, self.outputs.of(batch, index, set())))
            kept.append(batch)
        number = len(self.batches)
        alone = number - len(kept) - empty
        if not kept:
            if not alone:
                raise InputError(
                    f"expected batches with something in them, got {number} of which the model "
                    "makes empty outputs"
                )
            raise InputError(
                f"expected batches as the model is trained with, got {alone} with one value per "
                f"channel for layer {name!r}, of which training has no statistics: pass larger ones"
            )
        if empty:
            self.notes.append(f"{empty} of {number} batches were left out: their output is empty")
        if alone:
            self.notes.append(
                f"{alone} of {number} batches were left out: layer {name!r} gets one value per "
                "channel, of which training has no statistics"
            )
        self.batches = kept
        return distances

    def _name(self, layer: Any) -> str:
        return next(name for name, other in self.named if other is layer)

    def _measure_alone(self) -> None:
        """Each layer by its running statistics, all others by the batch's."""
        drifting = [
            layer for layer in self.layers if layer in self.switched and self.reached(layer)
        ]
        # Processes that share statistics must switch the same layers, whatever each has seen.
        together = any(processes_of(layer) > 1 for layer in drifting)
        if not together:
            drifting.sort(key=lambda layer: -(d.score if (d := self.drifts[layer]) else 0))
        if len(drifting) > gap.MOST_LAYERS:
            which = "the first" if together else "those whose statistics are farthest off"
            self.notes.append(
                f"what a layer alone does to the output was measured for {gap.MOST_LAYERS} of "
                f"{len(drifting)} layers, {which}"
            )
        for layer in drifting[: gap.MOST_LAYERS]:
            self.alone[layer] = self._moved(self.switched - {layer})
            if self.alone[layer] > statistics.MUCH and not together:
                with gap.exact_statistics({layer: self.seen(layer).population()}):
                    self.exact[layer] = self._moved(self.switched - {layer})

    def _share_out(self, distances: list[gap.Distance]) -> None:
        """Layer after layer, as they run, from its running statistics to the batch's."""
        running = [layer for layer in self.watch.order if layer in self.switched]
        most = gap.BATCHES if len(running) <= gap.MOST_LAYERS else 1
        whole = left = gap.ratio(distances[:most])
        # Processes that share statistics must run as often, whatever each one's gap is.
        if not whole > gap.SPREAD and all(processes_of(layer) == 1 for layer in running):
            return
        for place, layer in enumerate(running, 1):
            before, left = left, self._moved(set(running[:place]), most)
            if whole > gap.SPREAD:
                self.share[layer] = (before - left) / whole

    def _moved(self, by_batch: set[Any], most: int = gap.BATCHES) -> float:
        return gap.ratio(self.outputs.moved(by_batch, most))

    def _leave_out_biases(self) -> None:
        """How far the output in training moves without the biases that feed layers."""
        biases = {
            layer: origin.bias
            for layer, origin in self.trace.before.items()
            if layer in self.switched and origin.bias is not None
        }
        if not biases:
            return
        together = self._without(list(biases.values()))
        alone = together >= configuration.SAME  # which of them is it?
        for layer, bias in biases.items():
            self.without_bias[layer] = self._without([bias]) if alone else together

    def _without(self, biases: list[Tensor]) -> float:
        with WithoutBias(biases):
            return gap.ratio(self.outputs.moved(self.switched, 1))

    def _try(self, what: str, how: Any) -> None:
        """A pass in training as a whole, which not every model can do as it is called here."""
        told = [
            (layer, layer._told_nonfinite) for layer in self.layers if isinstance(layer, BatchNorm)
        ]
        try:
            with in_training(self.model, self.still), warnings.catch_warnings():
                # What the model warns of in training, it will warn of in training.
                warnings.simplefilter("ignore")
                how()
        except Exception as error:
            reason = "".join(str(error).splitlines()[:1])[:160]
            self.notes.append(
                f"{what} looked for: a training step failed with {type(error).__name__}: {reason}"
            )
        finally:
            for layer, before in told:
                layer._told_nonfinite = before

    def _drop_out(self) -> None:
        """What dropout does to the variance that comes in."""
        watch = Watch(self.layers, deep=False, by_step=self.by_step)
        with watch.hooks(), normalizing_by(self.layers, self.switched):
            for batch in self.batches:
                watch.next_batch()
                self.step(self.model, batch)
        for layer in self.layers:
            one, other = watch.seen[layer].population(), self.seen(layer).population()
            if one is None or other is None:
                continue
            own, without = one.variance(), other.variance()
            varies = (own > 0) & (without > 0)
            if bool(varies.any()):
                self.dropout_shift[layer] = float((own / without)[varies].log().mean())

    def _rehearse(self) -> None:
        """One training step."""
        calls, self.counted = rehearse(
            self.model,
            self.layers,
            self.switched,
            self.trace_of_training,
            lambda: self.step(self.model, self.batches[0]),
        )
        for name, layer in self.named:
            if calls[layer] and not self.reached(layer) and not self.seen(layer).banked:
                self.in_training_only.add(layer)
                self.notes.append(
                    f"layer {name!r} is reached in training only, and was not looked at"
                )

    def findings(self) -> list[Finding]:
        """Of all layers, in their order."""
        found: list[Finding] = []
        for name, layer in self.named:
            for keeper_name, keeper in named_keepers(name, layer):
                found += statistics.check_buffers(keeper_name, keeper, still=layer in self.still)
            if self.reached(layer):
                broken = any(f.layer == name and f.code in ("BN103", "BN104") for f in found)
                found += [] if broken else self._check_drift(name, layer)
                found += self._check_use(name, layer)
            elif not self.seen(layer).banked and layer not in self.in_training_only:
                found.append(configuration.unreached(name))
        return found

    def _check_drift(self, name: str, layer: Any) -> list[Finding]:
        drift, alone, exact = self.drifts[layer], self.alone.get(layer), self.exact.get(layer)
        still = layer in self.still
        return statistics.check_drift(name, layer, drift, alone, exact, still=still)

    def _check_use(self, name: str, layer: Any) -> list[Finding]:
        found: list[Finding] = []
        if layer in self.switched:
            found += configuration.check_momentum(name, layer)
            origin, moved = self.trace.before.get(layer), self.without_bias.get(layer)
            found += configuration.check_bias(name, layer, origin, moved)
            origin, shift = self.trace_of_training.before.get(layer), self.dropout_shift.get(layer)
            found += configuration.check_dropout(name, origin, shift)
            found += self._check_calls(name, layer)
        if layer in self.counted:
            found += configuration.check_double_counting(name, *self.counted[layer])
        by_batch, activated = layer not in self.still, layer in self.trace.activated
        return found + inputs.check_inputs(
            name, layer, self.seen(layer), activated, by_batch=by_batch
        )

    def _check_calls(self, name: str, layer: Any) -> list[Finding]:
        seen = self.seen(layer)
        samples = float(seen.samples[0].count) if seen.samples else 1.0
        return configuration.check_calls(name, layer, seen.calls, samples)

    def reports(self) -> tuple[LayerReport, ...]:
        """One for each layer."""
        return tuple(self._report(name, layer) for name, layer in self.named)

    def _report(self, name: str, layer: Any) -> LayerReport:
        seen, drift = self.seen(layer), self.drifts[layer]
        count = getattr(layer, "num_batches_tracked", None)
        return LayerReport(
            name=name,
            kind=type(layer).__name__,
            channels=_channels(layer),
            updates=None if count is None else int(count),
            momentum=layer.__dict__.get("momentum"),
            calls=sum(map(len, seen.calls)) / len(seen.calls),
            values=seen.values(),
            mean_drift=drift.mean if drift else None,
            var_drift=drift.var if drift else None,
            gap=self.alone.get(layer),
            share=self.share.get(layer),
        )


def _channels(layer: Any) -> int:
    return int(getattr(layer, "num_features", None) or len(layer.running_mean))
