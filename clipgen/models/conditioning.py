"""The interface of models that embed images and texts for the transformer, and noise on their embeddings.

A batch has one condition per sample under the key ``condition``: an embedding (B, E) of unit norm, or a one-hot class
(B, num_classes). ``ConditionalGPT2.condition_tokens`` projects it to one condition token per sample, which is the first
position of the sequence; several condition tokens per sample would need changes in ``models/gpt.py`` and
``models/kv_cache.py``.

Noise in training is one of the ways to close CLIP's modality gap (see generation/modality_gap.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Conditioner(Protocol):
    """Interface of a frozen model that embeds images in training and prompts at sampling; also an ``nn.Module``.

    ``FrozenCLIP`` is the one of the paper. ``ConditionalTransformer.attach_encoders`` and ``TextToImage`` accept any.
    """

    embed_dim: int

    @property
    def device(self) -> torch.device:
        """The device of the module."""
        ...

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move the module, as ``nn.Module.to`` does."""
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) in [-1, 1]: (B, E), unit norm. Gradients are needed by the CLIP loss only."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: (B, E), unit norm."""
        ...


def add_condition_noise(clip_embedding: Tensor, cosine: float) -> Tensor:
    """Return unit vectors with the given expected cosine to ``clip_embedding`` (B, E); 1 adds no noise.

    The noise is isotropic, as in LAFITE (arXiv:2111.13792) and CapDec (arXiv:2211.00575). Their noise levels agree
    when they are written as a cosine: cos = 1 / sqrt(1 + r^2) for noise of norm r.
    """
    if cosine >= 1:
        return clip_embedding
    noise = F.normalize(torch.randn_like(clip_embedding), dim=-1)
    return F.normalize(clip_embedding + noise * (cosine**-2 - 1) ** 0.5, dim=-1)
