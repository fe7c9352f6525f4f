"""What a session on a GPU has found: put together, and as a short table.

`benchmarks/gpu.py` makes the session. Nothing here needs more than torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from batchnorm.bench import results, targets
from batchnorm.bench.cases import FUSIONS, PASSES
from batchnorm.bench.estimate import geometric_mean
from batchnorm.bench.merge import Row
from batchnorm.bench.peers import AUTOTUNE, COMPILE, EAGER, GPU_PEERS, NATIVE, OURS
from batchnorm.bench.targets import deciding, two_pass

SCHEMA = 1

#: How a part of a session can end. In a part that went WRONG something was not right; one that
#: DIED has not said so; STOPPED is for lack of time, SKIPPED for lack of a tool.
OK, WRONG, DIED, STOPPED, SKIPPED = "ok", "wrong", "died", "stopped", "skipped"

#: Characters in a line of the table, and its lines.
WIDTH, LINES = 80, 60

_SHORT = {EAGER: "eager", NATIVE: "no cuDNN", COMPILE: "compile", AUTOTUNE: "autotune"}

COMMAND, REHEARSAL = "make gpu", "PYTHONPATH=src python3 benchmarks/gpu.py --rehearse"


@dataclass(frozen=True)
class Part:
    """How a part of a session has ended.

    Attributes:
        proves: whether it is one of those that show that our results are right: if such a one was
            stopped or skipped, that has not been shown.
    """

    name: str
    status: str
    seconds: float
    says: str
    proves: bool = False


def summarise(
    events: Sequence[dict[str, Any]], parts: Sequence[Part], *, rehearsal: bool
) -> dict[str, Any]:
    """Return everything that was found.

    Returns:
        What `results.summarise` returns, whose `allocator` says here what the GPU's cache held; and
        `parts`, how they ended; `targets`; `copy_speed`, in bytes per second; `resnet`; `profiles`,
        the kernels that ran; `failed`, calls of ours that raised; `wrong`, what was not right, in
        words; `unproven`, what was left out or not finished, likewise; `rehearsal`, if it was on
        the CPU, where no time means anything: there are no targets then.
    """
    if not any(event["event"] == "environment" for event in events):
        events = [{"event": "environment"}, *events]
    content = results.summarise("gpu", events, command=REHEARSAL if rehearsal else COMMAND)
    for unknown in ("filter", "load", "kernels"):  # of the CPU's suites
        del content[unknown]
    resnet = next((_bare(event) for event in events if event["event"] == "resnet"), None)
    speed = targets.copy_speed(content["rows"])
    content |= {
        "schema": SCHEMA,
        "rehearsal": rehearsal,
        "complete": all(part.status in (OK, WRONG, SKIPPED) for part in parts),
        "parts": [vars(part) for part in parts],
        "targets": [] if rehearsal else targets.judge(content["rows"], resnet),
        "copy_speed": speed and {"bytes_per_second": speed[0], "case": speed[1]},
        "resnet": resnet,
        "profiles": [_bare(event) for event in events if event["event"] == "profile"],
        "failed": [_bare(event) for event in events if event["event"] == "failed"],
    }
    content["wrong"] = list(_wrong(content))
    content["unproven"] = [
        f"{part.name} {part.status}: {part.says}"
        for part in parts
        if part.proves and part.status in (STOPPED, SKIPPED)
    ]
    shortened: dict[str, Any] = results.short(content)
    return shortened


def _bare(event: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key != "event"}


def _wrong(content: dict[str, Any]) -> Iterator[str]:
    for part in content["parts"]:
        if part["status"] in (WRONG, DIED):
            yield f"{part['name']} {part['status']}: {part['says']}"
    for failed in content["failed"]:
        yield f"{failed['what']}: {failed['why']}"
    for row in results.refused(content):
        error = "NaN" if row["error"] is None else f"{row['error']:.1e}"
        yield (
            f"{row['case']} {row['dtype']} {row['layout']}, {row['pass']}, {row['fusion']}: error "
            f"{error} in {row['error_where']}, at most {row['error_bound']:.1e} allowed"
        )
    if content["resnet"] and not content["resnet"]["right"]:
        by_step = [
            f"{who} {' '.join('NaN' if loss is None else f'{loss:.3f}' for loss in losses)}"
            for who, losses in content["resnet"]["losses"].items()
        ]
        yield f"ResNet-50, losses by step: {', '.join(by_step)}"


def table(content: dict[str, Any]) -> list[str]:
    """Return what a session has found, in short: less than `LINES` lines of at most `WIDTH`.

    Of a rehearsal no times.
    """
    lines = [*_place(content), *_parts(content), ""]
    if not content["rehearsal"]:
        lines += [*_targets(content), "", *_means(content), *_worst(content), *_resnet(content)]
    bad = [f"WRONG: {reason}" for reason in content["wrong"]]
    bad += [f"NOT PROVEN: {reason}" for reason in content["unproven"]]
    room = LINES - 2 - len(lines)
    return [*lines, *map(_cut, bad[: max(1, room)]), _cut(_verdict(content))]


def _verdict(content: dict[str, Any]) -> str:
    """The last line. That nothing was wrong says little of what has not been looked at."""
    if content["wrong"] or content["unproven"]:
        return f"{len(content['wrong'])} wrong, {len(content['unproven'])} not proven"
    left = [part["name"] for part in content["parts"] if part["status"] == STOPPED]
    return "nothing was wrong" + (f" in what ran; not finished: {'; '.join(left)}" if left else "")


def _cut(line: str) -> str:
    line = line.replace("\n", " ")
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def _place(content: dict[str, Any]) -> Iterator[str]:
    """Where, how fast that is, and whether our kernels served: Triton names its kernels by words.

    torch's have names of C++.
    """
    place = content["environment"]
    gpu = place.get("gpu") or {}
    software = f"torch {place.get('torch')}, triton {place.get('triton')}"
    if content["rehearsal"]:
        yield "REHEARSAL on the CPU: whether every part works, and nothing of how fast."
        yield _cut(software)
        return
    yield _cut(
        f"{place.get('device')}, driver {gpu.get('driver')}, {software}, cuDNN {gpu.get('cudnn')}"
    )
    if speed := content["copy_speed"]:
        yield f"copy: {speed['bytes_per_second'] / 1e12:.2f} TB/s ({speed['case']})"
    if gpu and (ours := [ran for ran in content["profiles"] if ran["contender"] == OURS]):
        own = sum(any(kernel["name"].isidentifier() for kernel in ran["kernels"]) for ran in ours)
        yield f"our own kernels ran in {own} of {len(ours)} profiled calls"


def _parts(content: dict[str, Any]) -> Iterator[str]:
    for part in content["parts"]:
        head = f"{part['name']:<12} {part['status']:<7} {part['seconds']:4.0f} s  "
        yield _cut(head + part["says"]) if part["says"] else head.rstrip()


def _targets(content: dict[str, Any]) -> Iterator[str]:
    yield f"{'target':<52}{'wanted':>8}{'got':>7} {'verdict':>12}"
    for target in content["targets"]:
        yield f"{target['name']:<52}{target['wanted']:>8}{got(target):>7} {target['verdict']:>12}"


def got(target: dict[str, Any]) -> str:
    """Return the number that decides."""
    value = target["got"]
    if value is None:
        return "-"
    return f"{value:.0%}" if "%" in target["wanted"] else f"{value:.2f}×"


def _means(content: dict[str, Any]) -> Iterator[str]:
    """Geometric means over the cases, each out of the cache where it can be."""
    rows = deciding(content["rows"])
    if not rows:
        return
    peers = [peer for peer in GPU_PEERS if any(row["peer"] == peer for row in rows)]
    names = [*(_SHORT[peer] for peer in peers), "2-pass"]
    yield "means of their time/ours".ljust(29) + "".join(map("{:>10}".format, names))
    for mode in PASSES:
        for fusion in FUSIONS:
            here = [row for row in rows if (row["pass"], row["fusion"]) == (mode, fusion)]
            if not here:
                continue
            cells = [
                _mean([row["ratio"] for row in here if row["peer"] == peer], "{:.2f} ({})")
                for peer in peers
            ]
            cells.append(_mean([two_pass(row) for row in here if row["peer"] == EAGER], "{:.0%}"))
            yield f"{mode:<17}{fusion:<12}" + "".join(map("{:>10}".format, cells))


def _mean(values: Sequence[float], form: str) -> str:
    return form.format(geometric_mean(values), len(values)) if values else "-"


def _worst(content: dict[str, Any]) -> Iterator[str]:
    """The rows where torch eager is the nearest to us, or ahead."""
    rows = [row for row in deciding(content["rows"]) if row["peer"] == EAGER]
    for row in sorted(rows, key=lambda row: float(row["ratio"]))[:5]:
        yield _cut(f"lowest: {row['ratio']:.2f}× {_about(row)}, {row['ours_us']:.0f} µs")


def _resnet(content: dict[str, Any]) -> Iterator[str]:
    if found := content["resnet"]:
        steps = [f"{found[f'{who}_ms']:.1f} ms" for who in ("ours", "eager", "plain")]
        peaks = [f"{found[f'{who}_peak'] / 1e9:.2f} GB" for who in ("ours", "eager", "plain")]
        for what, (ours, eager, plain) in (("step", steps), ("peak", peaks)):
            yield f"ResNet-50 {what}: {ours}; eager {eager}, not in place {plain}"


def _about(row: Row) -> str:
    layout = {"channels-last": "NHWC"}.get(row["layout"], row["layout"])
    return f"{row['case']} {row['dtype']} {layout}, {row['pass']}, {row['fusion']}"
