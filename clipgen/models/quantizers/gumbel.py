"""Gumbel-softmax quantization, for the published weights of taming-transformers' GumbelVQ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from clipgen.models.config import QuantizerConfig
from clipgen.models.quantizers.base import QuantizerOutput


class GumbelQuantizer(nn.Module):
    """Sample codes by the Gumbel-softmax (arXiv:1611.01144) of logits from a 1 x 1 convolution.

    In evaluation mode the most likely code is used. ``kl_loss`` is the divergence of the code distribution from the
    uniform one.
    """

    def __init__(self, codebook_size: int, codebook_dim: int):
        super().__init__()
        self.codebook_size = codebook_size
        self.proj = nn.Conv2d(codebook_dim, codebook_size, 1)
        self.embed = nn.Embedding(codebook_size, codebook_dim)

    @classmethod
    def from_config(cls, config: QuantizerConfig) -> GumbelQuantizer:
        """Return the quantizer of type ``"gumbel"``."""
        config.refuse_codebook_updates()
        return cls(config.codebook_size, config.codebook_dim)

    @property
    def codebook(self) -> Tensor:
        """All codes, (K, D)."""
        return self.embed.weight

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize latents (B, D, h, w), in fp32 regardless of autocast."""
        with torch.autocast(z.device.type, enabled=False):
            weight = self.proj.weight.float()
            bias = self.proj.bias.float()  # type: ignore[union-attr]
            logits = F.conv2d(z.float(), weight, bias)  # (B, K, h, w)
            p = logits.softmax(dim=1)
            kl = (p * torch.log(p * self.codebook_size + 1e-10)).sum(dim=1).mean()
            if not self.training:
                indices = logits.argmax(dim=1)
                return QuantizerOutput(self.indices_to_codes(indices), indices, {"kl_loss": kl})
            one_hot = F.gumbel_softmax(logits, tau=1.0, dim=1, hard=True)
            z_q = torch.einsum("bkhw,kd->bdhw", one_hot, self.codebook)
            return QuantizerOutput(z_q, one_hot.argmax(dim=1), {"kl_loss": kl})

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Look up codes: (B, h, w) -> (B, D, h, w)."""
        return rearrange(self.embed(indices), "b h w d -> b d h w")
