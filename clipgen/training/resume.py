"""What makes a resumed run the uninterrupted one: checkpoints, signals, seeds, settings, the table of losses."""

from __future__ import annotations

import csv
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only

from clipgen.files import atomic_write
from clipgen.hashing import hashed_seed


def checkpoints(folder: str | Path, monitor: str, every_n_steps: int) -> list[pl.Callback]:
    """``last.ckpt`` every n steps and wherever else it is wanted; ``best.ckpt`` by the lowest ``monitor``."""
    if every_n_steps < 1:
        raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
    best = ModelCheckpoint(folder, "best", monitor, enable_version_counter=False, auto_insert_metric_name=False)
    return [LastCheckpoint(Path(folder) / "last.ckpt", every_n_steps), ResumeValidation(), best]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, beside the old one until then: Lightning writes them in /tmp first,
    and where that is another disk the last step is a copy that can break off."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*.partial"):  # by a process that was killed in the middle
            left.unlink(missing_ok=True)
        with atomic_write(path) as partial, partial.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's own complaint hides what the system said
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None


class LastCheckpoint(pl.Callback):
    """Writes ``last.ckpt`` every n steps, before each validation, and on Ctrl-C or SIGTERM while ``listening``: then
    training stops, after the step or in the validation. A second signal stops at once."""

    def __init__(self, path: Path, every_n_steps: int):
        self.path, self.every_n_steps, self.asked, self.steps = path, every_n_steps, False, -1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals, and give them back: what comes after training is interrupted in the ordinary way."""
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:  # a step may have several batches: their gradients would be lost
            return
        # all processes stop at the same step
        self.asked = trainer.strategy.reduce_boolean_decision(self.asked, all=False)
        if self.asked:  # Lightning logs the step later, and will not come to that
            trainer._logger_connector.update_train_step_metrics()
        if self.asked or trainer.global_step % self.every_n_steps == 0 or validation_due(trainer):
            trainer.save_checkpoint(self.path, weights_only=False)
        self._stop()

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step != self.steps:
            self._stop()

    def _stop(self) -> None:
        if self.asked:
            raise KeyboardInterrupt


def validation_due(trainer: pl.Trainer) -> bool:
    """Whether a validation belongs to the place where training stands."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


class ResumeValidation(pl.Callback):
    """Runs a validation that was due at a checkpoint and then cut off by a stop: on resuming, Lightning takes it for
    done, and ``best.ckpt`` could be another."""

    def __init__(self) -> None:
        self.validated, self.owed = -1, False  # batches at the last validation; whether the resumed checkpoint owes one

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated = trainer.fit_loop.epoch_loop.total_batch_idx

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        at = trainer.fit_loop.epoch_loop.total_batch_idx
        checkpoint["validation_owed"] = validation_due(trainer) and at != self.validated

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.owed = checkpoint.get("validation_owed", False)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.owed:
            loop = trainer.fit_loop.epoch_loop.val_loop
            trainer.validating, loop.restarting, self.owed = True, False, False
            loop.run()
            trainer.training = True


class CSVLogger(pl.loggers.CSVLogger):
    """Lightning's, which would begin ``metrics.csv`` anew: the rows of a resumed run stay, up to where it goes on."""

    def __init__(self, save_dir: str, name: str = "", version: str = ""):
        super().__init__(save_dir, name, version)
        file = Path(self.log_dir) / "metrics.csv"
        self.before = list(csv.DictReader(file.read_text().splitlines())) if file.is_file() else []

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        rows = [{k: v for k, v in row.items() if v} for row in self.before if int(row["step"]) < (step or 0)]
        self.experiment.metrics += rows
        self.before = []
        super().log_metrics(metrics, step)


class PerStepSeed(pl.Callback):
    """Makes what a step draws (dropout, noise) a function of seed, step and rank: a resumed run draws the same."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        place = f"{self.seed} {trainer.fit_loop.epoch_loop.total_batch_idx} {trainer.global_rank}"
        torch.manual_seed(hashed_seed(place))


class OverrideOptimizerSettings(pl.Callback):
    """Lets a resumed run train at the learning rate, betas and weight decay that it is given: those of its checkpoint,
    which Lightning brings back with the optimizers, would be used in silence."""

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:  # optimizers are as configured
        self.given = [list(map(dict, optimizer.param_groups)) for optimizer in trainer.optimizers]
        self.rates = [list(config.scheduler.base_lrs) for config in trainer.lr_scheduler_configs]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:  # the checkpoint's
        for optimizer, given in zip(trainer.optimizers, self.given):
            for group, settings in zip(optimizer.param_groups, given):
                group.update(settings)
        for config, rates in zip(trainer.lr_scheduler_configs, self.rates):
            schedule: Any = config.scheduler
            schedule.base_lrs = rates
            for group, rate, factor in zip(schedule.optimizer.param_groups, rates, schedule.lr_lambdas):
                group["lr"] = rate * factor(schedule.last_epoch)
