"""The examples: each runs as a program of its own, and what it prints is what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def share(text):
    return float(text.rstrip("%")) / 100


#: For each what it prints last, and whether its numbers are as they should be.
PRINTED = {
    "broken_eval": (
        r"(\d+%) before, (\d+%) after recalibrate\(\)$",
        lambda before, after: share(before) < 0.92 < 0.96 < share(after),
    ),
    "deploy": (r"original differ by (\S+)$", lambda apart: float(apart) < 1e-5),
    "fine_tuning": (r"statistics unchanged: (\w+)$", lambda same: same == "True"),
    "gradient_accumulation": (r"differ by (\S+)$", lambda apart: float(apart) < 1e-12),
    "padding": (
        r"data (\S+), ours (\S+), with padding (\S+)$",
        lambda true, ours, padded: true == ours and abs(float(padded) - float(true)) > 1,
    ),
    "recurrent": (r"right in evaluation: (\d+%)$", lambda right: share(right) > 0.75),
    "several_processes": (r"rows: (\S+) from one process", lambda apart: float(apart) < 1e-12),
    "small_batches": (
        r"differ by (\S+) of the output, renormalized by (\S+)$",
        lambda plain, repaired: float(repaired) < float(plain) / 2,
    ),
}


def test_every_example_is_listed_and_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == PRINTED.keys()
    listed = re.findall(r"\]\((\w+)\.py\)", (EXAMPLES / "README.md").read_text())
    assert set(listed) == names


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTED)
def test_it_runs_and_prints_what_it_promises(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pattern, holds = PRINTED[name]
    found = re.search(pattern, done.stdout.strip(), flags=re.MULTILINE)
    assert found, done.stdout
    assert holds(*found.groups()), done.stdout
    assert list(tmp_path.iterdir()) == []
