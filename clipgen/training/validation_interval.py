"""Choose the interval of validations in training: every 1000 steps, or less often if the validation set is large."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from clipgen.data.source import count_images

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from clipgen.training.config import TrainingConfig

logger = logging.getLogger(__name__)
DEFAULT_INTERVAL = 1000  # steps between two validations
MIN_BATCH_RATIO = 10  # training batches per validation batch, at least
MIN_VALIDATION_IMAGES = 50  # with fewer, the validation loss is noise


def set_default_interval(config: TrainingConfig) -> bool:
    """Fill in ``trainer.val_check_interval`` if the configuration leaves it open; return whether it did."""
    trainer = config.trainer
    if trainer["check_val_every_n_epoch"] is not None:
        return False
    if isinstance(trainer["val_check_interval"], float):
        # Lightning accepts a fraction of an epoch only together with this setting.
        trainer["check_val_every_n_epoch"] = 1
    if trainer["val_check_interval"] is not None:
        return False
    trainer["val_check_interval"] = DEFAULT_INTERVAL
    return True


def scale_interval(config: TrainingConfig, world_size: int, data: Any) -> None:
    """Set the interval to 1000 steps, or more if validation would otherwise take more than a tenth of the batches."""
    count = count_images(data.val)
    images = count.images if count else 0
    batches = math.ceil(images / (data.batch_size * world_size))
    steps = MIN_BATCH_RATIO * batches / config.grad_accum_steps
    config.trainer["val_check_interval"] = max(math.ceil(steps / DEFAULT_INTERVAL), 1) * DEFAULT_INTERVAL


def convert_interval(config: TrainingConfig, trainer: pl.Trainer) -> None:
    """Pass an interval in optimizer steps to Lightning, which counts batches; a fraction of an epoch stays as it is."""
    steps = config.trainer["val_check_interval"]
    if isinstance(steps, int):
        trainer.val_check_interval = steps * config.grad_accum_steps  # type: ignore[attr-defined]


def warn_of_few_images(data: Any) -> None:
    """Warn if there is no validation, or so few images that their loss says little about which model is best."""
    if data.val is None:
        logger.warning(
            "There is no validation: no image grids, no best.ckpt; the last checkpoint becomes the model. "
            "Hold out images by data.val_fraction, data.val_root or data.val_urls."
        )
        return
    count = count_images(data.val)
    if count is None or count.images >= MIN_VALIDATION_IMAGES:
        return
    number = "1 image" if count.images == 1 else f"{count.images} images"
    logger.warning(
        "Validation has %s: with fewer than %d its losses are noise, and so is the choice of best.ckpt. "
        "Increase data.val_fraction, or name more images by data.val_root or data.val_urls.",
        number,
        MIN_VALIDATION_IMAGES,
    )
