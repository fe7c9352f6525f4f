"""BN2xx: how layers are set up and used."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import ArgumentError
from batchnorm.moments import Moments
from batchnorm.tools.diagnosis.modes import still
from batchnorm.tools.diagnosis.statistics import BY_CHANCE, chance_of, eps_of
from batchnorm.tools.diagnosis.trace import Origin
from batchnorm.tools.findings import Finding
from batchnorm.tools.freeze import is_frozen
from batchnorm.tools.layers import keepers

#: From here on the running statistics are those of hardly more than the last batch: m / (2 − m) of
#: the batches' own spread stays in them, a third at one half. A Keras momentum of 0.9 or 0.99,
#: taken over as it is, lands here.
HIGH_MOMENTUM = 0.5

#: How far dropout may change the variance that comes in, in ln: by a fifth.
DROPOUT_SHIFT = 0.2

#: How far the output may move without a bias that does nothing: rounding, of bfloat16 too.
SAME = 0.03

#: How far calls of one layer within a forward pass may be apart: in σ of all, and in ln of their
#: variances. As for drift, which it becomes for each of the calls.
CALLS_MEAN, CALLS_VAR = 0.5, 0.7


def check_momentum(name: str, layer: Any) -> list[Finding]:
    """BN201."""
    momentum = layer.__dict__.get("momentum")
    if layer.running_mean is None or momentum is None or not isinstance(layer, _BatchNorm):
        return []
    if is_frozen(layer) or 0 < momentum < HIGH_MOMENTUM:
        return []
    if momentum == 0:
        message = "momentum 0: the running statistics never move"
        remedy = "momentum is the weight of the new batch; 0.1 is usual, freeze(model) freezes"
    elif momentum == 1:
        message = "momentum 1: the running statistics are the last batch's"
        remedy = "momentum is the weight of the new batch: a Keras or Flax m is 1 − m; 0.1 is usual"
    else:
        message = (
            f"momentum {momentum:g}: the running statistics hold about "
            f"{(2 - momentum) / momentum:.1f} batches"
        )
        remedy = "momentum is the weight of the new batch: a Keras or Flax m is 1 − m; 0.1 is usual"
    return [Finding("BN201", "warning", name, message, {"momentum": momentum}, remedy)]


def check_bias(name: str, layer: Any, origin: Origin | None, moved: float | None) -> list[Finding]:
    """BN202.

    Args:
        name: the layer's.
        layer: the layer.
        origin: what feeds it directly.
        moved: how far the output in training moves without the bias, in the unit of `Gap`; None:
            not measured.
    """
    if origin is None or origin.bias is None or moved is None or not moved < SAME:
        return []
    no_beta = getattr(layer, "bias", None) is None
    return [
        Finding(
            "BN202",
            "info",
            name,
            f"{origin.function} right before adds a bias, which normalization takes off again"
            + (" (and this layer has no β)" if no_beta else ""),
            {"function": origin.function, "moved": moved},
            "bias=False there saves parameters and changes nothing",
        )
    ]


def check_dropout(name: str, origin: Origin | None, shift: float | None) -> list[Finding]:
    """BN203.

    Args:
        name: the layer's.
        origin: what feeds it directly in training.
        shift: mean over channels of ln(variance with dropout / without) of what comes in.
    """
    if origin is None or not origin.dropout or shift is None or not shift > DROPOUT_SHIFT:
        return []
    through = "" if origin.function == "dropout" else f" (through {origin.function})"
    return [
        Finding(
            "BN203",
            "warning",
            name,
            f"dropout of {origin.dropout:g} right before{through}: in training the variance that "
            f"comes in is {math.exp(shift):.3g} times that of evaluation",
            {"p": origin.dropout, "var_ratio": math.exp(shift)},
            "put dropout after the last batch normalization, or lower p",
        )
    ]


def check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Refuse what is no optimizer, or that of another model.

    Raises:
        ArgumentError: it is.
    """
    if optimizer is None:
        return
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise ArgumentError(f"expected an optimizer, got {type(optimizer).__name__}")
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ArgumentError(
            "expected the model's optimizer, got one with none of the model's parameters; make it "
            "of model.parameters() after the model is what it will be"
        )


