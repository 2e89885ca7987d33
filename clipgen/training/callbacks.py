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

from clipgen.clip import FrozenCLIP
from clipgen.data.samplers import num_real_samples
from clipgen.generation.generator import ImageGenerator
from clipgen.images import save_png, to_pil
from clipgen.run_folder import load_clip
from clipgen.sampling import SamplingParams
from clipgen.transformer import ConditionalTransformer
from clipgen.visualization import code_frequency_chart, grid
from clipgen.vqgan import VQGAN

logger = logging.getLogger(__name__)


class MetricPrinter(pl.Callback):
    """Log the size of a step before training, and all ``val/*`` metrics on one line after each validation.

    What looks broken and is not is explained once.
    """

    def __init__(self) -> None:
        self.said: set[str] = set()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        batch_size = getattr(trainer.train_dataloader, "batch_size", None)
        if trainer.is_global_zero and batch_size:
            config: Any = getattr(module, "optimizer_config", None)
            accumulate = max(trainer.accumulate_grad_batches, config.grad_accum_steps if config else 1)
            logger.info("%s", describe_step(batch_size, trainer.world_size, accumulate))

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.is_global_zero:
            found = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            logger.info("step %d  %s", trainer.global_step, "  ".join(f"{k} {v:.4g}" for k, v in found.items()))
            for remark in (lagging_average(trainer, module), few_tokens(module)):
                if remark and remark.split(":")[0] not in self.said:
                    self.said.add(remark.split(":")[0])
                    logger.info("  %s", remark)


def lagging_average(trainer: pl.Trainer, module: Any) -> str:
    """Return why validation looks bad in the first steps of a model with EMA weights, else ""."""
    decay = module.hparams.get("ema_decay", 0)
    horizon = round(3 / (1 - decay)) if decay else 0
    if trainer.global_step >= horizon:
        return ""
    return (
        f"The values above are of the EMA weights: they average about the last {1 / (1 - decay):.0f} steps, and look "
        f"worse than the training loss until about step {horizon}"
    )


def few_tokens(module: Any) -> str:
    """Return why codes look dead where validation has fewer tokens than the codebook has codes, else ""."""
    counts = getattr(module, "counts", None)
    if counts is None or not 0 < (tokens := int(counts.sum())) < len(counts):
        return ""
    return (
        f"Dead codes and val/codebook_usage are of the validation images alone: their {tokens} tokens cannot use more "
        f"than {tokens} of the {len(counts)} codes"
    )


class FinalValidation(pl.Callback):
    """Validate at the end of a training that was too short for its first validation: it then has a grid and a
    ``best.ckpt`` like every other."""

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        best: Any = trainer.checkpoint_callback
        if best is None or best.best_model_path or not trainer.enable_validation:
            return
        loop = trainer.fit_loop.epoch_loop.val_loop
        trainer.validating, loop.restarting = True, False
        loop.run()
        trainer.training = True


def describe_step(batch_size: int, devices: int, accumulate: int) -> str:
    """Return the number of images per optimizer step, and on several devices what the settings of a recipe mean."""
    each = f"data.batch_size={batch_size} per device"
    factors = f"{each}, {devices} device{'s' * (devices != 1)}, {accumulate} batch{'es' * (accumulate != 1)} per step"
    text = f"{batch_size * devices * accumulate} images per optimizer step: {factors}"
    if devices == 1:
        return text
    return (
        f"{text}. Steps and validation intervals are counted as on one device, so {devices} devices see {devices} "
        "times as many images in them, and an epoch of a folder has fewer steps; model.learning_rate is not scaled. "
        f"For the steps of a recipe divide data.batch_size by {devices}"
    )


