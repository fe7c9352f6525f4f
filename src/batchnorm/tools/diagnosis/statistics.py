"""BN1xx: running statistics, and what they should be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm.moments import Moments, accumulation_dtype
from batchnorm.tools.findings import Finding

#: Share of the initial values (mean 0, variance 1) that may be left in running statistics. At 0.05
#: the running mean is short of its value by a twentieth.
INITIAL_SHARE = 0.05

#: Where the data's mean is no more than this from 0 (in σ), or the variance from 1 (in its own
#: size), the running statistics do not tell how much of the initial values they hold.
TELLING = 0.1

#: Distance of running statistics from the data's that matters: of the mean in σ, of the variance in
#: ln. Half of σ moves a third of a Gaussian channel's values over zero; training at a usual
#: learning rate leaves up to 0.2 and 0.3 (the healthy models of benchmarks/diagnosis.py).
MEAN_DRIFT, VAR_DRIFT = 0.5, 0.7

#: And that chance does not explain: so many times the expected square.
BY_CHANCE = 4.0

#: What a layer alone does to the output (see `LayerReport.gap`): no more than a warning; and so
#: much that it matters however little the statistics are off. Averages over many positions keep a
#: mean's small error and lose the spread: 0.2 σ of pixels may be 2 σ of what a pooled layer gives.
LITTLE, MUCH = 0.1, 0.5

#: As much as examples differ from each other: from there on it is an error, too, however little the
#: statistics are off.
WHOLE = 1.0

#: Share of that which exact statistics must take away before it is put down to the running ones.
CURED = 0.5

#: Of layers that do not say what they add to the variance: what all of them add by default.
EPS = 1e-5


@dataclass(frozen=True)
class Drift:
    """How far running statistics are from the data's.

    σ² is the data's variance + eps, what normalization divides by: so channels with next to no
    variance, of which the logarithm may be anything, count as little as they do in the output.

    Attributes:
        mean: root mean square over channels of (running mean − mean) / σ.
        var: root mean square over channels of ln((running variance + eps) / σ²).
        mean_by_chance: what sampling alone would give, of both sides.
        var_by_chance: likewise.
        initial_share: how much of the initial 0 and 1 seems to be in them: the median of
            (running − data) / (initial − data); None where the initial is as good as the data.
        worst: channels with the greatest distance, at most three.
    """

    mean: float
    var: float
    mean_by_chance: float
    var_by_chance: float
    initial_share: float | None
    worst: tuple[int, ...]

    @property
    def score(self) -> float:
        """One number to order layers by."""
        return max(self.mean / MEAN_DRIFT, self.var / VAR_DRIFT)

    def exceeds(self, mean: float, var: float) -> bool:
        """Whether it is larger than these, and than chance makes it."""
        far = self.mean > mean and self.mean**2 > BY_CHANCE * self.mean_by_chance**2
        wide = self.var > var and self.var**2 > BY_CHANCE * self.var_by_chance**2
        return far or wide


def drift_of(layer: Any, batches: list[Moments], effective: float) -> Drift | None:
    """None where there is nothing to compare: no running statistics, or no finite ones.

    Args:
        layer: with running statistics.
        batches: moments of each batch.
        effective: how many independent values a batch is worth: what chance is judged by where
            there is but one batch.
    """
    if layer.running_mean is None or not batches:
        return None
    wide, eps = accumulation_dtype(layer.running_mean.device), eps_of(layer)
    mean, var = layer.running_mean.to(wide), layer.running_var.to(wide)
    population = Moments.merge_all(batches)
    own = population.variance(correction=1)
    fine = own.isfinite() & (var + eps > 0) & mean.isfinite() & var.isfinite()
    if not bool(fine.any()):
        return None
    far = (mean - population.mean) / (own + eps).sqrt()
    wider = ((var + eps) / (own + eps)).log()
    distance = torch.where(fine, far.abs() / MEAN_DRIFT + wider.abs() / VAR_DRIFT, 0.0)
    # Both sides are averages over batches, which differ from each other: this one over those seen
    # here, that one over those that the running statistics hold.
    seen = chance_of(batches, effective, eps)
    more = 1 + len(batches) / _batches_held(layer)
    return Drift(
        _rms(far[fine]),
        _rms(wider[fine]),
        math.sqrt(seen[0] * more),
        math.sqrt(seen[1] * more),
        _initial_share_seen(mean[fine], var[fine], population.mean[fine], own[fine]),
        tuple(int(c) for c in distance.topk(min(3, len(distance))).indices),
    )


def chance_of(batches: list[Moments], effective: float, eps: float) -> tuple[float, float]:
    """Expected squares of what chance does to the mean (in σ) and the variance (in ln) of these.

    Batches are independent draws, so the mean over n of them has 1/n of their own spread. One batch
    is taken for so many independent values of a normal distribution: the logarithm of χ²ₖ/k has the
    variance ψ′(k/2) and the mean ψ(k/2) − ln(k/2).
    """
    n = len(batches)
    if n < 2:
        half = torch.tensor(max(effective - 1, 1.0) / 2, dtype=torch.float64)
        bias = torch.digamma(half) - half.log()
        return 1 / max(effective, 1.0), float(torch.polygamma(1, half) + bias.square())
    sigma2 = Moments.merge_all(batches).variance() + eps
    means = torch.stack([moments.mean for moments in batches])
    logs = torch.stack([moments.variance() + eps for moments in batches]).log()
    return float((means.var(0) / sigma2).mean()) / n, float(logs.var(0).mean()) / n


def eps_of(layer: Any) -> float:
    """What the layer adds to the variance."""
    return float(getattr(layer, "eps", EPS))


def _batches_held(layer: Any) -> float:
    """How many batches the running statistics are worth: by momentum m, (2 − m) / m of them."""
    count = getattr(layer, "num_batches_tracked", None)
    updates = max(int(count), 1) if count is not None else 1
    momentum = layer.__dict__.get("momentum", 0.1)
    return float(updates if not momentum else min((2 - momentum) / momentum, updates))


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _initial_share_seen(mean: Tensor, var: Tensor, own_mean: Tensor, own: Tensor) -> float | None:
    apart = own_mean.abs() > TELLING * own.sqrt(), (1 - own).abs() > TELLING * own
    shares = torch.cat(
        [
            ((own_mean - mean) / own_mean)[apart[0]],
            ((var - own) / (1 - own))[apart[1]],
        ]
    )
    return float(shares.median()) if len(shares) else None


def initial_share(layer: Any) -> float | None:
    """How much of the initial values is left in the running statistics, if the counter is right."""
    count, momentum = getattr(layer, "num_batches_tracked", None), layer.__dict__.get("momentum", 0)
    if count is None or momentum is None:
        return None
    return float((1 - momentum) ** int(count))


def never_updated(layer: Any) -> bool:
    """Whether the running statistics are as a new layer's, whatever the counter says."""
    # A state dict may have brought the counter and not the statistics.
    return not bool(layer.running_mean.any()) and bool((layer.running_var == 1).all())


