"""Every run's measurements for TensorBoard, written as the runs are finished."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from batchnorm.errors import BatchNormError, MissingDependencyError
from batchnorm.lab.experiments import Run, Settings, Trial
from batchnorm.lab.store import write_atomically

# A curve of quantiles, or of layers, becomes one curve for each; beyond so many nobody looks.
WIDEST = 16

# TensorBoard knows its files by the first part. A run's folder has one, always of the same name.
EVENTS = "events.out.tfevents.*"
NAME = EVENTS.replace("*", "0.run")

# The first record of an event file.
FORMAT = "brain.Event:2"


class Log:
    """A directory of event files, a folder a run; runs are named after what tells them apart.

    Logs are an extra: that one cannot be written is told once, to `note`, and costs no results.
    """

    def __init__(
        self, directory: Path, settings: Settings, note: Callable[[str], None] = lambda _: None
    ) -> None:
        try:
            # Not its SummaryWriter, whose thread prints what it cannot write as a traceback.
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.summary.writer.record_writer import RecordWriter
            from torch.utils.tensorboard.summary import scalar
        except ImportError as error:
            raise MissingDependencyError(
                "Logs for TensorBoard need tensorboard, not installed here. Install with: "
                "pip install --no-build-isolation '.[tensorboard]' (in the clone)"
            ) from error
        self._event: Any = Event
        self._records: Any = RecordWriter
        self._scalar: Any = scalar
        self._directory = directory
        self._constant = dataclasses.asdict(settings)
        self._note = note
        self._failed = False

    def clear(self) -> None:
        """Remove the event files of an earlier command; all that it finished is logged again.

        Else runs that are not part of this one (of another best rate, other seeds, an older
        recipe) would be drawn beside it.
        """
        with self._told():
            for path in sorted(self._directory.rglob(EVENTS)):
                path.unlink()
                folder = path.parent
                # Not what else is there: it may be the user's.
                while folder != self._directory and not any(folder.iterdir()):
                    folder.rmdir()
                    folder = folder.parent

    def add(self, run: Run[Any]) -> None:
        """Write a run's numbers; curves by their own steps if the run tells them."""
        if self._failed:
            return
        content = io.BytesIO()
        records = self._records(content)
        now = time.time()
        records.write(self._event(wall_time=now, file_version=FORMAT).SerializeToString())
        for tag, step, value in points(run):
            event = self._event(wall_time=now, step=step, summary=self._scalar(tag, value))
            records.write(event.SerializeToString())
        with self._told():
            directory = self._directory / self.name(run.trial)
            directory.mkdir(parents=True, exist_ok=True)
            write_atomically(directory / NAME, content.getvalue())

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what cannot be written into a note, and the end of the log."""
        try:
            yield
        except (OSError, BatchNormError) as error:
            self._failed = True
            # The filing system's own words, whether or not they come in an error of ours.
            cause = error if isinstance(error, OSError) else error.__cause__
            self._note(
                f"No more logs for TensorBoard: cannot write in {self._directory} "
                f"({getattr(cause, 'strerror', None) or error}). The results do not need them."
            )

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
