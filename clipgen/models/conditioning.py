"""The condition of the transformer, and noise on it.

A batch holds one condition per sample under the key ``condition``: a CLIP embedding (B, E) of unit norm, or a one-hot
class (B, num_classes). ``ConditionalGPT2.condition_tokens`` projects it to one condition token per sample, which is the
first position of the sequence. Another kind of condition therefore needs a data source that writes vectors under this
key and a ``clip_dim`` of their length; several condition tokens per sample would need changes in ``models/gpt.py`` and
``models/kv_cache.py``. There is no protocol class, because nothing would refer to it.

Noise in training is one of the ways to close CLIP's modality gap (see generation/modality_gap.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_condition_noise(clip_embedding: Tensor, cosine: float) -> Tensor:
    """Return unit vectors with the given expected cosine to ``clip_embedding`` (B, E); 1 adds no noise.

    The noise is isotropic, as in LAFITE (arXiv:2111.13792) and CapDec (arXiv:2211.00575). Their noise levels agree
    when they are written as a cosine: cos = 1 / sqrt(1 + r^2) for noise of norm r.
    """
    if cosine >= 1:
        return clip_embedding
    noise = F.normalize(torch.randn_like(clip_embedding), dim=-1)
    return F.normalize(clip_embedding + noise * (cosine**-2 - 1) ** 0.5, dim=-1)