class ImageLogger(pl.Callback):
    """After each validation, log pictures and write them to ``folder``: in stage 1 reconstructions and how often each
    code is used; in stage 2 samples from the embeddings of validation images and of sentences.

    Args:
        folder: ``pictures`` of a run folder, which has the frozen models where a training from a cache does not.
        num_images: number of pictures in a grid.
        prompts: the sentences of stage 2.
        keep: number of grids of each kind that stay in the folder; older ones are deleted.
        sampling: see ``SamplingParams``.
    """

    def __init__(
        self,
        folder: str | Path,
        num_images: int = 16,
        prompts: Sequence[str] = (),
        keep: int = 20,
        **sampling: Any,
    ):
        for key, value in (("num_images", num_images), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
        self.folder = Path(folder)
        self.num_images = num_images
        self.prompts = list(prompts)
        self.keep = keep
        self.params = SamplingParams(**sampling)
        self.batch: dict[str, Tensor] = {}
        self.frozen: tuple[VQGAN, FrozenCLIP | None] | None = None

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self.params.uses_guidance or not isinstance(module, ConditionalTransformer):
            return
        if not module.conditioning_config.drop_prob:
            raise ValueError(
                "image_logger.guidance_scale must be 1 for a model without model.conditioning.drop_prob, "
                f"got {self.params.guidance_scale}"
            )

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0:
            rows = min(num_real_samples(trainer, batch_idx, self.num_images), self.num_images)
            names = ("images", "indices", "condition")
            self.batch = {name: batch[name][:rows] for name in names if name in batch}

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or not self.batch:
            return
        for name, picture in self.draw(module, self.batch).items():
            self.folder.mkdir(parents=True, exist_ok=True)
            save_png(picture, self.folder / f"{name}_{trainer.global_step:07d}.png")
            log_picture(trainer, name, picture)
            for old in sorted(self.folder.glob(f"{name}_*.png"))[: -self.keep]:
                old.unlink(missing_ok=True)

    @torch.no_grad()
    def draw(self, module: pl.LightningModule, batch: dict[str, Tensor]) -> dict[str, Image.Image]:
        """Return grids by name, for a batch of images, or of indices and embeddings from a cache."""
        if isinstance(module, VQGAN):
            return self._draw_reconstructions(module, batch["images"])
        assert isinstance(module, ConditionalTransformer), type(module)
        vqgan, clip = self._frozen_models(module)
        if vqgan is None:
            return {}
        generator = ImageGenerator(vqgan, module)
        if "images" in batch and clip is not None:
            images, conditions = batch["images"], clip.encode_image(batch["images"])
        else:
            images, conditions = generator.decode(batch["indices"]), batch["condition"]
        pairs = torch.stack([images, self._samples(generator, conditions)], dim=1)
        grids = {"from_images": grid(to_pil(pairs.flatten(0, 1)), columns=8)}
        if self.prompts and clip is not None:
            samples = self._samples(generator, clip.encode_text(self.prompts))
            grids["from_texts"] = grid(to_pil(samples), captions=self.prompts)
        return grids

    def _draw_reconstructions(self, module: VQGAN, images: Tensor) -> dict[str, Image.Image]:
        pairs = torch.stack([images, module(images)], dim=1).flatten(0, 1)
        title = f"step {module.global_step}, {int((module.counts == 0).sum())} dead codes"
        chart = code_frequency_chart(module.counts, title)
        return {"reconstructions": grid(to_pil(pairs), columns=8), "codebook_usage": chart}

    def _samples(self, generator: ImageGenerator, conditions: Tensor) -> Tensor:
        """Generate an image for each condition, from the same seeds after each validation."""
        uniforms = generator.uniforms(0, len(conditions))
        return generator.generate_from_conditions(conditions, uniforms, self.params)

    def _frozen_models(self, module: ConditionalTransformer) -> tuple[VQGAN | None, FrozenCLIP | None]:
        """Return the models that the transformer trains with; else those of the run folder, where it has them.

        Without the CLIP there are no prompts: for a transformer of classes, and where it cannot be loaded.
        """
        if module.has_encoders:
            return module.encoders()
        root = self.folder.parent
        if self.frozen is None:
            if not (root / "vqgan").is_dir():
                logger.warning("No pictures: the model has no tokenizer attached, and %s holds none.", root)
                return None, None
            with torch.random.fork_rng(devices=[]):  # training does not notice
                wants_clip = self.prompts and "class_names" not in module.hparams
                self.frozen = VQGAN.load(root / "vqgan"), try_load_clip(root) if wants_clip else None
        vqgan, clip = self.frozen
        return vqgan.to(module.device), None if clip is None else clip.to(module.device)


def try_load_clip(root: Path) -> FrozenCLIP | None:
    """Load the CLIP of a run folder; a training from a cache continues without it."""
    try:
        return load_clip(root)
    except (OSError, ValueError, RuntimeError) as error:
        logger.warning("No pictures of prompts: the CLIP could not be loaded (%s).", error)
        return None


def log_picture(trainer: pl.Trainer, name: str, picture: Image.Image) -> None:
    """Hand a picture to TensorBoard or W&B, where they log."""
    for sink in trainer.loggers:
        if isinstance(sink, TensorBoardLogger):
            sink.experiment.add_image(f"val/{name}", np.asarray(picture), trainer.global_step, dataformats="HWC")
        elif isinstance(sink, WandbLogger):
            sink.log_image(f"val/{name}", [picture], step=trainer.global_step)
