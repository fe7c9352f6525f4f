"""Add up the processor time of the runs of committed results, for `batchnorm lab list` to tell.

    python benchmarks/lab_minutes.py [DIR]

DIR has a folder an experiment, as `batchnorm lab run --all --out DIR` leaves them. Results whose
settings are not the profile's own (another number of seeds) say nothing about it, and are skipped.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchnorm.lab import minutes, results
from batchnorm.lab.runner import CPU_S, RUN_S

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Write the package's minutes.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, default=ROOT / "docs" / "evidence")
    directory = parser.parse_args().directory
    timed: dict[str, dict[str, float]] = {}
    machines = set()
    for path in sorted(directory.glob(f"*/{results.FILE}")):
        found = results.read(path.parent)
        content, experiment = found.content, found.experiment
        if found.settings != experiment.profiles.get(content["profile"]):
            sys.stderr.write(f"{path.parent.name}: not as its profile has it; skipped\n")
            continue
        profiles = timed.setdefault(experiment.name, {})
        profiles[content["profile"]] = round(core_seconds(content["runs"]) / 60, 2)
        environment = content["environment"]
        machines.add(f"{environment['platform']}, {environment['cores']} cores")
    target = ROOT / "src" / "batchnorm" / "lab" / minutes.FILE
    written = {"timed_on": sorted(machines), "core_minutes": timed}
    target.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def core_seconds(runs: Sequence[dict[str, Any]]) -> float:
    """Return how long one core takes for all runs, with what they start in other processes.

    Results of before CPU_S was kept have the time by the clock alone. Theirs is the same if every
    core had a run at a time, as `lab run` has it: a run with processes of its own then waits for
    the cores, and its time is longer by as much.
    """
    return float(sum(run["timing"].get(CPU_S, run["timing"][RUN_S]) for run in runs))


if __name__ == "__main__":
    main()
