"""How good a tokenizer's reconstructions are, over a whole validation set."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.image import StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance

from clipgen.evaluation.features import feature_extractor
from clipgen.models.losses import ddp_batch_size
from clipgen.models.lpips import load_lpips


class ReconstructionMetrics(pl.Callback):
    """Logs ``val/ssim``, and where asked ``val/lpips`` and ``val/rfid``, after each validation of stage 1.

    PSNR, codebook usage, perplexity and dead codes are always there: ``VQGAN`` logs them itself.

    Args:
        ssim: structural similarity (Wang et al. 2004), data range [0, 1].
        lpips: of VGG-16, where the training does not have it in its loss already. vgg_weights: see ``VQGAN``.
        fid_features: the space of rFID, the Frechet distance (arXiv:1706.08500) between the features of all validation
            images and those of their reconstructions; see ``feature_extractor``. None: no rFID.
    """

    def __init__(
        self, ssim: bool = True, lpips: bool = False, vgg_weights: str | None = None, fid_features: str | None = None
    ):
        self.lpips = load_lpips(vgg_weights) if lpips else None
        self.metrics: dict[str, Metric] = {}
        if ssim:
            self.metrics["ssim"] = StructuralSimilarityIndexMeasure(data_range=1.0)
        self.features: str | None = None  # the identity of their space
        if fid_features:
            extractor = feature_extractor(fid_features)
            self.features = extractor.identity
            self.metrics["rfid"] = FrechetInceptionDistance(feature=extractor)

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
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
        self.update(module, batch["images"], outputs)

    def update(self, module: pl.LightningModule, images: Tensor, reconstruction: Tensor) -> None:
        """Take in a batch of images and their reconstructions, both in [-1, 1]."""
        if "ssim" in self.metrics:
            self.metrics["ssim"].update((reconstruction + 1) / 2, (images + 1) / 2)
        if "rfid" in self.metrics:
            self.metrics["rfid"].update(images, real=True)
            self.metrics["rfid"].update(reconstruction, real=False)
        if self.lpips is not None:
            distance = self.lpips.to(images.device)(images, reconstruction).mean()
            module.log("val/lpips", distance, batch_size=ddp_batch_size(len(images)), sync_dist=True)

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            for name, metric in self.metrics.items():
                module.log(f"val/{name}", metric.compute())
