"""BN107: whether processes that should have the same statistics do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from batchnorm.sync import Group, Synchronizer, check_group, resolve
from batchnorm.tools.findings import Finding
from batchnorm.tools.layers import batch_norms
from batchnorm.tools.merge import check_alike

#: In σ, and in ln: what float32 statistics that were computed alike may differ by, and less than
#: anyone would notice.
DIFFER = 1e-3


def check_processes(model: nn.Module, process_group: Group) -> list[Finding]:
    """Compare the running statistics of all processes; all must call.

    Raises:
        SyncError: a process did not come, or has another model.
    """
    check_group(process_group)
    group = resolve(process_group)
    kept: list[tuple[str, Any]] = [
        (name, layer) for name, layer in batch_norms(model) if layer.running_mean is not None
    ]
    if group is None or not kept:
        return []
    sync = Synchronizer(group, "diagnose")
    device = kept[0][1].running_mean.device
    check_alike(model, sync, device)
    rows: list[Any] = [
        torch.cat([layer.running_mean, layer.running_var]).to(device, torch.float64)
        for _, layer in kept
    ]
    everyones = sync.gather(torch.cat(rows)).split([len(row) for row in rows], 1)
    found = []
    for (name, _), of_one in zip(kept, everyones, strict=True):
        mean, var = of_one.chunk(2, 1)
        far = float(((mean - mean[0]) / var[0].clamp(min=1e-12).sqrt()).abs().max())
        wide = float((var / var[0]).clamp(min=1e-12).log().abs().max())
        same = bool(((of_one == of_one[0]) | (of_one.isnan() & of_one[0].isnan())).all())
        # NaN in some processes only is a difference, and compares as none.
        if not same and not (far <= DIFFER and wide <= DIFFER):
            found.append(
                Finding(
                    "BN107",
                    "warning",
                    name,
                    f"processes have other running statistics: means up to {far:.2g} σ apart; each "
                    "evaluates another model",
                    {"mean_apart": far, "log_var_apart": wide, "processes": len(of_one)},
                    "sync_statistics(model) before evaluation and before saving",
                )
            )
    return found
