"""BN101 and BN308 of a model as a whole: a gap that no layer alone explains."""

from __future__ import annotations

import math

from batchnorm.tools.findings import Finding, Gap, LayerReport

#: What exact statistics would take off the gap, √(gap² − recalibrated²), before that is worth a
#: finding, and from where on it is an error: above 0.35 most networks lose accuracy that anyone
#: would notice, below 0.25 next to none do (measured: benchmarks/results/gap.md).
EXCESS, MUCH = 0.35, 0.7

#: So many standard errors it must be, too.
ERRORS = 3.0

#: What may be left of a gap with exact statistics: batches of 16 leave half of that (the same).
NOISE = 0.5

#: What else a gap would be put down to.
_OF_STATISTICS = {"BN101", "BN102", "BN103", "BN104", "BN105"}
_OF_BATCHES = {"BN206", "BN301", "BN302", "BN303"}

#: Layers that a message names.
NAMED = 3


def check_gap(gap: Gap, found: list[Finding], layers: tuple[LayerReport, ...]) -> list[Finding]:
    """What the gap shows, where no finding of a layer has said so.

    Args:
        gap: of the model.
        found: findings of layers.
        layers: whose shares of the gap are named.
    """
    left = gap.recalibrated
    if left is None or not math.isfinite(gap.value) or not math.isfinite(left):
        return []
    codes = {finding.code for finding in found if finding.severity != "info"}
    excess = math.sqrt(max(0.0, gap.value**2 - left**2))
    evidence = {
        "gap": gap.value, "gap_error": gap.error, "gap_recalibrated": left, "excess": excess,
    }  # fmt: skip
    findings = []
    sure = gap.value - left > ERRORS * gap.error
    if excess > EXCESS and sure and not codes & _OF_STATISTICS:
        findings.append(
            Finding(
                "BN101",
                "error" if excess > MUCH else "warning",
                "",
                f"outputs of training and evaluation are {gap.value:.2g} apart; with exact running "
                f"statistics they would be {left:.2g} apart. No layer's are far off, but together "
                f"they are{_most(layers)}",
                evidence,
                "recalibrate(model, batches) computes them exactly; they stay near the data's if "
                "the learning rate ends low",
            )
        )
    if left > NOISE and not codes & _OF_BATCHES:
        findings.append(
            Finding(
                "BN308",
                "warning",
                "",
                f"with exact running statistics, outputs of training and evaluation would still be "
                f"{left:.2g} apart: what training computes of an example depends on the others in "
                "its batch about as much as on itself",
                evidence,
                "larger or better mixed batches; Renorm, statistics of several processes or "
                "micro-batches (process_group, forward_together); or freeze(model) before the end",
            )
        )
    return findings


def _most(layers: tuple[LayerReport, ...]) -> str:
    shares = sorted(((layer.share or 0.0, layer.name) for layer in layers), reverse=True)[:NAMED]
    names = [f"{name} {share:.0%}" for share, name in shares if share > 0]
    return f" (the largest shares: {', '.join(names)})" if names else ""