def check_buffers(name: str, layer: Any, *, still: bool = False) -> list[Finding]:
    """What the buffers alone tell: the worst of it. `still`: nothing is ever added to them."""
    mean, var = layer.running_mean, layer.running_var
    if mean is None:
        return []
    found = []
    if mean.dtype in (torch.float16, torch.bfloat16) and not still:
        found.append(
            Finding(
                "BN106",
                "warning",
                name,
                f"running statistics are {str(mean.dtype).removeprefix('torch.')}: small steps "
                "toward the data are rounded away",
                {"dtype": str(mean.dtype).removeprefix("torch.")},
                "keep them in float32: convert(model), or layer.float() for the layer alone, and "
                "recalibrate",
            )
        )
    broken = ~(mean.isfinite() & var.isfinite())
    if bool(broken.any()):
        return [*found, _not_finite(name, broken)]
    below = var <= 0
    if bool(below.any()):
        return [*found, _no_variance(name, below, var)]
    return found


def _not_finite(name: str, broken: Tensor) -> Finding:
    channels = broken.nonzero().flatten().tolist()
    return Finding(
        "BN103",
        "error",
        name,
        f"running statistics of {len(channels)} of {len(broken)} channels are NaN or infinite: "
        "evaluation gives NaN there",
        {"channels": channels[:20], "number": len(channels)},
        "recalibrate(model, batches); BatchNorm keeps NaN out of them in training",
    )


