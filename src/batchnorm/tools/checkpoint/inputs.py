"""What the numbers of one layer say about what came into it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from batchnorm.tools.checkpoint.channels import EPS, number, said, which
from batchnorm.tools.checkpoint.kept import Kept
from batchnorm.tools.findings import Finding

#: Rounding of the input, in σ, that is worth a word: float32's 2⁻²⁴·|μ|/σ where |μ| = 84 000 σ.
ROUNDING = 0.005

#: A channel is dead if its spread, |γ|·σ/√(σ² + ε), is below this part of the layer's largest, or
#: below `DEAD_AT_ALL`. Weight decay takes γ to 10⁻⁸ and less where nothing holds it; what is alive
#: is within a factor of some hundreds.
DEAD, DEAD_AT_ALL = 1e-4, 1e-6

#: The part of a layer's channels that may die before it is worth a word. Some die in every network.
DEAD_PART = 0.25


def inputs(layer: Kept, name: str) -> Iterator[Finding]:
    """Dead channels, those whose variance ε outweighs, and those far from zero."""
    if layer.mean is None or layer.var is None or layer.mean.shape != layer.var.shape:
        return
    mean, var = layer.mean.double().flatten(), layer.var.double().flatten()
    # Variances that are none are told of elsewhere.
    known = mean.isfinite() & var.isfinite() & (var > 0)
    gamma = torch.ones_like(var) if layer.weight is None else layer.weight.double().abs()
    known &= gamma.isfinite()
    if not bool(known.any()):
        return
    spread = gamma * (var / (var + EPS)).sqrt()
    bound = max(DEAD * float(spread[known].max()), DEAD_AT_ALL)
    dead = known & (spread < bound)
    yield from _dead(name, dead, known & (gamma == 0), gamma, var)
    alive = known & ~dead
    below = alive & (var < EPS)
    if 2 * int(below.sum()) > int(alive.sum()):
        yield _below_eps(name, below, var)
    ratio = mean.abs() / (var + EPS).sqrt()
    unit = torch.finfo(torch.float32).eps / 2
    far = alive & (unit * ratio > ROUNDING)
    if bool(far.any()):
        yield _far(name, far, ratio)


def _dead(name: str, dead: Tensor, zero: Tensor, gamma: Tensor, var: Tensor) -> Iterator[Finding]:
    count, channels = int(dead.sum()), dead.numel()
    if not bool(zero.any()) and count < max(1, DEAD_PART * channels):
        return
    still = dead & (gamma > DEAD_AT_ALL)
    reasons = [
        f"{reason} in {int(which.sum())}"
        for reason, which in (
            ("γ is zero", zero),
            ("γ is next to zero", dead & ~zero & ~still),
            ("hardly any variance or γ", still),
        )
        if bool(which.any())
    ]
    yield Finding(
        "BN304",
        "warning" if count == channels else "info",
        name,
        f"{said(dead)} give the same output for every input ({', '.join(reasons)})",
        {
            **which(dead),
            "gamma_zero": int(zero.sum()),
            "lowest_gamma": number(gamma[dead].min()),
            "lowest_variance": number(var[dead].min()),
            "assumed_eps": EPS,
        },
        "Some die in every network. Many: a smaller learning rate, no weight decay on γ and β, no "
        "ReLU right before the layer; dead ones can be pruned without a loss.",
    )


def _below_eps(name: str, below: Tensor, var: Tensor) -> Finding:
    middle = float(var[below].median())
    return Finding(
        "BN306",
        "info",
        name,
        f"running variance is below ε in {said(below)} (median {middle:.2g}, ε {EPS:g} assumed): "
        f"the output's spread is {(middle / (middle + EPS)) ** 0.5:.0%} of γ there, not γ",
        {**which(below), "median_variance": middle, "assumed_eps": EPS},
        "Scale the input, or take a smaller eps, for training too: with another eps a trained "
        "model is another model.",
    )


def _far(name: str, far: Tensor, ratio: Tensor) -> Finding:
    most = float(ratio[far].max())
    rounding = most * torch.finfo(torch.float32).eps / 2
    return Finding(
        "BN307",
        "warning",
        name,
        f"|mean| is up to {most:.2g} σ in {said(far)}: float32 rounds such inputs by "
        f"{rounding:.2g} σ before anything is normalised",
        {**which(far), "most_mean_over_sigma": most, "rounding_in_sigma": rounding},
        "Subtract a constant from the data, in float64, before the model; never use half precision "
        "in front of this layer.",
    )
