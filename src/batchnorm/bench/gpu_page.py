"""What a session on a GPU has found, as a page of Markdown; or that there was none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from batchnorm.bench.device import STATES
from batchnorm.bench.gpu import COMMAND, got, table
from batchnorm.bench.merge import Row, grouped
from batchnorm.bench.peers import GPU_PEERS
from batchnorm.bench.targets import NOT_MEASURED, two_pass

HEADING = "# Batch norm on a GPU"


def page(content: dict[str, Any] | None) -> str:
    """Return the page of results; without any, what it says until there are some."""
    if content is None:
        return _NOT_YET
    if content["rehearsal"]:
        return _rehearsed(content)
    place = content["environment"]
    gpu = place.get("gpu") or {}
    return (
        "\n\n".join(
            [
                f"{HEADING}: {place.get('device')}",
                f"Written by `{COMMAND}`; [how it is measured](../README.md#on-a-gpu).",
                *(f"> **{note}**" for note in content["notes"]),
                f"""\
| | |
|---|---|
| GPU | {place.get("device")}: {gpu.get("multiprocessors")} multiprocessors, L2 \
{gpu.get("l2_bytes", 0) / 1e6:.0f} MB, memory {gpu.get("memory_bytes", 0) / 1e9:.0f} GB |
| as found | driver {gpu.get("driver")}, {gpu.get("clock")} of {gpu.get("highest_clock")}, memory \
{gpu.get("memory_clock")}, power limit {gpu.get("power_limit")}, {gpu.get("temperature_c")} °C |
| software | batchnorm {place.get("batchnorm")} at {place.get("commit")}, torch \
{place.get("torch")}, CUDA {gpu.get("cuda")}, cuDNN {gpu.get("cudnn")}, triton \
{place.get("triton")}, Python {place.get("python")} |
| kernels | {_served(place)} |
| date, seed | {place.get("date")}, {place.get("seed")} |""",
                "```text\n" + "\n".join(table(content)) + "\n```",
                "## Targets\n\n" + "\n".join(_said(content["targets"])),
                *_cases(content["rows"]),
                *_kernels(content["profiles"]),
            ]
        )
        + "\n"
    )


def _rehearsed(content: dict[str, Any]) -> str:
    """A page that is about no GPU, and looks so."""
    place = content["environment"]
    notes = "".join(f"> {note}\n\n" for note in content["notes"])
    printed = "\n".join(table(content))
    return f"""\
# A rehearsal, without a GPU

Nothing was measured: this is `{COMMAND}` on the CPU, with the kernels in Triton's interpreter, to
see whether every part of it works.

```sh
{content["command"]}
```

| | |
|---|---|
| batchnorm | {place.get("batchnorm")} at {place.get("commit")} |
| kernels | {_served(place)} |
| date, seed | {place.get("date")}, {place.get("seed")} |

{notes}```text
{printed}
```
"""


def _served(place: dict[str, Any]) -> str:
    """What our own kernels for a GPU serve, or why they do not."""
    lines = place.get("backends", ())
    return next((line for line in lines if line.startswith("triton")), "none for a GPU")


def _said(judged: Iterable[dict[str, Any]]) -> Iterator[str]:
    for target in judged:
        known = target["verdict"] != NOT_MEASURED
        number = f": {got(target)}, {target['says']}" if known else ""
        yield f"- **{target['verdict']}**: {target['name']}, {target['wanted']}{number}."


def _cases(rows: Sequence[Row]) -> Iterator[str]:
    """A table for each state of the cache: microseconds of a call, and the peers' over ours."""
    for state in STATES:
        here = [row for row in rows if row["allocator"] == state]
        peers = [peer for peer in GPU_PEERS if any(row["peer"] == peer for row in here)]
        if not here:
            continue
        lines = [
            f"## Every case: {state}",
            "",
            f"| case | pass | fusion | µs | copy µs | 2-pass | {' | '.join(peers)} |",
            "|---|---|---|---:|---:|---:|" + "---:|" * len(peers),
        ]
        keys = ("case", "dtype", "layout", "pass", "fusion")
        for key, alike in grouped(here, keys).items():
            first, by_peer = alike[0], {row["peer"]: row for row in alike}
            cells = [_cell(by_peer.get(peer)) for peer in peers]
            known = first["ratio"] is not None
            own = (
                [f"{first['ours_us']:.1f}", f"{first['copy_us']:.1f}", f"{two_pass(first):.0%}"]
                if known
                else ["wrong", "", ""]
            )
            case, dtype, layout, mode, fusion = key
            about = [f"{case} {dtype} {layout}", mode, fusion]
            lines.append(f"| {' | '.join([*about, *own, *cells])} |")
        yield "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None or row["ratio"] is None:
        return ""
    low, high = row["interval"]
    mark = ", cuDNN" if row.get("cudnn") else ""
    return f"{row['ratio']:.2f} ({low:.2f} to {high:.2f}){mark}"


def _kernels(profiles: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Which kernels ran, as the profiler has them."""
    if not profiles:
        return
    lines = [
        "## Which kernels ran",
        "",
        "| case | pass, fusion | who | kernels, µs each |",
        "|---|---|---|---|",
    ]
    for profile in profiles:
        ran = ", ".join(
            f"{kernel['name'].replace('|', '/')[:60]} {kernel['us']:.1f}"
            for kernel in profile["kernels"]
        )
        about = f"{profile['case']} {profile['dtype']} {profile['layout']}"
        what = f"{profile['pass']}, {profile['fusion']}"
        lines.append(f"| {about} | {what} | {profile['contender']} | {ran} |")
    yield "\n".join(lines)


_NOT_YET = f"""{HEADING}: not measured yet

No GPU has been measured, so **nothing is claimed about the speed of the kernels on one**. On the
CPU they are run by Triton's interpreter and compared with float64 like the others; that says that
they compute what they should, and nothing of how fast they are.

On a machine with a CUDA GPU, and a `python3` with torch ≥ 2.11 and triton, this measures and writes
the page:

```sh
{COMMAND}
```

It takes at most eight minutes: [what it does](../README.md#on-a-gpu).
"""
