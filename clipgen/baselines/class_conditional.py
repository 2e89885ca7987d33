"""The label-conditioned transformer: stage 2 with an image's class in the place of its CLIP embedding.

The row "VQGAN + label conditioned Transformer" of CLIP-GEN's Table 3 (after arXiv:2012.09841): it knows the classes of
its training images, and no other words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.checkpoint import model_folder
from clipgen.generation.generator import ImageGenerator
from clipgen.models.config import ClipLossConfig, ConditioningConfig, as_config
from clipgen.run_folder import check_bound, run_folder
from clipgen.sampling import SamplingParams
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN


class ClassConditionalTransformer(ConditionalTransformer):
    """``ConditionalTransformer`` whose condition is a one-hot class (B, num_classes).

    Trained by ``clipgen-train stage=transformer data=cached data.conditioning=class``. Its files are no
    ``ConditionalTransformer``'s: what draws from sentences refuses them.

    Args:
        class_names: the classes, in order; ``clip_dim`` is their number. All else is ``ConditionalTransformer``'s.

    Raises:
        ValueError: an argument needs CLIP embeddings.
    """

    def __init__(self, *, class_names: Sequence[str], **arguments: Any):
        classes = len(class_names)
        clip_loss = as_config(ClipLossConfig, arguments.get("clip_loss"))
        if clip_loss.weight > 0:
            raise ValueError(
                f"clip_loss.weight must be 0 with data.conditioning=class, got {clip_loss.weight}: "
                "a class has no CLIP embedding"
            )
        conditioning = as_config(ConditioningConfig, arguments.get("conditioning"))
        if conditioning.noise_cosine < 1:
            raise ValueError(f"conditioning.noise_cosine must be 1 for classes, got {conditioning.noise_cosine}")
        if arguments.setdefault("clip_dim", classes) != classes:
            raise ValueError(f"clip_dim must be {classes}, the number of classes, got {arguments['clip_dim']}")
        super().__init__(**arguments)
        self.hparams["class_names"] = self.class_names = list(class_names)

    def one_hot(self, class_indices: Tensor) -> Tensor:
        """Classes (B,) int64 -> conditions (B, num_classes)."""
        if class_indices.min() < 0 or class_indices.max() >= self.clip_dim:
            raise ValueError(f"class_indices must be in [0, {self.clip_dim}), got {class_indices.tolist()}")
        return F.one_hot(class_indices.to(self.device), self.clip_dim).float()


class ClassConditionalGenerator(ImageGenerator):
    """Pictures of classes: a tokenizer and the transformer that knows the classes of its images.

    As a generator it turns standard normal noise (B, noise_dim = num_tokens) and classes (B,) into images.

    Args:
        settings: of drawing, as of ``ConditionalTransformer.sample``.
    """

    transformer: ClassConditionalTransformer

    def __init__(self, vqgan: VQGAN, transformer: ClassConditionalTransformer, **settings: Any):
        if vqgan.codebook_size != transformer.codebook_size:
            raise ValueError(f"codebook_size must be {vqgan.codebook_size}, got {transformer.codebook_size}")
        super().__init__(vqgan, transformer)
        self.params = SamplingParams(**settings)
        self.noise_dim, self.class_names = transformer.num_tokens, transformer.class_names

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> ClassConditionalGenerator:
        """Load a run folder of ``clipgen-train stage=transformer data=cached data.conditioning=class``, or a checkpoint
        inside one."""
        transformer, vqgan = ClassConditionalTransformer.load(path), VQGAN.load(run_folder(path))
        check_bound(model_folder.find_model(model_folder.resolve_path(path), "ClassConditionalTransformer"), vqgan)
        return cls(vqgan, transformer, **settings)

    def find(self, label: str | int) -> int:
        """The index of a class, given by name or number.

        Raises:
            ValueError: there is no such class.
        """
        if str(label) in self.class_names:
            return self.class_names.index(str(label))
        if str(label).isdecimal() and int(label) < len(self.class_names):
            return int(label)
        some = ", ".join(self.class_names[:10]) + ", ..." * (len(self.class_names) > 10)
        raise ValueError(f"label must be below {len(self.class_names)} or one of {some}; got {label!r}")

    def draw(self, class_indices: Tensor, seed: int | Sequence[int] | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of classes (B,) int64; row i draws from ``seed + i``, or from its own seed."""
        one_hot = self.transformer.one_hot(class_indices)
        return self.generate_from_conditions(one_hot, self.uniforms(seed, len(one_hot)), self.params)

    def __call__(self, noise: Tensor, class_indices: Tensor) -> Tensor:
        """Images of classes (B,) that follow from noise (B, noise_dim): each number's normal CDF draws an index."""
        below_one = 1 - torch.finfo(torch.float32).eps
        uniforms = torch.special.ndtr(noise.float()).clamp(0, below_one)
        one_hot = self.transformer.one_hot(class_indices)
        return self.generate_from_conditions(one_hot, uniforms.to(self.device), self.params)
