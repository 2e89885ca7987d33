"""When training validates: every so many steps, fewer times if the validation set is large, and at least once."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from clipgen.data.source import count_images

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)
STEPS = 1000  # from one validation to the next
SHARE = 10  # batches of training per batch of validation, at least
FEW = 50  # validation images; a loss over fewer says little


def settle_interval(config: DictConfig) -> bool:
    """Fill in ``trainer.val_check_interval`` where the configuration leaves it open; return whether it did."""
    node = config.trainer
    if node.check_val_every_n_epoch is not None:
        return False
    if isinstance(node.val_check_interval, float):  # a fraction of an epoch
        node.check_val_every_n_epoch = 1
    if node.val_check_interval is not None:
        return False
    node.val_check_interval = STEPS
    return True


def scale_interval(config: DictConfig, trainer: pl.Trainer, data: Any) -> None:
    """Validate every 1000 steps, or less often where validation would take more than a tenth of the batches."""
    count = count_images(data.val)
    images = count.images if count else 0
    batches = math.ceil(images / (config.data.batch_size * trainer.world_size))
    interval = max(STEPS * accumulation(config), math.ceil(SHARE * batches / STEPS) * STEPS)
    trainer.val_check_interval = config.trainer.val_check_interval = interval  # type: ignore[attr-defined]


def warn_of_few_images(data: Any) -> None:
    """Warn if there are so few validation images that their loss says little about which model is best."""
    count = count_images(data.val)
    if count is None or count.images >= FEW:
        return
    number = f"{count.images} image{'s' * (count.images != 1)}"
    logger.warning(
        "Validation has %s: with fewer than %d its losses are noise, and so is the choice of best.ckpt. "
        "Hold out more by data.val_fraction, or name more by data.val_root or data.val_urls.",
        number,
        FEW,
    )


def accumulation(config: DictConfig) -> int:
    """Return how many batches make one optimizer step."""
    return int(config.model.optimizer.grad_accum_steps)
