"""Quality of a tokenizer's reconstructions over a complete validation set."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.image import StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance

from clipgen.checkpoint.vgg import load_lpips
from clipgen.evaluation.features import feature_extractor
from clipgen.models.losses import Averages

logger = logging.getLogger(__name__)


class ReconstructionMetrics(pl.Callback):
    """Log ``val/ssim``, and optionally ``val/lpips`` and ``val/rfid``, after each validation of stage 1.

    PSNR, codebook usage, perplexity and dead codes are logged by ``VQGAN`` itself.

    Args:
        ssim: log the structural similarity (Wang et al. 2004), with data range [0, 1].
        lpips: log LPIPS with VGG-16, if it is not already a loss of the training.
        vgg_weights: weights of VGG-16, see ``VQGAN``.
        fid_features: feature space of rFID, the Frechet distance (arXiv:1706.08500) between all validation images and
            their reconstructions; see ``feature_extractor``. None disables rFID.
    """

    def __init__(
        self,
        ssim: bool = True,
        lpips: bool = False,
        vgg_weights: str | None = None,
        fid_features: str | None = None,
    ):
        self.lpips = load_lpips(vgg_weights) if lpips else None
        self.lpips_average = Averages()
        self.metrics: dict[str, Metric] = {}
        self.feature_identity: str | None = None
        if ssim:
            self.metrics["ssim"] = StructuralSimilarityIndexMeasure(data_range=1.0)
        if fid_features:
            extractor = feature_extractor(fid_features)
            self.feature_identity = extractor.identity
            self.metrics["rfid"] = FrechetInceptionDistance(feature=extractor)

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Reset all metrics."""
        self.lpips_average.reset()
        for metric in self.metrics.values():
            metric.to(module.device).reset()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch. ``outputs`` are the reconstructions of its first images; the rest of the batch is padding."""
        if outputs is not None:
            self.update(batch["images"][: len(outputs)], outputs)

    def update(self, images: Tensor, reconstruction: Tensor) -> None:
        """Add a batch of images and their reconstructions, both (B, 3, H, W) in [-1, 1]."""
        if "ssim" in self.metrics:
            self.metrics["ssim"].update((reconstruction + 1) / 2, (images + 1) / 2)
        if "rfid" in self.metrics:
            self.metrics["rfid"].update(images, real=True)
            self.metrics["rfid"].update(reconstruction, real=False)
        if self.lpips is not None:
            distance = self.lpips.to(images.device)(images, reconstruction).mean()
            self.lpips_average.add({"val/lpips": distance}, len(images))

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log the results."""
        module.log_dict(self.lpips_average.compute())
        if trainer.sanity_checking:
            return
        for name, metric in self.metrics.items():
            if name == "rfid" and self.is_too_small(trainer):
                logger.warning("rFID omitted: at least 2 images are needed")
            else:
                module.log(f"val/{name}", metric.compute())

    def is_too_small(self, trainer: pl.Trainer) -> bool:
        """Return whether all ranks together have seen fewer than the two images that a Frechet distance needs."""
        count: Any = self.metrics["rfid"].real_features_num_samples
        return bool(trainer.strategy.reduce(count.clone(), reduce_op="sum") < 2)
