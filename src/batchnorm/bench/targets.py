"""What is wanted of the kernels on a GPU, and what the rows of a run say to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from batchnorm.bench.cases import COPY, FLOORS, SMALL_C, TWO_PASS
from batchnorm.bench.device import REPLAYED, WARM
from batchnorm.bench.estimate import geometric_mean
from batchnorm.bench.merge import Row, bytes_of
from batchnorm.bench.peers import COMPILE, EAGER

#: A tensor of so many bytes is large: several times any GPU's last cache.
LARGE = 100_000_000

BOTH = "forward+backward"

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"


@dataclass(frozen=True)
class Target:
    """One of them.

    Attributes:
        name: what is compared, and where.
        wanted: the least, in words.
        got: the number that decides; None if nothing was measured.
        says: what it is the lowest or the mean of.
        verdict: met, missed or not measured.
    """

    name: str
    wanted: str
    got: float | None
    says: str
    verdict: str


def judge(rows: Sequence[Row], resnet: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return every target with its verdict.

    Args:
        rows: of `merge.rows`. Of a case out of the cache and in it, the first decides.
        resnet: what the training of a network has shown, if it was measured.
    """
    known = deciding(rows)

    def chosen(peer: str, mode: str, also: Callable[[Row], bool] = lambda _: True) -> list[Row]:
        return [row for row in known if (row["peer"], row["pass"]) == (peer, mode) and also(row)]

    large = [chosen(EAGER, mode, lambda row: bytes_of(row) >= LARGE) for mode in ("forward", BOTH)]
    brain = chosen(EAGER, BOTH, lambda row: row["dtype"] == "bfloat16")
    cudnn = [row for row in known if row["peer"] == EAGER and _half_by_cudnn(row)]
    few = {(case.name, case.dtype_name) for case in SMALL_C}
    small = chosen(EAGER, BOTH, lambda row: (row["case"], row["dtype"]) in few)
    found = [
        _lowest("forward, ≥ 100 MB: part of 3B at a copy's speed", 0.85, large[0], two_pass, "%"),
        _lowest(
            "forward+backward, ≥ 100 MB: part of 8B at a copy's", 0.85, large[1], two_pass, "%"
        ),
        _mean("bfloat16 forward+backward, against torch eager", 2, brain),
        _mean("forward+backward, against torch.compile", 1.2, chosen(COMPILE, BOTH)),
        _lowest("float16 channels-last, against cuDNN", 0.95, cudnn, _ratio, "×"),
        _lowest("few channels, long slices, forward+backward", 5, small, _ratio, "×"),
        *_training(resnet),
    ]
    return [asdict(target) for target in found]


def deciding(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with a ratio; of those about the same, the one with the coldest cache."""
    first: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row["allocator"] == WARM):
        if row["ratio"] is not None and row["allocator"] != REPLAYED:
            keys = ("case", "dtype", "layout", "pass", "fusion", "peer")
            first.setdefault(tuple(row[key] for key in keys), row)
    return list(first.values())


def two_pass(row: Row) -> float:
    """Return the part of a copy's speed when what is needed twice is counted twice.

    >>> row = {"pass": "forward", "fusion": "bn", "bandwidth_fraction": 0.6}
    >>> round(two_pass(row), 3)
    0.9
    """
    key = row["pass"], row["fusion"]
    return float(row["bandwidth_fraction"]) * TWO_PASS[key] / FLOORS[key]


def copy_speed(rows: Sequence[Row]) -> tuple[float, str] | None:
    """Return the fastest copy of a large tensor, bytes read and written per second, and which."""
    speeds = [
        (COPY * bytes_of(row) / (row["copy_us"] * 1e-6), f"{row['case']} {row['dtype']}")
        for row in deciding(rows)
        if bytes_of(row) >= LARGE
    ]
    return max(speeds, default=None)


def _half_by_cudnn(row: Row) -> bool:
    return (row["dtype"], row["layout"]) == ("float16", "channels-last") and row.get("cudnn", False)


def _ratio(row: Row) -> float:
    return float(row["ratio"])


def _lowest(
    name: str, least: float, rows: Sequence[Row], of: Callable[[Row], float], unit: str
) -> Target:
    wanted = f"≥ {least:.0%}" if unit == "%" else f"≥ {least:g}×"
    if not rows:
        return Target(name, wanted, None, "", NOT_MEASURED)
    worst = min(rows, key=of)
    mean = geometric_mean([of(row) for row in rows])
    middle = f"{mean:.0%}" if unit == "%" else f"{mean:.2f}×"
    says = (
        f"lowest of {len(rows)}, mean {middle}: {worst['case']} {worst['dtype']} "
        f"{worst['layout']}, {worst['pass']}, {worst['fusion']}"
    )
    return _judged(name, wanted, of(worst), least, says)


def _mean(name: str, least: float, rows: Sequence[Row]) -> Target:
    wanted = f"≥ {least:g}×"
    if not rows:
        return Target(name, wanted, None, "", NOT_MEASURED)
    worst = min(rows, key=_ratio)
    says = (
        f"geometric mean of {len(rows)}, lowest {_ratio(worst):.2f}×: {worst['case']} "
        f"{worst['dtype']} {worst['layout']}, {worst['fusion']}"
    )
    return _judged(name, wanted, geometric_mean([_ratio(row) for row in rows]), least, says)


def _training(resnet: dict[str, Any] | None) -> list[Target]:
    """The network is faster if the whole interval says so."""
    time, memory = "ResNet-50 step, against torch eager", "ResNet-50 peak memory, part of eager's"
    faster = Target(time, "> 1×", None, "", NOT_MEASURED)
    smaller = Target(memory, "< 100%", None, "", NOT_MEASURED)
    if resnet is not None:
        low, high = resnet["interval"]
        verdict = MET if low > 1 else MISSED
        says = f"interval {low:.3f} to {high:.3f}"
        faster = Target(time, "> 1×", resnet["ratio"], says, verdict)
    if resnet is not None and resnet["eager_peak"]:  # the CPU does not count
        ours, eager = resnet["ours_peak"], resnet["eager_peak"]
        verdict = MET if ours < eager else MISSED
        says = f"{ours / 1e9:.2f} GB, eager {eager / 1e9:.2f} GB"
        smaller = Target(memory, "< 100%", ours / eager, says, verdict)
    return [faster, smaller]


def _judged(name: str, wanted: str, got: float, least: float, says: str) -> Target:
    return Target(name, wanted, got, says, MET if got >= least else MISSED)
