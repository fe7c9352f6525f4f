"""Add up the processor time of the runs of committed results, for `batchnorm lab list` to tell.

    python benchmarks/lab_minutes.py [DIR]

DIR has a folder an experiment, as `batchnorm lab run --all --out DIR` leaves them. Results whose
settings are not the profile's own (another number of seeds) say nothing about it, and are skipped.
"""

import argparse
import json
import sys
from pathlib import Path

from batchnorm.lab import minutes, results
from batchnorm.lab.runner import core_seconds

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
        seconds = sum(core_seconds(run["timing"]) for run in content["runs"])
        profiles[content["profile"]] = round(seconds / 60, 2)
        environment = content["environment"]
        machines.add(f"{environment['platform']}, {environment['cores']} cores")
    target = ROOT / "src" / "batchnorm" / "lab" / minutes.FILE
    written = {"timed_on": sorted(machines), "core_minutes": timed}
    target.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
