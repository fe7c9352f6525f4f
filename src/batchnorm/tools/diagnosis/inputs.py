"""BN3xx: what comes into layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.moments import Moments
from batchnorm.tools.diagnosis.modes import processes_of
from batchnorm.tools.diagnosis.watch import Seen, finite
from batchnorm.tools.findings import Finding

#: Values that are worth so many independent ones: below, the mean of a batch is off by more than
#: 1/√8, a third of σ.
FEW_VALUES = 8

#: How many times the variance of random batches' means the batches' means must have (or more, if
#: chance gives more to so few batches), and what share of the samples' variance must lie between
#: batches. Digits in the order of their classes have 7 and 0.09 after a convolution, 80 and 0.55
#: after a dense layer; in random order 0.5 to 1.3 and less than 0.005.
BETWEEN_TIMES, BETWEEN_SHARE = 4.0, 0.05

#: Of a normal distribution: 0.1 % lies beyond.
RARE = 3.09

#: Values that a channel must have had before it is said never to pass: one in a hundred would have.
MANY_VALUES = 500

#: Of all positions, before padding is worth a word; and what it must do to the mean (in σ) or to
#: the variance (in ln): documents without a word of the vocabulary, one in eight, are no padding,
#: and do 0.02 and 0.14. Two fifths of padding in sequences of digits do 0.3 and more.
PADDED_SHARE, PADDED_MEAN, PADDED_VAR = 0.05, 0.1, 0.2

#: Of a layer's channels.
DEAD_SHARE = 0.1

#: Of the largest variance among a layer's channels: less is rounding, in float32 (2⁻²⁴)².
CONSTANT = 2.0**-48


def check_inputs(
    name: str, layer: Any, seen: Seen, activated: bool, *, by_batch: bool = True
) -> list[Finding]:
    """All of them; of a layer that does not normalise by the batch, what matters there, too."""
    batches = seen.batches()
    found = [] if all(map(finite, seen.every_call())) else [_not_finite(name)]
    if by_batch:
        found += check_padding(name, seen)
    if batches and by_batch:
        found += check_effective(name, layer, seen)
        found += check_between(name, seen)
    if batches:
        found += check_dead(name, layer, seen, Moments.merge_all(batches), activated)
    return found


def _not_finite(name: str) -> Finding:
    return Finding(
        "BN305",
        "error",
        name,
        "NaN or infinity comes in",
        {},
        "look for what makes it before this layer; of several layers named, before the first",
    )


def effective_values(seen: Seen) -> float:
    """How many independent values the mean of a call is worth, per channel: the median over them.

        N · variance / variance of the samples' own means

    Neighbours in an image are alike: 64 pixels of one sample may be worth 3. Samples of one value
    each are taken for independent. Where a batch is one sample, samples of different batches are
    compared; where there is but one, nothing is known, and all its values are worth one.
    """
    samples = seen.finite_samples()
    number = sum(float(part.count) for part in samples) / max(len(samples), 1)
    values, population = seen.values() or 0.0, seen.population()
    if values <= number or population is None:
        return values
    if any(part.count > 1 for part in samples):
        within = torch.stack([part.m2 for part in samples]).sum(0)
        free = sum(float(part.count) - 1 for part in samples if part.count > 1)
    else:
        within = Moments.merge_all(samples).m2
        free = len(samples) - 1.0
    own, between = population.variance(), within / max(free, 1.0)
    varies = (own > 0) & (between > 0)
    if free < 1 or not bool(varies.any()):
        return number
    return min(values, number * float((own[varies] / between[varies]).median()))


def check_effective(name: str, layer: Any, seen: Seen) -> list[Finding]:
    """BN301."""
    values, effective = seen.values() or 0.0, effective_values(seen)
    if isinstance(layer, BatchNorm) and layer.virtual_batch_size is not None and seen.samples:
        number = sum(float(part.count) for part in seen.samples) / len(seen.samples)
        effective *= min(1.0, layer.virtual_batch_size / max(number, 1.0))
    processes = processes_of(layer)
    effective *= processes
    if effective >= FEW_VALUES:
        return []
    noise = 1 / math.sqrt(max(effective, 1e-9))
    return [
        Finding(
            "BN301",
            "warning",
            name,
            f"a call has {values:.3g} values per channel, worth {effective:.2g} independent ones: "
            f"its mean is off by about {noise:.2g} σ, anew in each batch",
            {"values": values, "effective": effective, "noise": noise, "processes": processes},
            "larger batches; Renorm, statistics of several processes or micro-batches "
            "(process_group, forward_together); or freeze(model)",
        )
    ]


def check_between(name: str, seen: Seen) -> list[Finding]:
    """BN302: batches' means differ more than those of random batches would."""
    samples = [part for part in seen.finite_samples() if part.count > 1]
    # A short last batch has a mean of its own by chance alone.
    most = max((float(part.count) for part in samples), default=0.0)
    samples = [part for part in samples if 2 * part.count > most]
    if len(samples) < 3:
        return []
    chance = sum(1 / float(part.count) for part in samples) / len(samples)
    within = torch.stack([part.m2 for part in samples]).sum(0)
    within = within / sum(float(part.count) - 1 for part in samples)
    means = torch.stack([part.mean for part in samples])
    between = means.var(0)
    varies = within > 0
    if not bool(varies.any()):
        return []
    times = (between / (within * chance))[varies].median()
    # What lies between batches beyond chance, as a part of the variance of samples.
    extra = (between - within * chance).clamp(min=0)[varies]
    share = float((extra / (extra + within[varies])).median())
    least = max(BETWEEN_TIMES, _by_chance(len(samples) - 1))
    if float(times) < least or share < BETWEEN_SHARE:
        return []
    return [
        Finding(
            "BN302",
            "warning",
            name,
            f"batches are not alike: their means vary {float(times):.3g} times as much as those of "
            f"random batches would, and {share:.0%} of the samples' variance lies between them",
            {
                "times": float(times),
                "times_by_chance": _by_chance(len(samples) - 1),
                "between_share": share,
                "batches": len(samples),
            },
            "shuffle; if batches must differ (a domain each), a bank of statistics for each, or "
            "Renorm",
        )
    ]


