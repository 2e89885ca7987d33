"""How far a training is: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from clipgen.optim import total_optimizer_steps

logger = logging.getLogger(__name__)
SHOWN = ("train/loss", "train/discriminator_loss", "train/cross_entropy", "val/loss", "val/cross_entropy")


WARM = 20  # steps after which the rate is known; the first is not counted: it compiles and fills caches


class Pace:
    """Count the steps and images of a training, and derive rates and the time left from them."""

    def __init__(self, first: int, total: float):
        self.first, self.total, self.step, self.images = first, total, first, 0.0
        self.start = self.second = time.monotonic()

    def advance(self, step: int, images: float) -> None:
        """Count a batch; ``step`` is the number of optimizer steps so far."""
        self.step, self.images = step, self.images + images
        if step <= self.first + 1:
            self.second = time.monotonic()

    @property
    def steps_per_second(self) -> float:
        """Return the rate since the start, validations included."""
        return (self.step - self.first) / max(time.monotonic() - self.start, 1e-9)

    @property
    def images_per_second(self) -> float:
        """Return the images per second since the start."""
        return self.images / max(time.monotonic() - self.start, 1e-9)

    @property
    def seconds_per_step(self) -> float:
        """Return the seconds per step without the first, for forecasts."""
        return (time.monotonic() - self.second) / max(self.step - self.first - 1, 1)

    def __str__(self) -> str:
        rates = f"{self.steps_per_second:.3g} it/s, {self.images_per_second:.3g} img/s"
        if math.isinf(self.total):
            return f", {rates}"
        left = duration((self.total - self.step) / max(self.steps_per_second, 1e-9))
        return f" of {self.total:.0f}, {rates}, ETA {left}"


def duration(seconds: float) -> str:
    """Return a time as 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


def images_in(batch: Any, trainer: pl.Trainer) -> int:
    """Return the images of a batch on all devices."""
    return len(next(iter(batch.values()))) * trainer.world_size


class ProgressReport(pl.Callback):
    """Steps done, rates, the time left and the losses.

    Losses are read as often as they are logged: reading one synchronises with the GPU.

    Args:
        bar: draw a bar. every: seconds from line to line.
    """

    def __init__(self, bar: bool, every: float = 60.0):
        self.every, self.shown = every, ""
        counts = (BarColumn(bar_width=20), MofNCompleteColumn(), "{task.fields[rate]}  ETA", TimeRemainingColumn())
        columns = ("{task.description}", *counts, "{task.fields[shown]}")
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not bar)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.total = steps_to_train(trainer, module)
        self.pace = Pace(trainer.global_step, self.total)
        self.next_line, self.forecast = time.monotonic() + self.every, False
        total = None if math.isinf(self.total) else self.total
        self.task = self.bar.add_task("training", total=total, completed=trainer.global_step, shown="", rate="")
        if trainer.is_global_zero:
            millions = sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6
            logger.info("%s, %.1f M parameters to train, on %s", type(module).__name__, millions, module.device)
            self.bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.pace.advance(trainer.global_step, images_in(batch, trainer))
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            losses = {k: v for k, v in trainer.callback_metrics.items() if k in SHOWN}
            self.shown = "  ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
        rate = f"{self.pace.steps_per_second:.3g} it/s  {self.pace.images_per_second:.3g} img/s"
        self.bar.update(self.task, completed=trainer.global_step, shown=self.shown, rate=rate)
        if not trainer.is_global_zero:
            return
        if not self.forecast and trainer.global_step >= self.pace.first + WARM:
            self.forecast = True
            self.tell_time()
        if self.bar.disable and time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + self.every
            logger.info("step %d%s  %s", trainer.global_step, self.pace, self.shown)

    def tell_time(self) -> None:
        """Log how long the rest will take, by the first steps."""
        if math.isinf(self.total):
            return
        left = self.total - self.pace.step
        time_left = duration(left * self.pace.seconds_per_step)
        logger.info("After %d steps: the other %.0f will take about %s, without validation", WARM, left, time_left)

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


class TotalTime(pl.Callback):
    """Tell, after the first steps of a stage, how long it and those after it will take.

    Args:
        later: what is still to come, as steps of this stage.
        tell: called with the seconds left in this stage and in all.
    """

    def __init__(self, later: float, tell: Callable[[float, float], None]):
        self.later, self.tell, self.told = later, tell, False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.pace = Pace(trainer.global_step, steps_to_train(trainer, module))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.pace.advance(trainer.global_step, images_in(batch, trainer))
        if not self.told and trainer.global_step >= self.pace.first + WARM:
            self.told = True
            left = self.pace.total - self.pace.step
            each = self.pace.seconds_per_step
            self.tell(left * each, (left + self.later) * each)


def steps_to_train(trainer: pl.Trainer, module: Any) -> float:
    """Return the total number of optimizer steps. Under automatic optimization Lightning counts them itself."""
    config = getattr(module, "optimizer_config", None)
    manual = not module.automatic_optimization and config is not None
    return total_optimizer_steps(trainer, config.grad_accum_steps if manual else 1)
