"""The class-conditional transformer: stage 2 conditioned on an image's class instead of its CLIP embedding.

This is the row "VQGAN + label conditioned Transformer" of CLIP-GEN's Table 3 (after arXiv:2012.09841). It knows the
classes of its training images, and no other words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.checkpoint import model_folder
from clipgen.frozen_models import run_folder
from clipgen.generation.default_params import load_params
from clipgen.generation.generator import ImageGenerator
from clipgen.models.config import ClipLossConfig, ConditioningConfig, as_config
from clipgen.sampling_params import SamplingParams, resolve_params
from clipgen.tokenizer_identity import check_tokenizer
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

if TYPE_CHECKING:
    from typing_extensions import Self


class ClassConditionalTransformer(ConditionalTransformer):
    """``ConditionalTransformer`` whose condition is a one-hot class (B, num_classes).

    Trained by ``clipgen-train stage=transformer data=cached data.conditioning=class``. It is saved under its own model
    name, so that text-to-image code refuses to load it.

    Args:
        class_names: names of the classes, in order; their number is ``clip_dim``.
        arguments: all other arguments of ``ConditionalTransformer``.

    Raises:
        ValueError: an argument needs CLIP embeddings.
    """

    def __init__(self, *, class_names: Sequence[str], **arguments: Any):
        num_classes = len(class_names)
        clip_loss = as_config(ClipLossConfig, arguments.get("clip_loss"))
        if clip_loss.weight > 0:
            raise ValueError(
                f"clip_loss.weight must be 0 with data.conditioning=class, got {clip_loss.weight}: "
                "a class has no CLIP embedding"
            )
        conditioning = as_config(ConditioningConfig, arguments.get("conditioning"))
        if conditioning.noise_cosine < 1:
            raise ValueError(f"conditioning.noise_cosine must be 1 for classes, got {conditioning.noise_cosine}")
        if arguments.setdefault("clip_dim", num_classes) != num_classes:
            raise ValueError(f"clip_dim must be {num_classes}, the number of classes, got {arguments['clip_dim']}")
        super().__init__(**arguments)
        self.class_names = list(class_names)
        self.hparams["class_names"] = self.class_names

    def one_hot(self, class_indices: Tensor) -> Tensor:
        """Return the conditions (B, num_classes) of classes (B,) int64.

        Raises:
            ValueError: a class is out of range.
        """
        if class_indices.min() < 0 or class_indices.max() >= self.clip_dim:
            raise ValueError(f"class_indices must be in [0, {self.clip_dim}), got {class_indices.tolist()}")
        return F.one_hot(class_indices.to(self.device), self.clip_dim).float()


class ClassConditionalGenerator(ImageGenerator):
    """Images of classes, by a VQ-GAN and a class-conditional transformer.

    As a ``Generator`` it maps standard normal noise (B, noise_dim = num_tokens) and classes (B,) to images.

    Args:
        vqgan: the tokenizer.
        transformer: the transformer.
        params: sampling parameters.
    """

    transformer: ClassConditionalTransformer

    def __init__(self, vqgan: VQGAN, transformer: ClassConditionalTransformer, params: SamplingParams | None = None):
        if vqgan.codebook_size != transformer.codebook_size:
            raise ValueError(f"codebook_size must be {vqgan.codebook_size}, got {transformer.codebook_size}")
        super().__init__(vqgan, transformer)
        self.params = params or SamplingParams()
        self.noise_dim = transformer.num_tokens
        self.class_names = transformer.class_names

    @classmethod
    def load(cls, path: str | Path, params: SamplingParams | None = None, **overrides: Any) -> Self:
        """Load the generator from a run folder of ``data.conditioning=class``, or from a checkpoint in that folder.

        Args:
            path: the folder or the checkpoint.
            params: sampling parameters; None takes those of the run.
            overrides: fields of ``SamplingParams``, which override ``params``.
        """
        transformer = ClassConditionalTransformer.load(path)
        root = run_folder(path)
        vqgan = VQGAN.load(root)
        check_tokenizer(model_folder.find_model(model_folder.resolve_path(path), "ClassConditionalTransformer"), vqgan)
        return cls(vqgan, transformer, resolve_params(params or load_params(root), overrides))

    def class_index(self, name_or_number: str | int) -> int:
        """Return the index of a class.

        Raises:
            ValueError: there is no such class.
        """
        text = str(name_or_number)
        if text in self.class_names:
            return self.class_names.index(text)
        if text.isdecimal() and int(text) < len(self.class_names):
            return int(text)
        examples = ", ".join(self.class_names[:10])
        if len(self.class_names) > 10:
            examples += ", ..."
        raise ValueError(f"class must be below {len(self.class_names)} or one of {examples}; got {name_or_number!r}")

    def generate(self, class_indices: Tensor, seed: int | Sequence[int] | None = None) -> Tensor:
        """Generate images (B, 3, H, W) in [-1, 1] of classes (B,) int64.

        Args:
            class_indices: the classes.
            seed: image i uses ``seed + i``; or one seed per image.
        """
        one_hot = self.transformer.one_hot(class_indices)
        return self.generate_from_conditions(one_hot, self.uniforms(seed, len(one_hot)), self.params)

    def __call__(self, noise: Tensor, class_indices: Tensor) -> Tensor:
        """Generate images of classes (B,) from noise (B, noise_dim), whose normal CDF gives the uniform numbers."""
        # The CDF rounds to 1 for large values, but uniform numbers must be below 1.
        below_one = 1 - torch.finfo(torch.float32).eps
        uniforms = torch.special.ndtr(noise.float()).clamp(0, below_one)
        one_hot = self.transformer.one_hot(class_indices)
        return self.generate_from_conditions(one_hot, uniforms.to(self.device), self.params)
