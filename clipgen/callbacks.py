"""What happens beside training: picture grids, checkpoints, a clean stop on Ctrl-C."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from clipgen.images import grid, save_png, to_pil
from clipgen.pipeline import TextToImage
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

logger = logging.getLogger(__name__)


def checkpoints(folder: str | Path, monitor: str, every_n_steps: int) -> list[ModelCheckpoint]:
    """``last.ckpt`` every n steps and at the end; ``best.ckpt`` by the lowest ``monitor``."""
    common: dict[str, Any] = dict(dirpath=folder, enable_version_counter=False, auto_insert_metric_name=False)
    last = ModelCheckpoint(filename="last", every_n_train_steps=every_n_steps, save_on_train_epoch_end=False, **common)
    return [last, ModelCheckpoint(filename="best", monitor=monitor, mode="min", **common)]


class StopCleanly(pl.Callback):
    """On Ctrl-C or SIGTERM: finish the step, save ``last.ckpt``, stop. A second Ctrl-C stops at once."""

    def __init__(self, checkpoint: str | Path):
        self.checkpoint, self.asked = Path(checkpoint), False

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.asked:
            trainer.save_checkpoint(self.checkpoint, weights_only=False)
            raise KeyboardInterrupt

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.asked:
            if trainer.global_step:
                trainer.save_checkpoint(self.checkpoint, weights_only=False)
            raise KeyboardInterrupt


class Bar(RichProgressBar):
    """Rich's bar with rates and time left, without Lightning's version number."""

    def get_metrics(self, *args: Any) -> Any:
        return {name: value for name, value in super().get_metrics(*args).items() if name != "v_num"}


class Results(pl.Callback):
    """One line after each validation, for logs and for people."""

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.is_global_zero:
            found = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            logger.info("step %d  %s", trainer.global_step, "  ".join(f"{k} {v:.4g}" for k, v in found.items()))


class Pictures(pl.Callback):
    """After each validation, log a grid and write it to ``folder``: reconstructions in stage 1; in stage 2 samples from
    the embeddings of validation images and of sentences.

    Args:
        prompts: the sentences of stage 2.
        num_images: how many pictures a grid shows.
    """

    def __init__(self, folder: str | Path, prompts: Sequence[str] = (), num_images: int = 16, **sampling: Any):
        self.folder, self.prompts, self.num_images, self.sampling = Path(folder), list(prompts), num_images, sampling
        self.images: Tensor | None = None

    def on_validation_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int,
                                dataloader_idx: int = 0) -> None:  # fmt: skip
        if batch_idx == 0:
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
            return {"reconstructions": grid(to_pil(pairs), columns=8)}
        assert isinstance(module, ConditionalTransformer), type(module)
        pipe = TextToImage(*module.frozen()[:1], module, module.frozen()[1])
        pairs = torch.stack([images, pipe.generate(pipe.clip.encode_image(images), 0, **self.sampling)], dim=1)
        grids = {"from_images": grid(to_pil(pairs.flatten(0, 1)), columns=8)}
        if self.prompts:
            samples = pipe.generate(pipe.clip.encode_text(self.prompts), 0, **self.sampling)
            grids["from_texts"] = grid(to_pil(samples), captions=self.prompts)
        return grids


def log_picture(trainer: pl.Trainer, name: str, picture: Image.Image) -> None:
    """Hand a picture to TensorBoard or W&B, where they log."""
    for sink in trainer.loggers:
        if isinstance(sink, TensorBoardLogger):
            sink.experiment.add_image(f"val/{name}", np.asarray(picture), trainer.global_step, dataformats="HWC")
        elif isinstance(sink, WandbLogger):
            sink.log_image(f"val/{name}", [picture], step=trainer.global_step)
