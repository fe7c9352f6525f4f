"""What the layers of a checkpoint say beside each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from batchnorm.tools.checkpoint.kept import Kept
from batchnorm.tools.findings import Finding

#: Batches from which on it is no chance that one layer has taken in a whole multiple of them.
MULTIPLE_OF = 10


def counters(
    place: str, layers: Sequence[Kept], named: Callable[[Kept], str]
) -> tuple[list[Finding], str | None]:
    """Layers that count a whole multiple of what most do; and a note if they differ otherwise."""
    counted = [layer for layer in layers if layer.updates and ".banks." not in layer.name]
    if not counted:
        return [], None
    ((usual, times), *others) = Counter(layer.updates for layer in counted).most_common()
    findings = []
    for layer in counted:
        factor, rest = divmod(layer.updates or 0, usual or 1)
        if factor > 1 and not rest and 2 * times > len(counted) and (usual or 0) >= MULTIPLE_OF:
            findings.append(
                Finding(
                    "BN206",
                    "info",
                    named(layer),
                    f"{layer.updates} updates, {factor} for each of the {usual} of most layers: "
                    f"called {factor} times in a forward pass, it seems",
                    {"updates": layer.updates, "usual_updates": usual, "calls": factor},
                    "Right if the calls see the same kind of data. If not, give each kind its own "
                    "statistics: `with bank(model, …)`.",
                )
            )
    if not others:
        return findings, None
    listed = ", ".join(
        f"{count} ({many} layer{'s' if many > 1 else ''})"
        for count, many in sorted([(usual or 0, times), *((n or 0, m) for n, m in others)])[:6]
    )
    return findings, (
        f"{place or 'The file'}: layers have taken in different numbers of batches: {listed}"
        f"{', …' if len(others) > 5 else ''}. So do parts that were added, frozen or skipped."
    )


def copies(places: Sequence[Sequence[Kept]], named: Callable[[Kept], str]) -> Iterator[Finding]:
    """Averaged weights whose statistics are those of the model that was averaged, bit for bit."""
    models = [{_bare(layer.name): layer for layer in layers} for layers in places]
    for copy in models:
        first = next(iter(copy.values()))
        if not any(word in first.place.lower() for word in ("ema", "swa", "averag")):
            continue
        for model in models:
            if model is not copy and model.keys() == copy.keys() and _copied(copy, model):
                other = next(iter(model.values())).place
                yield Finding(
                    "BN101",
                    "info",
                    "" if len(copy) > 1 else named(first),
                    f"running statistics of {first.place!r} are those of {other!r} bit for bit, "
                    "but γ and β are not: they belong to other weights (unless they were frozen)",
                    {"copy": first.place, "original": other, "layers": len(copy)},
                    "Averaged weights give other activations: `recalibrate(averaged_model, "
                    "batches)` before evaluating them.",
                )


def _copied(copy: dict[str, Kept], model: dict[str, Kept]) -> bool:
    pairs = [(layer, model[name]) for name, layer in copy.items()]
    statistics = all(_same(a.mean, b.mean) and _same(a.var, b.var) for a, b in pairs)
    affine = all(_same(a.weight, b.weight) and _same(a.bias, b.bias) for a, b in pairs)
    return statistics and not affine


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _bare(name: str) -> str:
    """Without what DistributedDataParallel, torch.compile and averaging put before."""
    while name.startswith(("module.", "_orig_mod.")):
        name = name.partition(".")[2]
    return name
