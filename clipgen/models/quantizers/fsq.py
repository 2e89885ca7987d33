"""Finite scalar quantization: each element of a latent is rounded on its own, so there is no codebook to collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from clipgen.models.config import QuantizerConfig
from clipgen.models.quantizers.base import MAX_BITS, QuantizerOutput


class FSQ(nn.Module):
    """Finite scalar quantization (arXiv:2309.15505): element i is squashed and rounded to one of ``levels[i]`` values.

    K is the product of the levels and D their number; codes lie in [-1, 1]. FSQ has no loss of its own.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        # Two levels would be signs alone, which is LFQ.
        if not levels or min(levels) < 3:
            raise ValueError(f"fsq_levels must be whole numbers of at least 3, got {list(levels)}")
        if len(levels) > MAX_BITS or math.prod(levels) > 2**MAX_BITS:
            shown = list(levels)[: MAX_BITS + 1]
            raise ValueError(f"fsq_levels must have a product of at most 2^{MAX_BITS}, got {shown}")
        self.codebook_size = math.prod(levels)
        self.codebook_dim = len(levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]  # the first element is the least significant digit
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    @classmethod
    def from_config(cls, config: QuantizerConfig) -> FSQ:
        """Return the quantizer of type ``"fsq"``."""
        config.refuse_codebook_updates()
        if not config.fsq_levels:
            raise ValueError("fsq_levels must be given for quantizer 'fsq', as in [8, 5, 5, 5], got none")
        quantizer = cls(config.fsq_levels)
        config.require_sizes(quantizer.codebook_size, quantizer.codebook_dim)
        return quantizer

    @property
    def codebook(self) -> Tensor:
        """All codes, (K, D)."""
        return self._vectors(torch.arange(self.codebook_size, device=self.levels.device))

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize latents (B, D, h, w), in fp32 regardless of autocast."""
        with torch.autocast(z.device.type, enabled=False):
            bounded = self._bound(rearrange(z.float(), "b d h w -> b h w d"))
            rounded = bounded + (bounded.round() - bounded).detach()  # straight through
            half = self.levels // 2
            indices = ((rounded.detach() + half) * self.basis).sum(dim=-1).round().long()
            return QuantizerOutput(rearrange(rounded / half, "b h w d -> b d h w"), indices, {})

    def _bound(self, z: Tensor) -> Tensor:
        """Squash so that rounding gives exactly ``levels`` values: -2 ... 1 for four levels, -2 ... 2 for five."""
        reach = (self.levels - 1) * 1.001 / 2  # slightly larger, so that the outermost values are reached
        offset = (self.levels % 2 == 0) * 0.5
        return torch.tanh(z + torch.atanh(offset / reach)) * reach - offset

    def _vectors(self, indices: Tensor) -> Tensor:
        half = self.levels // 2
        return (indices[..., None] // self.basis % self.levels - half) / half

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Look up codes: (B, h, w) -> (B, D, h, w)."""
        return rearrange(self._vectors(indices), "b h w d -> b d h w")
