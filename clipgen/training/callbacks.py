"""What people see of a training after each validation: a line and picture grids."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from clipgen.images import code_frequency_chart, grid, save_png, to_pil
from clipgen.pipeline import TextToImage
from clipgen.sampling import SamplingParams
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

logger = logging.getLogger(__name__)


class MetricPrinter(pl.Callback):
    """One line after each validation, for logs and for people."""

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.is_global_zero:
            found = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            logger.info("step %d  %s", trainer.global_step, "  ".join(f"{k} {v:.4g}" for k, v in found.items()))


class ImageLogger(pl.Callback):
    """After each validation, log pictures and write them to ``folder``: in stage 1 reconstructions and how often each
    code is used; in stage 2 samples from the embeddings of validation images and of sentences.

    Args:
        prompts: the sentences of stage 2.
        num_images: how many pictures a grid shows. sampling: see ``SamplingParams``.
    """

    def __init__(
        self,
        folder: str | Path,
        num_images: int = 16,
        prompts: Sequence[str] = (),
        **sampling: Any,
    ):
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        self.folder, self.num_images, self.prompts = Path(folder), num_images, list(prompts)
        self.params = SamplingParams(**sampling)
        self.images: Tensor | None = None

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and "images" in batch:  # a cache has none
            self.images = batch["images"][: self.num_images]

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or self.images is None:
            return
        for name, picture in self.draw(module, self.images).items():
            self.folder.mkdir(parents=True, exist_ok=True)
            save_png(picture, self.folder / f"{name}_{trainer.global_step:07d}.png")
            log_picture(trainer, name, picture)

    @torch.no_grad()
    def draw(self, module: pl.LightningModule, images: Tensor) -> dict[str, Image.Image]:
        """Name -> grid."""
        if isinstance(module, VQGAN):
            pairs = torch.stack([images, module(images)], dim=1).flatten(0, 1)
            title = f"step {module.global_step}, {int((module.counts == 0).sum())} dead codes"
            chart = code_frequency_chart(module.counts, title)
            return {"reconstructions": grid(to_pil(pairs), columns=8), "codebook_usage": chart}
        assert isinstance(module, ConditionalTransformer), type(module)
        vqgan, clip = module.encoders()
        pipe = TextToImage(vqgan, module, clip)
        pairs = torch.stack([images, pipe.generate(clip.encode_image(images), 0, self.params)], dim=1)
        grids = {"from_images": grid(to_pil(pairs.flatten(0, 1)), columns=8)}
        if self.prompts:
            samples = pipe.generate(clip.encode_text(self.prompts), 0, self.params)
            grids["from_texts"] = grid(to_pil(samples), captions=self.prompts)
        return grids


def log_picture(trainer: pl.Trainer, name: str, picture: Image.Image) -> None:
    """Hand a picture to TensorBoard or W&B, where they log."""
    for sink in trainer.loggers:
        if isinstance(sink, TensorBoardLogger):
            sink.experiment.add_image(f"val/{name}", np.asarray(picture), trainer.global_step, dataformats="HWC")
        elif isinstance(sink, WandbLogger):
            sink.log_image(f"val/{name}", [picture], step=trainer.global_step)
