"""What people see of a training: a bar, a line and picture grids after each validation."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor

from clipgen.images import frequency_chart, grid, save_png, to_pil
from clipgen.optim import optimizer_steps
from clipgen.pipeline import TextToImage
from clipgen.sampling import check_sampling
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

logger = logging.getLogger(__name__)
SHOWN = ("train/loss", "train/discriminator_loss", "train/cross_entropy", "val/loss", "val/cross_entropy")


class ProgressReport(pl.Callback):
    """How far training is, with the time left and the losses: a bar in a terminal, elsewhere a line now and then.

    Losses are read as often as they are logged: reading one synchronises with the GPU.

    Args:
        bar: draw a bar. every: seconds from line to line.
    """

    def __init__(self, bar: bool, every: float = 60.0):
        self.every, self.shown = every, ""
        counts = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
        columns = ("{task.description}", *counts, "{task.fields[shown]}")
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not bar)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.total = optimizer_steps(trainer, module.hparams.get("accumulate", 1))
        self.first, self.start = trainer.global_step, time.monotonic()
        self.next_line = self.start + self.every
        total = None if math.isinf(self.total) else self.total
        self.task = self.bar.add_task("training", total=total, completed=self.first, shown="")
        if trainer.is_global_zero:
            millions = sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6
            logger.info("%s, %.1f M parameters to train, on %s", type(module).__name__, millions, module.device)
            self.bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            losses = {k: v for k, v in trainer.callback_metrics.items() if k in SHOWN}
            self.shown = "  ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
        self.bar.update(self.task, completed=trainer.global_step, shown=self.shown)
        if trainer.is_global_zero and self.bar.disable and time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + self.every
            logger.info("step %d%s  %s", trainer.global_step, self.pace(trainer), self.shown)

    def pace(self, trainer: pl.Trainer) -> str:
        """Of how many steps, how many a second (validations included), and the time that the rest takes by them."""
        rate = (trainer.global_step - self.first) / (time.monotonic() - self.start)
        if math.isinf(self.total):
            return f", {rate:.3g} a second"
        left = timedelta(seconds=round((self.total - trainer.global_step) / max(rate, 1e-9)))
        return f" of {self.total:.0f}, {rate:.3g} a second, {left} left"

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.bar.update(self.task, description="validating")

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.bar.update(self.task, description="training")

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.bar.stop()


class Results(pl.Callback):
    """One line after each validation, for logs and for people."""

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.is_global_zero:
            found = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            logger.info("step %d  %s", trainer.global_step, "  ".join(f"{k} {v:.4g}" for k, v in found.items()))


class Pictures(pl.Callback):
    """After each validation, log pictures and write them to ``folder``: in stage 1 reconstructions and how often each
    code is used; in stage 2 samples from the embeddings of validation images and of sentences.

    Args:
        prompts: the sentences of stage 2.
        num_images: how many pictures a grid shows. temperature, top_k, top_p: see ``sampling.draw``.
    """

    def __init__(self, folder: str | Path, num_images: int = 16, prompts: Sequence[str] = (), temperature: float = 1.0,
                 top_k: int = 300, top_p: float = 1.0):  # fmt: skip
        check_sampling(temperature, top_k, top_p)
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        self.folder, self.num_images, self.prompts = Path(folder), num_images, list(prompts)
        self.sampling: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        self.images: Tensor | None = None

    def on_validation_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int,
                                dataloader_idx: int = 0) -> None:  # fmt: skip
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
            chart = frequency_chart(
                module.counts, f"step {module.global_step}, {int((module.counts == 0).sum())} dead codes"
            )
            return {"reconstructions": grid(to_pil(pairs), columns=8), "codebook_usage": chart}
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