def _no_variance(name: str, below: Tensor, var: Tensor) -> Finding:
    channels = below.nonzero().flatten().tolist()
    negative = int((var < 0).sum())
    return Finding(
        "BN104",
        "error" if negative else "warning",
        name,
        f"running variance of {len(channels)} of {len(below)} channels is "
        + ("negative: evaluation gives NaN" if negative else "0: evaluation multiplies by 1/√eps"),
        {"channels": channels[:20], "number": len(channels), "negative": negative},
        "see whether what comes in is constant; recalibrate(model, batches)",
    )


def check_drift(
    name: str,
    layer: Any,
    drift: Drift | None,
    gap: float | None,
    exact: float | None,
    *,
    still: bool = False,
) -> list[Finding]:
    """BN105, BN102 or BN101: the first that applies.

    Args:
        name: the layer's.
        layer: the layer.
        drift: of its running statistics.
        gap: what it alone does to the output; None: not measured.
        exact: what it would do with the statistics of these batches; None: not measured.
        still: it normalises by them in training, too: whatever they are, the model knows them.
    """
    if drift is None:
        return []
    evidence: dict[str, Any] = {
        "mean_drift": drift.mean,
        "mean_drift_by_chance": drift.mean_by_chance,
        "var_drift": drift.var,
        "var_drift_by_chance": drift.var_by_chance,
        "worst_channels": list(drift.worst),
        "gap": gap,
    }
    if exact is not None:
        evidence["gap_recalibrated"] = exact
    count = getattr(layer, "num_batches_tracked", None)
    if count is not None:
        evidence["updates"] = int(count)
    repair = "recalibrate(model, batches) computes them exactly"
    how_far = f"mean off by {drift.mean:.2g} σ, variance by a factor of {math.exp(drift.var):.2g}"
    counted = bool(count) and layer.__dict__.get("momentum") != 0
    # With a counter that says otherwise, data of mean 0 and variance 1 look the same.
    if never_updated(layer) and not (counted and not drift.exceeds(MEAN_DRIFT, VAR_DRIFT)):
        message = f"running statistics are as they were made ({how_far})"
        return [Finding("BN105", "warning" if still else "error", name, message, evidence, repair)]
    left, share = initial_share(layer), drift.initial_share
    # A counter may know nothing of where the statistics came from: they must look so, too.
    if left is not None and left > INITIAL_SHARE and share is not None and share > left / 2:
        evidence |= {"initial_share": left, "initial_share_seen": share}
        message = (
            f"after {evidence['updates']} updates with momentum {layer.momentum:g}, {left:.0%} of "
            f"the running statistics is still the initial 0 and 1 ({how_far})"
        )
        more = f"train longer, raise momentum, or use momentum=None; {repair}"
        return [Finding("BN102", "info" if still else "warning", name, message, evidence, more)]
    cured = gap is not None and exact is not None and gap > MUCH and exact < (1 - CURED) * gap
    if not drift.exceeds(MEAN_DRIFT, VAR_DRIFT) and not (cured and drift.exceeds(0, 0)):
        return []
    message = f"running statistics are not those of these batches: {how_far}" + (
        f"; with exact ones this layer alone would move the output by {exact:.2g}, not {gap:.2g}"
        if cured
        else ""
    )
    if still:
        message += ". It normalises by them in training, too, so training and evaluation agree"
        more = f"nothing, if they are meant; else unfreeze it, and {repair}"
        return [Finding("BN101", "info", name, message, evidence, more)]
    more = (
        f"{repair}; if the batches are of another kind than the training data, a bank of "
        "statistics for them, or the training's own preprocessing"
    )
    far = drift.exceeds(MEAN_DRIFT, VAR_DRIFT)
    severity = "error" if gap is None or not gap <= (LITTLE if far else WHOLE) else "warning"
    return [Finding("BN101", severity, name, message, evidence, more)]
