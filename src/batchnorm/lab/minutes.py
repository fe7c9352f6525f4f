"""How long experiments take, from runs that were timed.

`minutes.json` is made by `python benchmarks/lab_minutes.py`, from the committed results.
"""

from __future__ import annotations

import importlib.resources
import json

import joblib

FILE = "minutes.json"


def expected() -> dict[str, dict[str, float]]:
    """Return by experiment and profile about how many minutes its runs take on all cores here.

    An experiment or profile that was never timed is absent. Starting the workers takes a few
    seconds more.
    """
    text = (importlib.resources.files(__package__) / FILE).read_text(encoding="utf-8")
    cores = joblib.cpu_count()
    timed: dict[str, dict[str, float]] = json.loads(text)["core_minutes"]
    return {
        name: {profile: minutes / cores for profile, minutes in by.items()}
        for name, by in timed.items()
    }
