"""Lightning: recalibration at the end of training, as a callback."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from batchnorm.errors import ArgumentError, MissingDependencyError
from batchnorm.sync import WORLD, Group, check_group
from batchnorm.tools.feeding import Step, call, check_batches
from batchnorm.tools.layers import every_batch_norm
from batchnorm.tools.progress import Tell
from batchnorm.tools.recalibrate import check_options, recalibrate
from batchnorm.tools.recalibration import Recalibration


class _Recalibrating:
    """Lightning callback: `recalibrate`s the model when training has ended.

    On the training data, in each process's share of them, with the precision that training had.
    Put it after a callback that averages weights (`WeightAveraging`), whose averages have no
    statistics of their own. Checkpoints that were written in training have the statistics of then:
    save one more with `trainer.save_checkpoint` after `fit`.

    Args:
        batches: what to recalibrate with; None for the training loader.
        step: called as step(lightning_module, batch), with the batch on the module's device; None
            calls the module with the batch, or with its first element.
        method: as `recalibrate`.
        max_batches: as `recalibrate`; `limit_train_batches` holds, too.
        process_group: as `recalibrate`.
        progress: as `recalibrate`.

    Attributes:
        report: what `recalibrate` gave; None before.

    Raises:
        ArgumentError: an option is impossible. At the start of training: there are several training
            loaders and `batches` is None, the module has no `forward` and `step` is None, or there
            are no batch norm layers. At the end of it, as `recalibrate`.

    Example:
        >>> from batchnorm.integrations.lightning import RecalibrateCallback  # doctest: +SKIP
        >>> trainer = Trainer(callbacks=[RecalibrateCallback(max_batches=200)])  # doctest: +SKIP
    """

    def __init__(
        self,
        batches: Iterable[Any] | None = None,
        *,
        step: Step | None = None,
        method: str = "batch",
        max_batches: int | None = None,
        process_group: Group = WORLD,
        progress: bool | Tell = False,
    ) -> None:
        super().__init__()
        # Not at the end of training, which may be days later.
        check_group(process_group)
        given = () if batches is None else batches
        check_batches(given, step)
        check_options(given, method, max_batches)
        self.batches = batches
        self.step = step
        self.method = method
        self.max_batches = max_batches
        self.process_group = process_group
        self.progress = progress
        self.report: Recalibration | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's hook: what cannot work at the end is told before the work is done."""
        every_batch_norm(pl_module)
        if self.batches is None:
            _loader(trainer)
        if self.step is None and "forward" not in vars(pl_module):
            owner = next(base for base in type(pl_module).__mro__ if "forward" in vars(base))
            if owner.__name__ == "LightningModule":  # under either of its two names
                raise ArgumentError(
                    f"expected a module with a forward(), which a batch is given to, got "
                    f"{type(pl_module).__name__} with none; pass RecalibrateCallback(step=lambda "
                    "module, batch: module.MODEL(batch[0]))"
                )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's hook."""
        batches, most = self.batches, self.max_batches
        if batches is None:
            batches = _loader(trainer)
            limit = trainer.num_training_batches
            if limit != float("inf"):
                most = int(limit) if most is None else min(most, int(limit))
        run = self.step or call

        def step(model: Any, batch: Any) -> Any:
            batch = trainer.strategy.batch_to_device(batch, model.device)
            with trainer.precision_plugin.forward_context():
                return run(model, batch)

        self.report = recalibrate(
            pl_module,
            batches,
            step=step,
            method=self.method,
            process_group=self.process_group,
            max_batches=most,
            progress=self.progress,
        )


def _loader(trainer: Any) -> Any:
    loader = trainer.train_dataloader
    if isinstance(loader, (dict, list, tuple)):
        raise ArgumentError(
            "expected one training loader to recalibrate with, got a "
            f"{type(loader).__name__} of them; pass RecalibrateCallback(batches=…)"
        )
    return loader


RecalibrateCallback: type[_Recalibrating]


def __getattr__(name: str) -> Any:
    """Make the class when it is asked for: its base is Lightning's, by either of its names."""
    if name != "RecalibrateCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for package in ("lightning.pytorch", "pytorch_lightning"):
        with suppress(ImportError):
            base = importlib.import_module(package).Callback
            break
    else:
        raise MissingDependencyError(
            "RecalibrateCallback needs lightning, which is not installed here: "
            "pip install lightning"
        )
    content = {"__doc__": _Recalibrating.__doc__, "__module__": __name__}
    made = type(name, (_Recalibrating, base), content)
    globals()[name] = made
    return made
