"""The progress bar of a training in a terminal."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from clipgen.training.callbacks.progress import ProgressReport


class ProgressBar(ProgressReport):
    """Draw a bar with the steps done, the rates, the time left and the losses, instead of logging lines."""

    def __init__(self) -> None:
        super().__init__()
        self.bar = Progress(
            "{task.description}",
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            "{task.fields[rates]}  ETA",
            TimeRemainingColumn(),
            "{task.fields[losses]}",
            console=Console(stderr=True),
        )

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().on_train_start(trainer, module)
        total = None if math.isinf(self.pace.total_steps) else self.pace.total_steps
        self.task = self.bar.add_task("training", total=total, completed=self.pace.step, rates="", losses="")
        if trainer.is_global_zero:
            self.bar.start()

    def show_progress(self) -> None:
        self.bar.update(self.task, completed=self.pace.step, rates=self.pace.rates, losses=self.losses)

    def on_validation_start(self, *_: Any) -> None:
        self.describe("validating")

    def on_validation_end(self, *_: Any) -> None:
        self.describe("training")

    def describe(self, activity: str) -> None:
        """Name the current activity; there is no task before training starts."""
        for task in self.bar.task_ids:
            self.bar.update(task, description=activity)

    def on_exception(self, *_: Any) -> None:
        # also on Ctrl-C: a bar that is still drawn would hide the cursor
        self.stop()

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.stop()

    def stop(self) -> None:
        """End the bar; older versions of rich print an empty line for one that was never started."""
        if self.bar.live.is_started:
            self.bar.stop()
