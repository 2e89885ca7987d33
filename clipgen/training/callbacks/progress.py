"""Progress of training or validation: steps done, rates and the time left."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from clipgen.optim import total_optimizer_steps
from clipgen.progress import ProgressLog, duration

logger = logging.getLogger(__name__)
SHOWN_LOSSES = ("train/loss", "train/discriminator_loss", "train/cross_entropy", "val/loss", "val/cross_entropy")
# Steps after which the time that is left can be estimated.
FORECAST_STEPS = 20


class ProgressReport(pl.Callback):
    """Report the step, the rates, the time left and the losses of a training run.

    Args:
        make_progress: makes what shows them, with the arguments of ``ProgressLog``.
    """

    def __init__(self, make_progress: Callable[..., ProgressLog] = ProgressLog):
        self.make_progress = make_progress
        self.progress: ProgressLog | None = None  # on rank 0 only
        self.losses = ""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        total = total_steps(trainer, module)
        if trainer.is_global_zero:
            known_total = None if math.isinf(total) else total
            self.progress = self.make_progress("training", known_total, "steps", trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Reading a loss waits for the GPU, so losses are read only as often as they are logged.
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.losses = format_losses(trainer)
        if self.progress:
            self.progress.details = self.losses
            self.progress.advance(trainer.global_step - self.progress.done, images_in_batch(batch, trainer))

    def on_validation_start(self, *_: Any) -> None:
        if self.progress:
            self.progress.rename("validating")

    def on_validation_end(self, *_: Any) -> None:
        if self.progress:
            self.progress.rename("training")

    def on_exception(self, *_: Any) -> None:
        # Stop also on Ctrl-C: a bar that is still drawn would hide the cursor.
        self.stop()

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.stop()

    def stop(self) -> None:
        """End the display."""
        if self.progress:
            self.progress.stop()


class ValidationProgress(pl.Callback):
    """Report the images of a validation.

    Args:
        advance: called after each batch with its number of images.
    """

    def __init__(self, advance: Callable[[float], None]):
        self.advance = advance

    def on_validation_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.advance(images_in_batch(batch, trainer))


def log_forecast(steps_left: float, seconds_per_step: float) -> None:
    """Log the time that the rest of a training run will take."""
    logger.info(
        "The remaining %.0f steps will take about %s without validation, judging by the first %d steps",
        steps_left,
        duration(steps_left * seconds_per_step),
        FORECAST_STEPS,
    )


class TimeForecast(pl.Callback):
    """Report once, after the first steps, how long the other steps will take.

    Args:
        report: called on rank 0 with the number of steps left and the seconds per step.
    """

    def __init__(self, report: Callable[[float, float], None] = log_forecast):
        self.report = report
        self.reported = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.first_step = trainer.global_step
        self.total_steps = total_steps(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        steps = trainer.global_step - self.first_step
        if steps <= 1:
            # The first step takes longer, since it compiles and fills caches: measure from its end.
            self.start_time = time.monotonic()
        if steps < FORECAST_STEPS or self.reported or math.isinf(self.total_steps) or not trainer.is_global_zero:
            return
        self.reported = True
        seconds_per_step = (time.monotonic() - self.start_time) / (steps - 1)
        self.report(self.total_steps - trainer.global_step, seconds_per_step)


def images_in_batch(batch: Any, trainer: pl.Trainer) -> int:
    """Return the number of images in the batches of all devices."""
    return len(next(iter(batch.values()))) * trainer.world_size


def format_losses(trainer: pl.Trainer) -> str:
    """Return the current values of the losses that are shown."""
    losses = {name: value for name, value in trainer.callback_metrics.items() if name in SHOWN_LOSSES}
    return "  ".join(f"{name} {value.item():.4g}" for name, value in losses.items())


def total_steps(trainer: pl.Trainer, module: Any) -> float:
    """Return the total number of optimizer steps. Under automatic optimization Lightning counts them itself."""
    grad_accum_steps = 1
    if not module.automatic_optimization and hasattr(module, "optimizer_config"):
        grad_accum_steps = module.optimizer_config.grad_accum_steps
    return total_optimizer_steps(trainer, grad_accum_steps)