def _by_chance(freedom: int) -> float:
    """What χ²/freedom rarely exceeds (Wilson & Hilferty 1931)."""
    spread = 2 / (9 * freedom)
    return (1 - spread + RARE * math.sqrt(spread)) ** 3


def check_padding(name: str, seen: Seen) -> list[Finding]:
    """BN303."""
    if not seen.padding:
        return []
    share = sum(found.share for found in seen.padding) / len(seen.padding)
    if share < PADDED_SHARE:
        return []
    shift = sum(found.mean_shift for found in seen.padding) / len(seen.padding)
    ratio = sum(found.var_ratio for found in seen.padding) / len(seen.padding)
    if shift < PADDED_MEAN and abs(math.log(ratio)) < PADDED_VAR:
        return []
    return [
        Finding(
            "BN303",
            "warning",
            name,
            f"{share:.0%} of the positions look like padding, and are in the statistics: it moves "
            f"the mean by {shift:.2g} σ and multiplies the variance by {ratio:.2g}",
            {"share": share, "mean_shift": shift, "var_ratio": ratio},
            "convert(model), and call the layer with mask=, True where it counts; or a "
            "PackedSequence",
        )
    ]


def check_dead(
    name: str, layer: Any, seen: Seen, population: Moments, activated: bool
) -> list[Finding]:
    """BN304: constant input, γ = 0, or nothing that ever passes the ReLU."""
    var = population.variance()
    constant = var <= CONSTANT * torch.maximum(var.max(), population.mean.square())
    off = torch.zeros_like(constant)
    own = isinstance(layer, BatchNorm) and layer.activation == "relu"
    many = bool(population.count >= MANY_VALUES)
    if seen.highest is not None and many and (activated or own):
        off = seen.highest <= 0
    away = _scaled_away(layer, constant)
    if own and away is None:
        off &= False
    zero = torch.zeros_like(constant) if away is None else away
    dead = constant | zero | off
    number = int(dead.sum())
    if number == 0 or number < DEAD_SHARE * len(dead):
        return []
    counts = {
        "constant": int(constant.sum()),
        "zero_weight": int((zero & ~constant).sum()),
        "off": int((off & ~constant & ~zero).sum()),
    }
    words = ("get a constant", "have γ = 0", "never pass the ReLU")
    ways = [f"{n} {what}" for n, what in zip(counts.values(), words, strict=True) if n]
    return [
        Finding(
            "BN304",
            "warning",
            name,
            f"{number} of {len(dead)} channels are dead: " + ", ".join(ways),
            {"channels": dead.nonzero().flatten().tolist()[:20], "number": number, **counts},
            "a smaller learning rate, or another start; what is dead can be pruned",
        )
    ]


def _scaled_away(layer: Any, like: Tensor) -> Tensor | None:
    """Channels whose γ is 0; None if all are, as residual branches start (Goyal et al. 2017)."""
    weight = getattr(layer, "weight", None)
    if weight is None:
        return torch.zeros_like(like)
    return weight == 0 if bool(weight.any()) else None
