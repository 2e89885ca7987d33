"""What happens beside training: picture grids, checkpoints, a clean stop on Ctrl-C."""

from __future__ import annotations

import csv
import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from clipgen.data.images import unit_hash
from clipgen.images import frequency_chart, grid, save_png, to_pil
from clipgen.pipeline import TextToImage
from clipgen.sampling import check_sampling
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN
from clipgen.weights.checkpoint import whole_file

logger = logging.getLogger(__name__)
SHOWN = ("train/loss", "train/discriminator_loss", "train/cross_entropy", "val/loss", "val/cross_entropy")


def checkpoints(folder: str | Path, monitor: str, every_n_steps: int) -> list[pl.Callback]:
    """``last.ckpt`` every n steps and wherever else it is wanted; ``best.ckpt`` by the lowest ``monitor``."""
    if every_n_steps < 1:
        raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
    best = ModelCheckpoint(folder, "best", monitor, enable_version_counter=False, auto_insert_metric_name=False)
    return [LastCheckpoint(Path(folder) / "last.ckpt", every_n_steps), OwedValidation(), best]


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, beside the old one until then: Lightning writes them in /tmp first,
    and where that is another disk the last step is a copy that can break off."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial, partial.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's own complaint hides what the system said
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None


class LastCheckpoint(pl.Callback):
    """Writes ``last.ckpt`` every n steps, before each validation, and on Ctrl-C or SIGTERM while ``listening``: then
    training stops, after the step or in the validation. A second signal stops at once."""

    def __init__(self, path: Path, every_n_steps: int):
        self.path, self.every_n_steps, self.asked, self.steps = path, every_n_steps, False, -1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals, and give them back: what comes after training is interrupted in the ordinary way."""
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:  # a step may have several batches: their gradients would be lost
            return
        if self.asked or trainer.global_step % self.every_n_steps == 0 or validation_due(trainer):
            trainer.save_checkpoint(self.path, weights_only=False)
        self._stop()

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step != self.steps:
            self._stop()

    def _stop(self) -> None:
        if self.asked:
            raise KeyboardInterrupt


def validation_due(trainer: pl.Trainer) -> bool:
    """Whether a validation belongs to the place where training stands."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


class OwedValidation(pl.Callback):
    """Makes up for a validation that was due where a checkpoint was written and then cut off by a stop: Lightning, when
    it resumes there, takes it for done, and ``best.ckpt`` would be another."""

    def __init__(self) -> None:
        self.validated, self.owed = -1, False  # after so many batches; by what was resumed

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated = trainer.fit_loop.epoch_loop.total_batch_idx

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        at = trainer.fit_loop.epoch_loop.total_batch_idx
        checkpoint["validation_owed"] = validation_due(trainer) and at != self.validated

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.owed = checkpoint.get("validation_owed", False)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.owed:
            loop = trainer.fit_loop.epoch_loop.val_loop
            trainer.validating, loop.restarting, self.owed = True, False, False
            loop.run()
            trainer.training = True


class CSVLogger(pl.loggers.CSVLogger):
    """Lightning's, which would begin ``metrics.csv`` anew: the rows of a resumed run stay, up to where it goes on."""

    def __init__(self, save_dir: str, name: str = "", version: str = ""):
        super().__init__(save_dir, name, version)
        file = Path(self.log_dir) / "metrics.csv"
        self.before = list(csv.DictReader(file.read_text().splitlines())) if file.is_file() else []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        rows = [{k: v for k, v in row.items() if v} for row in self.before if int(row["step"]) < (step or 0)]
        self.experiment.metrics += rows
        self.before = []
        super().log_metrics(metrics, step)


class StepSeeds(pl.Callback):
    """Makes what a step draws (dropout, noise) a function of seed, step and rank: a resumed run draws the same."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        place = f"{self.seed} {trainer.fit_loop.epoch_loop.total_batch_idx} {trainer.global_rank}"
        torch.manual_seed(int(unit_hash(place) * 2**48))


class Bar(RichProgressBar):
    """Rich's bar with rates and time left, and losses as often as they are logged: to read one, a GPU is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, float] = {}

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> Any:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.shown = {k: v.item() for k, v in trainer.callback_metrics.items() if k in SHOWN}
        return self.shown


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
