"""Progress of a training: steps done, rates and the time left."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl

from clipgen.optim import total_optimizer_steps

logger = logging.getLogger(__name__)
SHOWN_LOSSES = ("train/loss", "train/discriminator_loss", "train/cross_entropy", "val/loss", "val/cross_entropy")
# Steps after which the time that is left can be estimated
FORECAST_STEPS = 20


class Pace:
    """Count the steps and images of a training, and derive rates and the time left from them.

    Args:
        first_step: the step at which the training starts or resumes.
        total_steps: the step at which it ends; infinite if there is no end.
    """

    def __init__(self, first_step: int, total_steps: float):
        self.first_step = first_step
        self.total_steps = total_steps
        self.step = first_step
        self.images = 0
        self.start_time = time.monotonic()
        # when the first step was done, which takes longer: it compiles and fills caches
        self.second_step_time = self.start_time

    def advance(self, step: int, images: int) -> None:
        """Count a batch; ``step`` is the number of optimizer steps so far."""
        self.step = step
        self.images += images
        if step <= self.first_step + 1:
            self.second_step_time = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start, validations included."""
        return max(time.monotonic() - self.start_time, 1e-9)

    @property
    def rates(self) -> str:
        """Steps and images per second since the start."""
        steps = self.step - self.first_step
        return f"{steps / self.seconds:.3g} it/s, {self.images / self.seconds:.3g} img/s"

    @property
    def can_forecast(self) -> bool:
        """True if enough steps are done to estimate the time left."""
        return self.step >= self.first_step + FORECAST_STEPS

    @property
    def steps_left(self) -> float:
        """Steps until the end; infinite if there is no end."""
        return self.total_steps - self.step

    @property
    def seconds_per_step(self) -> float:
        """Seconds per step without the first step, for forecasts."""
        return (time.monotonic() - self.second_step_time) / max(self.step - self.first_step - 1, 1)

    def __str__(self) -> str:
        if math.isinf(self.total_steps):
            return f"step {self.step}, {self.rates}"
        steps = max(self.step - self.first_step, 1e-9)
        eta = duration(self.steps_left * self.seconds / steps)
        return f"step {self.step} of {self.total_steps:.0f}, {self.rates}, ETA {eta}"


def duration(seconds: float) -> str:
    """Return a time as in 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


def images_in_batch(batch: Any, trainer: pl.Trainer) -> int:
    """Return the number of images in the batches of all devices."""
    return len(next(iter(batch.values()))) * trainer.world_size


class ProgressReport(pl.Callback):
    """Log the step, the rates, the time left and the losses at a fixed interval.

    Args:
        interval: seconds between two lines.
    """

    def __init__(self, interval: float = 60.0):
        self.interval = interval
        self.losses = ""
        self.forecast_logged = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.pace = Pace(trainer.global_step, total_steps(trainer, module))
        self.next_line = time.monotonic() + self.interval

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.pace.advance(trainer.global_step, images_in_batch(batch, trainer))
        # reading a loss waits for the GPU, so losses are read only as often as they are logged
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.losses = format_losses(trainer)
        if trainer.is_global_zero:
            self.log_forecast()
            self.show_progress()

    def show_progress(self) -> None:
        """Log a line, if it is time for one."""
        if time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + self.interval
            logger.info("%s  %s", str(self.pace), self.losses)

    def log_forecast(self) -> None:
        """After the first steps, log once how long the others will take."""
        if self.forecast_logged or not self.pace.can_forecast or math.isinf(self.pace.total_steps):
            return
        self.forecast_logged = True
        steps_left = self.pace.steps_left
        time_left = duration(steps_left * self.pace.seconds_per_step)
        logger.info(
            "The remaining %.0f steps will take about %s without validation, judging by the first %d steps",
            steps_left,
            time_left,
            FORECAST_STEPS,
        )


class TimeForecast(pl.Callback):
    """Report, after the first steps of a stage, how long this stage and later stages will take.

    Args:
        later_steps: cost of the later stages, in steps of this one.
        report: called with the seconds left in this stage and in all stages.
    """

    def __init__(self, later_steps: float, report: Callable[[float, float], None]):
        self.later_steps = later_steps
        self.report = report
        self.reported = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.pace = Pace(trainer.global_step, total_steps(trainer, module))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.pace.advance(trainer.global_step, images_in_batch(batch, trainer))
        if self.reported or not self.pace.can_forecast:
            return
        self.reported = True
        steps_left = self.pace.steps_left
        seconds_per_step = self.pace.seconds_per_step
        self.report(steps_left * seconds_per_step, (steps_left + self.later_steps) * seconds_per_step)


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
