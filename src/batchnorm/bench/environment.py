"""Where and with what something was measured."""

from __future__ import annotations

import datetime as dt
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from batchnorm._version import __version__
from batchnorm.kernels.select import backends

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def environment(device: str, seed: int) -> dict[str, Any]:
    """Return the versions, the machine and the settings that times depend on."""
    return {
        "batchnorm": __version__,
        "commit": commit(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "libc": "-".join(platform.libc_ver()),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "cache_bytes": cache_bytes(),
        "transparent_hugepage": huge_pages(),
        "threads": torch.get_num_threads(),
        "backends": [str(backend) for backend in backends()],
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "seed": seed,
    }


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
