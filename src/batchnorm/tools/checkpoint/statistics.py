"""What the running statistics of one layer say by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from batchnorm.tools.checkpoint.channels import EPS, MOMENTUM, number, said, which
from batchnorm.tools.checkpoint.inputs import DEAD_AT_ALL
from batchnorm.tools.checkpoint.kept import Kept
from batchnorm.tools.findings import Finding

#: The share of the initial values (mean 0, variance 1) that may be left: 0.9²⁹ is less.
SHARE_LEFT = 0.05

#: Statistics of fewer batches than this are worth a word, whatever the momentum was.
FEW = 5

#: Running means that stall in half precision, in σ, from which on it is likely to be seen.
STALL = 0.1

#: Distinct values that there must be before all of them being short is no chance, nor chosen by
#: hand: each is short with a probability of 2⁻¹⁶ (bfloat16) or 2⁻¹³ (float16).
DISTINCT = 16

HALF = (torch.bfloat16, torch.float16)

_ANEW = "`recalibrate(model, batches)` makes new ones from data, without training"


def statistics(layer: Kept, name: str, *, from_one: bool) -> Iterator[Finding]:
    """What they say.

    Args:
        layer: from the file.
        name: for the findings.
        from_one: whether it may have begun at variance 1 and had torch's momentum since: see
            `began_at_one`.
    """
    if layer.mean is None or layer.var is None or layer.mean.shape != layer.var.shape:
        yield _misfit(layer, name)
        return
    mean, var = layer.mean.double().flatten(), layer.var.double().flatten()
    sick = ~(mean.isfinite() & var.isfinite())
    if bool(sick.any()):
        yield _nonfinite(name, mean, var, sick)
    if bool((var <= 0).any()):
        yield _no_variance(layer, name, mean, var)
    if never_updated(layer):
        yield _never_updated(layer, name)
        return
    if layer.updates:
        yield from _few_updates(name, layer.updates, from_one=from_one)
    yield from _half(name, layer.mean.dtype, mean, var)


def never_updated(layer: Kept) -> bool:
    """Whether the statistics are those that a layer begins with."""
    mean, var = layer.mean, layer.var
    return mean is not None and var is not None and not mean.any() and bool((var == 1).all())


def began_at_one(layers: Sequence[Kept], updates: int) -> bool:
    """Whether layers can have begun at a variance of 1 and had torch's momentum since.

    Then no variance can be below what is left of the 1. If one is, the momentum was another (or
    None, or the statistics were made anew), and a small counter is no reproach.
    """
    left = (1 - MOMENTUM) ** updates
    # 1 %: half precision rounds the variances, too.
    return not any(
        bool(((layer.var >= 0) & (layer.var < 0.99 * left)).any())
        for layer in layers
        if layer.var is not None
    )


def _misfit(layer: Kept, name: str) -> Finding:
    shapes = {
        key: None if tensor is None else list(tensor.shape)
        for key, tensor in (("running_mean", layer.mean), ("running_var", layer.var))
    }
    said = ", ".join(f"{key}: {shape or 'missing'}" for key, shape in shapes.items())
    return Finding(
        "BN109",
        "error",
        name,
        f"running mean and variance are no pair ({said})",
        {"shapes": shapes},
        "Save the whole state dict again, or remove the key that is left over.",
    )


def _nonfinite(name: str, mean: Tensor, var: Tensor, sick: Tensor) -> Finding:
    counts = {
        key: {"nan": int(values.isnan().sum()), "infinite": int(values.isinf().sum())}
        for key, values in (("running_mean", mean), ("running_var", var))
    }
    where = " and ".join(key for key, count in counts.items() if any(count.values()))
    return Finding(
        "BN103",
        "error",
        name,
        f"{where} not finite in {said(sick)}: in evaluation these channels are NaN or constant",
        {**which(sick), **counts},
        f"A batch held NaN or infinity, or training diverged. {_ANEW}; batchnorm.BatchNorm keeps "
        "such batches out.",
    )


def _no_variance(layer: Kept, name: str, mean: Tensor, var: Tensor) -> Finding:
    negative, zero = var < 0, var == 0
    evidence = {"negative": which(negative), "zero": which(zero), "lowest": number(var.min())}
    if bool(negative.any()):
        return Finding(
            "BN104",
            "error",
            name,
            f"running variance is negative in {said(negative)}, down to {float(var.min()):.3g}: "
            "no data have such; averaging or arithmetic on weights may have made it",
            evidence,
            f"{_ANEW}.",
        )
    ones = torch.ones_like(var)
    gamma = ones if layer.weight is None else layer.weight.double().abs()
    severity, why = "warning", f"what moves there in evaluation comes out {EPS**-0.5:.0f} γ times"
    if bool((gamma[zero] <= DEAD_AT_ALL).all()):
        severity, why = "info", "of no consequence, γ is zero there"
    elif var.numel() > 1 and bool(zero.all()):
        severity = "error"
    elif not mean[zero].any():
        severity, why = "info", f"and so is the mean: nothing but zeros came there; {why}"
    return Finding(
        "BN104",
        severity,
        name,
        f"running variance is zero in {said(zero)}: {why}",
        evidence,
        "Such channels were constant in training, as behind a ReLU that is never on: prune "
        "them, or find what feeds them nothing. "
        f"Buffers that began at zero: {_ANEW}.",
    )


def _never_updated(layer: Kept, name: str) -> Finding:
    trained = _trained(layer)
    if layer.updates is None:
        severity, why = "warning", "there is no counter"
    elif trained:
        severity, why = "error", f"counter: {layer.updates}, but γ or β have been trained"
    elif layer.updates:
        severity, why = "error", f"but the counter says {layer.updates} updates"
    else:
        severity, why = "warning", "counter: 0"
    return Finding(
        "BN105",
        severity,
        name,
        f"running mean is 0 and running variance 1 in every channel, as a layer begins ({why}): in "
        "evaluation it does not normalise",
        {"updates": layer.updates, "affine_trained": trained},
        "Never trained: expected. Otherwise the statistics were reset, not loaded (strict=False), "
        f"or the layer ran with eval() or momentum=0: {_ANEW}.",
    )


def _trained(layer: Kept) -> bool:
    """Whether γ and β are others than a layer begins with: one value, and 0."""
    weight, bias = layer.weight, layer.bias
    return bool(
        (weight is not None and (weight != weight[0]).any())
        or (bias is not None and (bias != 0).any())
    )


def _few_updates(name: str, updates: int, *, from_one: bool) -> Iterator[Finding]:
    left = (1 - MOMENTUM) ** updates
    evidence = {"updates": updates, "assumed_momentum": MOMENTUM, "initial_share": left}
    remedy = f"Train longer before evaluating, or use a larger momentum; {_ANEW}."
    times = f"{updates} update{'s' if updates > 1 else ''}"
    if from_one and left > SHARE_LEFT:
        yield Finding(
            "BN102",
            "warning",
            name,
            f"{times}: with momentum {MOMENTUM}, torch's default, {left:.0%} of the running "
            "statistics is still what a layer begins with (mean 0, variance 1)",
            evidence,
            remedy,
        )
    elif updates < FEW:
        yield Finding(
            "BN102", "info", name, f"no more than {times} behind the statistics", evidence, remedy
        )


def _half(name: str, stored: torch.dtype, mean: Tensor, var: Tensor) -> Iterator[Finding]:
    """Buffers in half precision, or that have been."""
    had = (dtype for dtype in HALF if _were_in(dtype, mean, var))
    dtype = stored if stored in HALF else next(had, None)
    if dtype is None:
        return
    # A value is off by half a step, a part of it; an update by less than half a step is lost, so a
    # mean stalls where momentum times its distance is that.
    half_step = torch.finfo(dtype).eps / 2
    off = half_step * mean.abs() / (var.clamp(min=0) + EPS).sqrt()
    off = off.where(off.isfinite(), 0)
    rounding, stall = float(off.max()), float(off.max()) / MOMENTUM
    short = str(dtype).removeprefix("torch.")
    was = (
        f"are in {short}"
        if stored is dtype
        else f"have no digits beyond {short}'s, in which they were"
    )
    yield Finding(
        "BN106",
        "warning" if stall > STALL else "info",
        name,
        f"running mean and variance {was}: the mean is rounded by up to {rounding:.2g} σ; if "
        f"trained so, it may have stalled up to {stall:.2g} σ away (momentum {MOMENTUM})",
        {
            "dtype": short,
            "stored": str(stored).removeprefix("torch."),
            "rounding_in_sigma": rounding,
            "stall_in_sigma": stall,
            "channel": int(off.argmax()),
            "assumed_momentum": MOMENTUM,
        },
        "Keep the buffers in float32, as batchnorm.BatchNorm does whatever the model becomes, and "
        f"autocast instead of .half() or .bfloat16(). {_ANEW}.",
    )


def _were_in(dtype: torch.dtype, *buffers: Tensor) -> bool:
    """Whether every value is one of the dtype's, and there are too many for chance."""
    values = torch.cat(buffers)
    short = values.to(dtype).double() == values
    return bool(short.all()) and len(values.unique()) >= DISTINCT
