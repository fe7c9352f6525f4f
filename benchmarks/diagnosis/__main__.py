"""How many planted faults `diagnose` finds, and how often it finds fault with a healthy model.

    python benchmarks/diagnosis [--seeds N] [--json FILE] [--only TEXT]    half a minute a seed

Networks of many kinds are trained a little on scikit-learn's handwritten digits; half of them then
get one fault each, planted on purpose. A fault counts as found if its code is among the findings,
at the right layer where it has one; whatever is found in a healthy model, information too, is a
false alarm. Thresholds were chosen while looking at seed 0 alone: the other seeds are the test.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import healthy  # noqa: F401 - fills the list
import planted  # noqa: F401 - likewise
import torch
from cases import CASES, Case

from batchnorm import diagnose
from batchnorm.bench.environment import environment

#: What thresholds were chosen with.
SEED = 0


def judge(one: Case, seed: int) -> dict[str, Any]:
    """Make it, diagnose it, compare."""
    torch.manual_seed(seed)
    model, data, options = one.make()
    start = time.perf_counter()
    diagnosis = diagnose(model, data, **options)
    seconds = time.perf_counter() - start
    found = [(f.code, f.severity, f.layer) for f in diagnosis.findings]
    right = [f for f in found if f[0] in one.codes and (one.layer is None or f[2] == one.layer)]
    gap = diagnosis.gap
    return {
        "name": one.name,
        "seed": seed,
        "planted": list(one.codes),
        "layer": one.layer,
        "found": bool(right) if one.codes else None,
        "others": [list(f) for f in found if f[0] not in one.codes],
        "messages": [str(f) for f in diagnosis.findings],
        "gap": gap.value if gap else None,
        "gap_recalibrated": gap.recalibrated if gap else None,
        "seconds": seconds,
    }


def page(content: dict[str, Any]) -> str:
    """The results in words and tables."""
    where, rows, seeds = content["environment"], content["rows"], content["seeds"]
    lines = [
        "# What `diagnose` finds",
        "",
        f"Made by `python benchmarks/diagnosis --seeds {seeds} --json {content['file']}`: "
        f"batchnorm {where['batchnorm']} at {where['commit'][:10]}, torch {where['torch']}, seeds "
        f"0 to {seeds - 1}, {where['date'][:10]}. Thresholds were chosen with seed {SEED}.",
        "",
        "| | with that seed | with the others |",
        "|---|---|---|",
    ]
    for words, planted_, count in (
        ("planted faults found", True, lambda row: row["found"]),
        ("healthy models with a finding of any kind", False, lambda row: bool(row["others"])),
    ):
        some = [row for row in rows if bool(row["planted"]) == planted_]
        cells = [[row for row in some if (row["seed"] == SEED) == own] for own in (True, False)]
        shown = [f"{sum(map(count, cell))} of {len(cell)}" if cell else "–" for cell in cells]
        lines.append(f"| {words} | {shown[0]} | {shown[1]} |")
    lines += [
        "",
        f"Below, the gap of seed {SEED}: the distance of the outputs in training and evaluation,",
        "in units of the spread of outputs; after the arrow, what exact statistics",
        "(`recalibrate`) would leave.",
        "",
        "| planted | model | found | gap | beside it |",
        "|---|---|---|---|---|",
    ]
    for one in (case for case in CASES if case.codes):
        of_case = [row for row in rows if row["name"] == one.name]
        if of_case:
            times = f"{sum(row['found'] for row in of_case)} of {len(of_case)}"
            codes = " or ".join(one.codes)
            lines.append(
                f"| {codes} | {one.name} | {times} | {_gap(of_case)} | {_others(of_case)} |"
            )
    lines += ["", "| healthy model | gap | findings |", "|---|---|---|"]
    for one in (case for case in CASES if not case.codes):
        of_case = [row for row in rows if row["name"] == one.name]
        if of_case:
            lines.append(f"| {one.name} | {_gap(of_case)} | {_others(of_case)} |")
    return "\n".join(lines) + "\n"


def _gap(rows: list[dict[str, Any]]) -> str:
    return f"{rows[0]['gap']:.2g} → {rows[0]['gap_recalibrated']:.2g}"


def _others(rows: list[dict[str, Any]]) -> str:
    """Other codes, and in how many of the models."""
    codes = sorted({code for row in rows for code, _, _ in row["others"]})
    times = {code: sum(code in {c for c, _, _ in row["others"]} for row in rows) for code in codes}
    return ", ".join(f"{code} ({n} of {len(rows)})" for code, n in times.items()) or "–"


def main() -> None:
    """Judge all, print the page, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write; the page goes beside it")
    parser.add_argument("--seeds", type=int, default=1, help="so many, from 0 on")
    parser.add_argument("--only", default="", help="cases with this in their names")
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.seeds):
        for one in CASES:
            if arguments.only in one.name:
                rows.append(judge(one, seed))
                row = rows[-1]
                mark = "MISSED: " if row["found"] is False else ""
                sys.stderr.write("\n  ".join([mark + one.name, *row["messages"]]) + "\n")
    content = {
        "seeds": arguments.seeds,
        "file": str(arguments.json or "FILE"),
        "environment": environment("cpu", SEED),
        "rows": rows,
    }
    text = page(content)
    sys.stdout.write(text)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        arguments.json.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
