"""Add up how long the runs of committed results took, for `batchnorm lab list` to tell.

    python benchmarks/lab_minutes.py [DIR]

DIR has a folder an experiment, as `batchnorm lab run --all --out DIR` leaves them.
"""

import argparse
import json
from pathlib import Path

from batchnorm.lab import minutes, results
from batchnorm.lab.runner import RUN_S

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Write the package's minutes.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, default=ROOT / "docs" / "evidence")
    directory = parser.parse_args().directory
    timed: dict[str, dict[str, float]] = {}
    machines = set()
    for path in sorted(directory.glob(f"*/{results.FILE}")):
        content = results.read(path.parent).content
        seconds = sum(run["timing"][RUN_S] for run in content["runs"])
        profiles = timed.setdefault(content["experiment"]["name"], {})
        profiles[content["profile"]] = round(seconds / 60, 2)
        environment = content["environment"]
        machines.add(f"{environment['platform']}, {environment['cores']} cores")
    target = ROOT / "src" / "batchnorm" / "lab" / minutes.FILE
    content = {"timed_on": sorted(machines), "core_minutes": timed}
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
