"""Lookup-free quantization: each element of a latent is replaced by its sign."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from clipgen.models.config import QuantizerConfig
from clipgen.models.quantizers.base import MAX_BITS, QuantizerOutput


class LFQ(nn.Module):
    """Lookup-free quantization (MAGVIT-v2, arXiv:2310.05737): element i is replaced by its sign, bit i of the index.

    K = 2 ** D. ``entropy_loss`` is E[H(q(z))] - diversity * H(E[q(z)]), where q is the softmax over all codes: each
    latent should choose clearly, and all codes should be used. ``commitment_loss`` is ||z - sg[z_q]||^2.

    Args:
        codebook_dim: D.
        diversity: gamma, weight of the second entropy.
        inverse_temperature: inverse temperature of q.
    """

    basis: Tensor

    def __init__(self, codebook_dim: int, diversity: float = 1.0, inverse_temperature: float = 100.0):
        super().__init__()
        if not 1 <= codebook_dim <= MAX_BITS:
            raise ValueError(
                f"quantizer.codebook_dim must be in [1, {MAX_BITS}] for quantizer 'lfq', got {codebook_dim}"
            )
        self.codebook_size = 2**codebook_dim
        self.diversity = diversity
        self.inverse_temperature = inverse_temperature
        self.register_buffer("basis", 2 ** torch.arange(codebook_dim).flip(0), persistent=False)

    @classmethod
    def from_config(cls, config: QuantizerConfig) -> LFQ:
        """Return the quantizer of type ``"lfq"``."""
        config.refuse_codebook_updates()
        quantizer = cls(config.codebook_dim)
        config.require_sizes(quantizer.codebook_size, config.codebook_dim)
        return quantizer

    @property
    def codebook(self) -> Tensor:
        """All codes, (K, D)."""
        return self._vectors(torch.arange(self.codebook_size, device=self.basis.device))

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize latents (B, D, h, w), in fp32 regardless of autocast."""
        with torch.autocast(z.device.type, enabled=False):
            z = rearrange(z.float(), "b d h w -> b h w d")
            signs = torch.where(z > 0, 1.0, -1.0)
            indices = ((z > 0) * self.basis).sum(dim=-1)
            losses = {"commitment_loss": (z - signs).square().mean()}
            # Only in training: it needs memory for every pair of latent and code.
            if self.training:
                losses["entropy_loss"] = self.entropy_loss(z.flatten(0, 2))
            z_q = z + (signs - z).detach()  # straight through
            return QuantizerOutput(rearrange(z_q, "b h w d -> b d h w"), indices, losses)

    def entropy_loss(self, z: Tensor) -> Tensor:
        """Return the mean entropy per latent (N, D) minus ``diversity`` x the entropy of the mean, in nats."""
        # 2 z.e is -||z - e||^2 up to terms that are equal for all codes.
        log_p = (2 * self.inverse_temperature * z @ self.codebook.T).log_softmax(dim=-1)
        p = log_p.exp()
        sample_entropy = -(p * log_p).sum(dim=-1).mean()
        mean = p.mean(dim=0)
        # The clamp keeps the gradient finite for codes of probability 0.
        mean_entropy = -(mean * mean.clamp(min=1e-12).log()).sum()
        return sample_entropy - self.diversity * mean_entropy

    def _vectors(self, indices: Tensor) -> Tensor:
        return ((indices[..., None] & self.basis) != 0) * 2.0 - 1

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Look up codes: (B, h, w) -> (B, D, h, w)."""
        return rearrange(self._vectors(indices), "b h w d -> b d h w")
