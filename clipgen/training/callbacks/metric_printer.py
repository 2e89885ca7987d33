"""A one-line summary of the metrics after each validation."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl

logger = logging.getLogger(__name__)


class MetricPrinter(pl.Callback):
    """Log all ``val/*`` metrics on one line after each validation.

    Values that look wrong but are normal are explained once.
    """

    def __init__(self) -> None:
        self.explained: set[str] = set()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        values = [f"{name} {value:.4g}" for name, value in trainer.callback_metrics.items() if name.startswith("val/")]
        logger.info("step %d  %s", trainer.global_step, "  ".join(values))
        self.explain_once("EMA", explain_ema(trainer, module))
        self.explain_once("dead codes", explain_dead_codes(module))

    def explain_once(self, topic: str, text: str) -> None:
        """Log an explanation, unless it is empty or its topic has been explained before."""
        if text and topic not in self.explained:
            self.explained.add(topic)
            logger.info("  %s", text)


def explain_ema(trainer: pl.Trainer, module: Any) -> str:
    """Return an explanation of bad metrics in the first steps of a model with EMA weights; "" after these steps."""
    decay = module.optimizer_config.ema_decay
    if not decay:
        return ""
    steps_to_catch_up = round(3 / (1 - decay))
    if trainer.global_step >= steps_to_catch_up:
        return ""
    return (
        f"The values above are of the EMA weights: they average about the last {1 / (1 - decay):.0f} steps, and look "
        f"worse than the training loss until about step {steps_to_catch_up}"
    )


def explain_dead_codes(module: Any) -> str:
    """Return an explanation of dead codes if validation has fewer tokens than the codebook has codes, or ""."""
    counts = getattr(module, "counts", None)
    if counts is None:
        return ""
    num_tokens = int(counts.sum())
    if not 0 < num_tokens < len(counts):
        return ""
    return (
        f"Dead codes and val/codebook_usage are of the validation images alone: their {num_tokens} tokens cannot use "
        f"more than {num_tokens} of the {len(counts)} codes"
    )