def check_weight_decay(
    layers: list[tuple[str, Any]], optimizer: torch.optim.Optimizer | None
) -> list[Finding]:
    """BN204."""
    if optimizer is None:
        return []
    decay = {
        id(parameter): float(group.get("weight_decay") or 0)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    found = []
    for name, layer in layers:
        decayed = {
            kind: decay[id(parameter)]
            for keeper in (keepers(layer) if isinstance(layer, _BatchNorm) else [])
            for kind, parameter in (("γ", keeper.weight), ("β", keeper.bias))
            if parameter is not None and parameter.requires_grad and decay.get(id(parameter))
        }
        if decayed:
            which = " and ".join(decayed)
            found.append(
                Finding(
                    "BN204",
                    "warning",
                    name,
                    f"weight decay of {max(decayed.values()):g} on {which}",
                    {"weight_decay": max(decayed.values()), "on": list(decayed)},
                    "optimizer(param_groups(model, weight_decay)) leaves them out",
                )
            )
    return found


def check_modes(model: nn.Module, layers: list[tuple[str, Any]]) -> list[Finding]:
    """BN205 and BN207: of the model as it was given."""
    held = still(model, layers)
    kept = [(name, layer) for name, layer in layers if layer in held]
    free = [(name, layer) for name, layer in layers if all(name != other for other, _ in kept)]
    found = []
    if kept and free:
        names = [name for name, _ in kept]
        found.append(
            Finding(
                "BN205",
                "info",
                "",
                f"{len(kept)} of {len(layers)} layers are frozen or in evaluation ({_some(names)}),"
                " the others train",
                {"frozen": names, "training": [name for name, _ in free]},
                "nothing, if that is meant; else freeze(model), or unfreeze(model), model.train()",
            )
        )
    awake = [name for name, layer in layers if not model.training and layer.training]
    awake = [name for name in awake if name not in dict(kept)]
    if awake:
        found.append(
            Finding(
                "BN207",
                "error",
                "",
                f"the model is in evaluation, but {len(awake)} of {len(layers)} layers are in "
                f"training ({_some(awake)}): each output depends on the rest of its batch, and "
                "evaluating changes the model",
                {"layers": awake},
                "model.eval() on the whole model, last; look for a train() of your own that skips "
                "layers",
            )
        )
    return found


def _some(names: Iterable[str]) -> str:
    names = [name or "the model" for name in names]
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def check_calls(name: str, layer: Any, calls: list[list[Moments]], samples: float) -> list[Finding]:
    """BN206: several calls in a pass, of data that differ.

    Args:
        name: the layer's.
        layer: the layer.
        calls: moments of each call, by batch.
        samples: how many there are in a call: what one call is worth if there is one batch only.
    """
    number = max(map(len, calls), default=0)
    parts = [[batch[k] for batch in calls if len(batch) > k] for k in range(number)]
    if number < 2 or any(not bool(m.m2.isfinite().all()) for part in parts for m in part):
        return []
    merged, eps = [Moments.merge_all(part) for part in parts], eps_of(layer)
    whole = Moments.merge_all(merged)
    sigma2 = whole.variance() + eps
    far = ((torch.stack([part.mean for part in merged]) - whole.mean) ** 2 / sigma2).mean(1)
    logs = ((torch.stack([part.variance() for part in merged]) + eps) / sigma2).log()
    wide = logs.square().mean(1)
    by_chance = [chance_of(part, samples, eps) for part in parts]
    far_by_chance, wide_by_chance = torch.tensor(by_chance, dtype=far.dtype).T.to(far)
    apart = (far > CALLS_MEAN**2) & (far > BY_CHANCE * far_by_chance)
    apart |= (wide > CALLS_VAR**2) & (wide > BY_CHANCE * wide_by_chance)
    if not bool(apart.any()):
        return []
    mean_apart, var_apart = float(far.max().sqrt()), float(wide.max().sqrt())
    return [
        Finding(
            "BN206",
            "warning",
            name,
            f"called {number} times in a forward pass, with data that differ: means up to "
            f"{mean_apart:.2g} σ from the common one, variances by a factor of "
            f"{math.exp(var_apart):.2g}; the running statistics are a mixture that fits none of "
            "them",
            {
                "calls": number,
                "mean_apart": mean_apart,
                "mean_apart_by_chance": float(far_by_chance.max().sqrt()),
                "var_apart": var_apart,
                "var_apart_by_chance": float(wide_by_chance.max().sqrt()),
            },
            "a layer of its own for each place, or a bank of statistics: with bank(model, name)",
        )
    ]


def check_double_counting(name: str, calls: int, counted: int) -> list[Finding]:
    """BN108: a rehearsed training step counted more than its forward calls."""
    if counted <= calls:
        return []
    return [
        Finding(
            "BN108",
            "warning",
            name,
            f"a training step with {calls} forward call{'s' * (calls != 1)} was counted {counted} "
            "times: activation checkpointing does passes again",
            {"calls": calls, "counted": counted},
            "convert(model): BatchNorm does not count what is computed again; or momentum "
            f"1 − (1 − m)^(1/{counted / max(calls, 1):g})",
        )
    ]


def unreached(name: str) -> Finding:
    """BN208."""
    return Finding(
        "BN208",
        "info",
        name,
        "no batch reached this layer",
        {},
        "if the model uses it in training only, look at it there; else it can go",
    )
