"""The interface of a quantizer, and statistics of how often codes are used."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from clipgen.models.config import QuantizerConfig

MAX_BITS = 30  # largest number of bits of an index


class QuantizerOutput(NamedTuple):
    """Result of quantizing a batch of latents."""

    z_q: Tensor  # (B, D, h, w); its gradient passes straight through to the latents
    indices: Tensor  # (B, h, w) int64
    losses: dict[str, Tensor]  # unweighted, by name: codebook_loss, commitment_loss, entropy_loss, kl_loss


class Quantizer(Protocol):
    """Interface of a quantizer, which is also an ``nn.Module``.

    To add one, write it in its own file and add it to the table ``QUANTIZERS``. If it needs new settings, add them to
    ``QuantizerConfig``; if it has new losses, add their weights to ``LossConfig``.
    """

    codebook_size: int

    @classmethod
    def from_config(cls, config: QuantizerConfig) -> Quantizer:
        """Build the quantizer; raise ValueError if the configuration does not fit."""
        ...

    @property
    def codebook(self) -> Tensor:
        """All codes as the decoder receives them, (K, D)."""
        ...

    def __call__(self, z: Tensor) -> QuantizerOutput:
        """Quantize latents (B, D, h, w), in fp32 regardless of autocast."""
        ...

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Look up codes: (B, h, w) -> (B, D, h, w)."""
        ...


def code_counts(indices: Tensor, codebook_size: int) -> Tensor:
    """Return the number of times that each code is used, (K,). (torch.bincount would synchronize with the GPU.)"""
    flat = indices.flatten()
    return flat.new_zeros(codebook_size).index_add_(0, flat, torch.ones_like(flat))


def usage_and_perplexity(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the fraction of codes used at least once, and exp(entropy) of their distribution, from counts (K,)."""
    p = counts.float() / counts.sum().clamp(min=1)
    return (counts > 0).float().mean(), torch.exp(-torch.special.xlogy(p, p).sum())
