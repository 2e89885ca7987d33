"""How far a training is: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import math
import time
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from clipgen.optim import total_optimizer_steps

logger = logging.getLogger(__name__)
SHOWN = ("train/loss", "train/discriminator_loss", "train/cross_entropy", "val/loss", "val/cross_entropy")


class ProgressReport(pl.Callback):
    """Steps done, the time left and the losses.

    Losses are read as often as they are logged: reading one synchronises with the GPU.

    Args:
        bar: draw a bar. every: seconds from line to line.
    """

    def __init__(self, bar: bool, every: float = 60.0):
        self.every, self.shown = every, ""
        counts = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
        columns = ("{task.description}", *counts, "{task.fields[shown]}")
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not bar)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        config = getattr(module, "optimizer_config", None)
        # Under automatic optimization Lightning counts optimizer steps itself.
        grad_accum_steps = 1 if module.automatic_optimization or config is None else config.grad_accum_steps
        self.total = total_optimizer_steps(trainer, grad_accum_steps)
        self.first, self.start = trainer.global_step, time.monotonic()
        self.next_line = self.start + self.every
        total = None if math.isinf(self.total) else self.total
        self.task = self.bar.add_task("training", total=total, completed=self.first, shown="")
        if trainer.is_global_zero:
            millions = sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6
            logger.info("%s, %.1f M parameters to train, on %s", type(module).__name__, millions, module.device)
            self.bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            losses = {k: v for k, v in trainer.callback_metrics.items() if k in SHOWN}
            self.shown = "  ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
        self.bar.update(self.task, completed=trainer.global_step, shown=self.shown)
        if trainer.is_global_zero and self.bar.disable and time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + self.every
            logger.info("step %d%s  %s", trainer.global_step, self.pace(trainer), self.shown)

    def pace(self, trainer: pl.Trainer) -> str:
        """Of how many steps, how many a second (validations included), and the time that the rest takes by them."""
        rate = (trainer.global_step - self.first) / (time.monotonic() - self.start)
        if math.isinf(self.total):
            return f", {rate:.3g} a second"
        left = timedelta(seconds=round((self.total - trainer.global_step) / max(rate, 1e-9)))
        return f" of {self.total:.0f}, {rate:.3g} a second, {left} left"

    def on_validation_start(self, *_: Any) -> None:
        for task in self.bar.task_ids:  # none before training begins
            self.bar.update(task, description="validating")

    def on_validation_end(self, *_: Any) -> None:
        for task in self.bar.task_ids:
            self.bar.update(task, description="training")

    def on_exception(self, *_: Any) -> None:  # a Ctrl-C too; a bar that goes on would keep the cursor
        self._stop()

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if not self.bar.disable:  # older versions of rich end what never began with an empty line
            self.bar.stop()
