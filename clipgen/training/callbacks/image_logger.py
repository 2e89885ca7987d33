"""Image grids after each validation: reconstructions in stage 1, samples in stage 2."""

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
from clipgen.frozen_models import load_clip
from clipgen.generation.generator import ImageGenerator
from clipgen.generation.modality_gap import load_projector
from clipgen.images import save_png, to_pil
from clipgen.models.conditioning import Conditioner
from clipgen.sampling_params import SamplingParams
from clipgen.transformer import ConditionalTransformer
from clipgen.visualization import code_frequency_chart, grid
from clipgen.vqgan import VQGAN

logger = logging.getLogger(__name__)
BATCH_KEYS = ("images", "indices", "condition")


class ImageLogger(pl.Callback):
    """Log image grids after each validation and write them to a folder.

    Stage 1 logs reconstructions and a chart of the frequency of each code. Stage 2 logs samples conditioned on
    validation images and on prompts.

    Args:
        folder: ``grids`` in a run folder. A training run from a token cache loads the frozen models of the run folder.
        num_images: number of images in a grid.
        prompts: prompts of stage 2.
        keep: number of grids of each kind that stay in the folder; older ones are deleted.
        overrides: sampling parameters that differ from the defaults of ``SamplingParams``.
    """

    def __init__(
        self,
        folder: str | Path,
        num_images: int = 16,
        prompts: Sequence[str] = (),
        keep: int = 20,
        **overrides: Any,
    ):
        for name, value in (("num_images", num_images), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.folder = Path(folder)
        self.num_images = num_images
        self.prompts = list(prompts)
        self.keep = keep
        self.params = SamplingParams(**overrides)
        self.batch: dict[str, Tensor] = {}
        self.frozen_models: tuple[VQGAN, Conditioner | None] | None = None

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
            count = min(num_real_samples(trainer, batch_idx, self.num_images), self.num_images)
            self.batch = {name: batch[name][:count] for name in BATCH_KEYS if name in batch}

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or not self.batch:
            return
        for name, image in self.make_grids(module, self.batch).items():
            self.write(image, name, trainer.global_step)
            log_image(trainer, name, image)

    def write(self, image: Image.Image, name: str, step: int) -> None:
        """Write a grid, and delete the oldest ones of its kind."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_png(image, self.folder / f"{name}_{step:07d}.png")
        for old in sorted(self.folder.glob(f"{name}_*.png"))[: -self.keep]:
            old.unlink(missing_ok=True)

    @torch.no_grad()
    def make_grids(self, module: pl.LightningModule, batch: dict[str, Tensor]) -> dict[str, Image.Image]:
        """Return grids by name, for a batch of images, or of indices and conditions from a token cache."""
        if isinstance(module, VQGAN):
            return self._reconstruction_grids(module, batch["images"])
        assert isinstance(module, ConditionalTransformer), type(module)
        vqgan, clip = self._find_frozen_models(module)
        if vqgan is None:
            return {}
        generator = ImageGenerator(vqgan, module)
        if "images" in batch and clip is not None:
            images = batch["images"]
            conditions = clip.encode_image(images)
        else:
            images = generator.decode(batch["indices"])
            conditions = batch["condition"]
        pairs = torch.stack([images, self._generate(generator, conditions)], dim=1)
        grids = {"from_images": grid(to_pil(pairs.flatten(0, 1)), columns=8)}
        if self.prompts and clip is not None:
            generated = self._generate(generator, self._embed_prompts(clip))
            grids["from_texts"] = grid(to_pil(generated), captions=self.prompts)
        return grids

    def _reconstruction_grids(self, module: VQGAN, images: Tensor) -> dict[str, Image.Image]:
        """Return images next to their reconstructions, and a chart of the frequency of each code."""
        pairs = torch.stack([images, module(images)], dim=1).flatten(0, 1)
        title = f"step {module.global_step}, {int((module.counts == 0).sum())} dead codes"
        chart = code_frequency_chart(module.counts, title)
        return {"reconstructions": grid(to_pil(pairs), columns=8), "codebook_usage": chart}

    def _embed_prompts(self, clip: Conditioner) -> Tensor:
        """Return the embeddings of the prompts, moved by the projector of the run folder if it has one."""
        embeddings = clip.encode_text(self.prompts)
        projector = load_projector(self.folder.parent)
        return embeddings if projector is None else projector.to(embeddings.device)(embeddings)

    def _generate(self, generator: ImageGenerator, conditions: Tensor) -> Tensor:
        """Generate an image for each condition, from the same seeds after each validation."""
        uniforms = generator.uniforms(0, len(conditions))
        return generator.generate_from_conditions(conditions, uniforms, self.params)

    def _find_frozen_models(self, module: ConditionalTransformer) -> tuple[VQGAN | None, Conditioner | None]:
        """Return the models that the transformer trains with, or else those in the run folder, if it has them.

        The CLIP is None without prompts, for a class-conditional transformer, and if it cannot be loaded.
        """
        if module.has_encoders:
            return module.encoders()
        if self.frozen_models is None:
            self.frozen_models = self._load_frozen_models("class_names" not in module.hparams)
        if self.frozen_models is None:
            return None, None
        vqgan, clip = self.frozen_models
        return vqgan.to(module.device), None if clip is None else clip.to(module.device)

    def _load_frozen_models(self, supports_prompts: bool) -> tuple[VQGAN, Conditioner | None] | None:
        """Load the tokenizer and, for prompts, the CLIP of the run folder; return None if it has no tokenizer."""
        root = self.folder.parent
        if not (root / "vqgan").is_dir():
            logger.warning("No image grids: the model has no tokenizer attached, and %s contains none.", root)
            return None
        # Loading must not change the random numbers of the training.
        with torch.random.fork_rng(devices=[]):
            clip = try_load_clip(root) if self.prompts and supports_prompts else None
            return VQGAN.load(root / "vqgan"), clip


def try_load_clip(root: Path) -> FrozenCLIP | None:
    """Load the CLIP of a run folder; a training run from a token cache continues without it."""
    try:
        return load_clip(root)
    except (OSError, ValueError, RuntimeError) as error:
        logger.warning("No images of the prompts: the CLIP could not be loaded (%s).", error)
        return None


def log_image(trainer: pl.Trainer, name: str, image: Image.Image) -> None:
    """Send an image to TensorBoard and Weights & Biases, if they are in use."""
    for target in trainer.loggers:
        if isinstance(target, TensorBoardLogger):
            target.experiment.add_image(f"val/{name}", np.asarray(image), trainer.global_step, dataformats="HWC")
        elif isinstance(target, WandbLogger):
            target.log_image(f"val/{name}", [image], step=trainer.global_step)
