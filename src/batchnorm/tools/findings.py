"""What the tools find: codes that stay, numbers, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from batchnorm.errors import ArgumentError

SEVERITIES = ("error", "warning", "info")
#: What one of each is called where they are counted.
NOUNS = {"error": "error", "warning": "warning", "info": "remark"}

#: Every code and what it stands for. A code keeps its meaning for ever; docs/findings has a page of
#: each. BN1xx: statistics. BN2xx: how layers are set up and used. BN3xx: what comes into them.
CODES: dict[str, str] = {
    "BN101": "running statistics are not those of the data",
    "BN102": "too few updates of the running statistics",
    "BN103": "running statistics are not finite",
    "BN104": "running variance is zero or negative",
    "BN105": "running statistics were never updated",
    "BN106": "running statistics are in half precision",
    "BN107": "running statistics differ between processes",
    "BN108": "running statistics count more batches than came",
    "BN109": "running mean and variance are no pair",
    "BN201": "momentum keeps the running statistics from averaging",
    "BN202": "bias right before batch normalization",
    "BN203": "dropout right before batch normalization",
    "BN204": "weight decay on γ or β",
    "BN205": "some layers are frozen and others are not",
    "BN206": "one layer is called several times in a forward pass",
    "BN207": "modes of training are mixed",
    "BN208": "layer is never reached",
    "BN301": "too few values behind each batch's statistics",
    "BN302": "batches are not drawn at random",
    "BN303": "padding is in the statistics",
    "BN304": "channels have died",
    "BN305": "input is not finite",
    "BN306": "variance of the input is below ε",
    "BN307": "mean of the input is far above its standard deviation",
    "BN308": "outputs in training depend on the rest of the batch",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or looks so.

    Attributes:
        code: stays the same from release to release, such as "BN101".
        severity: "error": the output is wrong; "warning": it is likely to be, or training suffers;
            "info": good to know.
        layer: the module's name in `model.named_modules()`; "" for the model as a whole.
        message: what was found, with the numbers that matter.
        evidence: all numbers behind it, and how uncertain they are.
        remedy: what to do.
    """

    code: str
    severity: str
    layer: str
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    remedy: str = ""

    @property
    def title(self) -> str:
        """What the code stands for."""
        return CODES[self.code]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can keep it."""
        return asdict(self) | {"title": self.title}

    def __str__(self) -> str:
        where = self.layer or "the model"
        return f"{self.code} {self.severity}: {where}: {self.message}"


@dataclass(frozen=True)
class LayerReport:
    """What is known of one batch norm layer; None where it cannot be known.

    Attributes:
        name: in `model.named_modules()`.
        kind: its class.
        channels: their number.
        updates: batches that the running statistics have taken in.
        momentum: weight of the newest batch.
        calls: forward calls in a pass through the model.
        values: values per channel behind the statistics of a call (mean over calls).
        mean_drift: root mean square over channels of (running mean − mean of the data) / σ, where
            σ² is the variance of the data + eps.
        var_drift: root mean square over channels of ln((running variance + eps) / σ²).
        gap: how far the output moves if this layer alone normalises by its running statistics, and
            all others by the batch's; in the unit of `Gap`.
        share: its part of the gap: how much of it goes away if this layer, too, normalises by the
            batch, once all that run before it do, and so give it what they gave it in training. The
            shares of all layers add up to 1; one that undoes what others do has less than 0.
    """

    name: str
    kind: str
    channels: int
    updates: int | None = None
    momentum: float | None = None
    calls: float | None = None
    values: float | None = None
    mean_drift: float | None = None
    var_drift: float | None = None
    gap: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Gap:
    """How far the outputs of training and of evaluation are apart, over the same batches.

        gap = ‖y_train − y_eval‖ / ‖y_train − mean of y_train‖

    Both without dropout. 0: they agree; 1: they differ as much as examples differ from each other.

    Attributes:
        value: the gap; NaN where NaN or infinity is in the outputs.
        error: its standard error, from batch to batch; NaN for one batch.
        recalibrated: the gap that would be left with exact running statistics (see `recalibrate`):
            batches differ by chance. None for one batch, of which there are no others.
        batches: how many were looked at.
    """

    value: float
    error: float
    recalibrated: float | None
    batches: int


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` and `inspect_checkpoint` give.

    Attributes:
        findings: the most severe first.
        layers: every batch norm layer, in the order of the model.
        gap: between training and evaluation; None where there was no data.
        notes: what could not be looked at, and why.
    """

    findings: tuple[Finding, ...]
    layers: tuple[LayerReport, ...]
    gap: Gap | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """What was found and of how much, in a line; the rest is in the attributes."""
        parts = []
        for severity in SEVERITIES:
            codes = Counter(f.code for f in self.findings if f.severity == severity)
            if codes:
                shown = (f"{c} × {n}" if n > 1 else c for c, n in codes.items())
                parts.append(f"{counted(codes.total(), NOUNS[severity])}: {', '.join(shown)}")
        facts = [counted(len(self.layers), "layer")]
        if self.gap is not None:
            gap = f"gap {self.gap.value:.2g} ± {self.gap.error:.1g}"
            facts.append(f"{gap} over {counted(self.gap.batches, 'batch', 'batches')}")
        if self.notes:
            facts.append(counted(len(self.notes), "note"))
        return f"Diagnosis({'; '.join([*(parts or ['no findings']), ', '.join(facts)])})"

    def worst(self) -> str | None:
        """The highest severity among the findings; None if there are none."""
        return min((f.severity for f in self.findings), key=SEVERITIES.index, default=None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can keep it."""
        return {
            "findings": [finding.to_dict() for finding in self.findings],
            "layers": [asdict(layer) for layer in self.layers],
            "gap": None if self.gap is None else asdict(self.gap),
            "notes": list(self.notes),
        }


def counted(number: int, noun: str, nouns: str = "") -> str:
    """A number of things."""
    return f"{number} {noun if number == 1 else nouns or noun + 's'}"


def ordered(findings: list[Finding]) -> tuple[Finding, ...]:
    """The most severe first; else as they come."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


def check_codes(ignore: Collection[str]) -> frozenset[str]:
    """The codes to be left out.

    Raises:
        ArgumentError: one of them is no code; or it is one string, not a collection of them.
    """
    wrong = [ignore] if isinstance(ignore, str) else [code for code in ignore if code not in CODES]
    if wrong:
        raise ArgumentError(
            f"expected codes of findings, such as ('BN202',), got {wrong[0]!r}; they are "
            f"{', '.join(CODES)}"
        )
    return frozenset(ignore)
