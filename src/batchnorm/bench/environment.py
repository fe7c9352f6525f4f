"""Where and with what something was measured."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from batchnorm._version import __version__
from batchnorm.kernels.select import backends

#: nvidia-smi's names, and ours.
_SMI = {
    "name": "smi_name",
    "driver_version": "driver",
    "clocks.sm": "clock",
    "clocks.max.sm": "highest_clock",
    "clocks.mem": "memory_clock",
    "power.limit": "power_limit",
    "temperature.gpu": "temperature_c",
}

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def environment(device: str, seed: int) -> dict[str, Any]:
    """Return the versions, the machine and the settings that times depend on."""
    return {
        "batchnorm": __version__,
        "commit": commit(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "libc": "-".join(platform.libc_ver()),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **({"gpu": gpu()} if device == "cuda" else {}),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "cache_bytes": cache_bytes(),
        "transparent_hugepage": huge_pages(),
        "threads": torch.get_num_threads(),
        # Without the breaks of its lines, for tables.
        "backends": [" ".join(str(backend).split()) for backend in backends()],
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "seed": seed,
    }


def gpu() -> dict[str, Any]:
    """Return what the current GPU is, what drives it, and its clocks as they are just now."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **nvidia_smi(),
    }


def nvidia_smi() -> dict[str, str]:
    """Return what nvidia-smi says of the first GPU now; it is only asked. Nothing if it is silent.

    The first by its own count, which need not be torch's: the name tells them apart.
    """
    try:
        line = subprocess.run(  # noqa: S603 - constant arguments
            ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader"],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(_SMI.values(), map(str.strip, line.split(",")), strict=False))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cache_bytes(folder: Path = _CACHES) -> dict[str, int]:
    """Return the sizes of the caches that hold data, by level; none where the system is silent."""
    sizes = {}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) << 10
    return sizes


def huge_pages(folder: Path = _HUGE_PAGES) -> dict[str, str]:
    """Return when the system gives huge pages, and how hard it tries; nothing where it is silent.

    Of each file's words the one in brackets is in force, such as: always [madvise] never.
    """
    found = {}
    for name in ("enabled", "defrag"):
        try:
            words = (folder / name).read_text()
        except OSError:
            continue
        found[name] = words.partition("[")[2].partition("]")[0]
    return found


def commit() -> str | None:
    """Return the commit of this package's sources, "+" after it if they differ; None if unknown."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(  # noqa: S603 - constant arguments
            ["git", "-C", str(package), *arguments],  # noqa: S607 - git is where it is
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        # An installed package may lie in a repository that is not its own.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
