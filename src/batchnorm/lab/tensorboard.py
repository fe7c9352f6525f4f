"""Every run's measurements for TensorBoard, written as the runs are finished."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchnorm.errors import MissingDependencyError
from batchnorm.lab.experiments import Run, Settings, Trial

# A curve of quantiles, or of layers, becomes one curve for each; beyond so many nobody looks.
WIDEST = 16


class Log:
    """A directory of event files, a folder a run; runs are named after what tells them apart."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependencyError(
                "Logs for TensorBoard need tensorboard, not installed here. Install with: "
                "pip install --no-build-isolation '.[tensorboard]' (in the clone)"
            ) from error
        self._writer: Any = SummaryWriter
        self._directory = directory
        self._constant = dataclasses.asdict(settings)

    def add(self, run: Run[Any]) -> None:
        """Write a run's numbers; curves by their own steps if the run tells them."""
        directory = self._directory / self.name(run.trial)
        # Event files of an earlier command in the same folder would be drawn as well.
        shutil.rmtree(directory, ignore_errors=True)
        with self._writer(str(directory)) as writer:
            for tag, step, value in points(run):
                writer.add_scalar(tag, value, step)

    def name(self, trial: Trial) -> str:
        """Return stage/arm/the rest: every field that is not the same in all runs."""
        fields = dataclasses.asdict(trial)
        stage, seed = fields.pop("stage"), fields.pop("seed")
        arm = fields.pop("arm", None)
        told = {
            k: v for k, v in fields.items() if k not in self._constant or self._constant[k] != v
        }
        rest = [f"{key}={value}" for key, value in told.items()]
        parts = [stage, *([arm] if arm else []), ",".join([*rest, f"seed={seed}"])]
        return "/".join(str(part).replace("/", " per ") for part in parts)


def points(run: Run[Any]) -> Iterator[tuple[str, int, float]]:
    """Yield (tag, step, value) of everything that a run measured; what is not finite is left out.

    >>> trial = Trial(stage="training", seed=0)
    >>> list(points(Run(trial, {"step": [5, 10], "loss": [0.5, None], "error": 0.1}, {})))
    [('loss', 5, 0.5), ('error', 0, 0.1)]
    """
    steps = run.measured.get("step")
    for key, value in run.measured.items():
        if key == "step":
            continue
        if not isinstance(value, list):
            yield from _point(key, 0, value)
            continue
        own = steps if isinstance(steps, list) and len(steps) == len(value) else None
        for index, item in enumerate(value):
            step = own[index] if own else index + 1
            if isinstance(item, list):
                for place, part in enumerate(item[:WIDEST], start=1):
                    yield from _point(f"{key}/{place}", step, part)
            else:
                yield from _point(key, step, item)


def _point(tag: str, step: int, value: Any) -> Iterator[tuple[str, int, float]]:
    if isinstance(value, (int, float)):
        yield tag, step, float(value)
