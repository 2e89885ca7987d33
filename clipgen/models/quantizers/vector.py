"""Vector quantization with a learned codebook (VQ-VAE), the quantizer of the paper.

Ours although vector-quantize-pytorch exists: the codebook must match published weights, resume bit for bit, and stay
identical on all ranks.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from clipgen.models.config import QuantizerConfig
from clipgen.models.quantizers.base import QuantizerOutput, code_counts


class VectorQuantizer(nn.Module):
    """Nearest-neighbour codebook (Eq. 3 of CLIP-GEN; Eq. 1-3 of VQ-VAE, arXiv:1711.00937).

    ``z_q = argmin_k ||z - e_k||``, with ``codebook_loss = ||sg[z] - z_q||^2`` and
    ``commitment_loss = ||z - sg[z_q]||^2``, both means over elements; the caller's beta belongs to the second.

    With ``codebook_ema_decay`` above 0 the codes are not trained by a gradient: each batch moves a code by
    ``1 - codebook_ema_decay`` of the way to the mean of its latents (mini-batch k-means), and there is no
    ``codebook_loss``. With ``dead_code_reset_after`` above 0 the first training batch initializes the whole codebook.

    Args:
        codebook_size: K.
        codebook_dim: D.
        distance: ``"euclidean"`` (the paper), or ``"cosine"``, which normalizes latents and codes to length sqrt(D)
            (ViT-VQGAN, arXiv:2110.04627) and keeps more codes in use.
        dead_code_reset_after: see ``QuantizerConfig``.
        codebook_ema_decay: see ``QuantizerConfig``.
        kmeans_iters: see ``QuantizerConfig``.
    """

    batches_since_use: Tensor

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        distance: str = "euclidean",
        dead_code_reset_after: int = 0,
        codebook_ema_decay: float = 0.0,
        kmeans_iters: int = 0,
    ):
        super().__init__()
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.distance = distance
        self.dead_code_reset_after = dead_code_reset_after
        self.codebook_ema_decay = codebook_ema_decay
        self.kmeans_iters = kmeans_iters
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        self.embedding.weight.requires_grad_(codebook_ema_decay == 0)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        # All codes start one batch before their reset, so that the first batch initializes them.
        initial = max(dead_code_reset_after, 1) - 1
        self.register_buffer("batches_since_use", torch.full((codebook_size,), initial))

    @classmethod
    def from_config(cls, config: QuantizerConfig) -> VectorQuantizer:
        """Return the quantizer of type ``"euclidean"`` or ``"cosine"``."""
        return cls(
            config.codebook_size,
            config.codebook_dim,
            config.type,
            config.dead_code_reset_after,
            config.codebook_ema_decay,
            config.kmeans_iters,
        )

    @property
    def codebook(self) -> Tensor:
        """All codes as the decoder receives them, (K, D)."""
        return self._scaled(self.embedding.weight)

    def _scaled(self, vectors: Tensor) -> Tensor:
        """Project cosine codes onto the sphere of radius sqrt(D), where their elements have unit variance."""
        return F.normalize(vectors, dim=-1) * math.sqrt(self.codebook_dim) if self.distance == "cosine" else vectors

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize latents (B, D, h, w), in fp32 whatever the autocast."""
        with torch.autocast(z.device.type, enabled=False):
            flat = self._scaled(rearrange(z.float(), "b d h w -> b h w d"))
            indices = self.nearest(flat)
            codes = F.embedding(indices, self.codebook)  # (B, h, w, D)
            if self.training and self.codebook_ema_decay:
                self.ema_update_(flat.detach().flatten(0, 2), indices.flatten())
            if self.training and self.dead_code_reset_after:
                error = (flat - codes).detach().square().sum(-1)
                self.reset_dead_codes_(flat.detach().flatten(0, 2), indices.flatten(), error.flatten())
            losses = {"commitment_loss": F.mse_loss(flat, codes.detach())}
            if not self.codebook_ema_decay:
                losses["codebook_loss"] = F.mse_loss(codes, flat.detach())
            z_q = flat + (codes - flat).detach()  # straight through
            return QuantizerOutput(rearrange(z_q, "b h w d -> b d h w"), indices, losses)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Return the index of the nearest code: (..., D) -> (...). ||v||^2, equal for all codes, is left out."""
        codes = self.codebook.detach().to(vectors.dtype)
        distance = codes.square().sum(1) - 2 * vectors.detach() @ codes.T  # (..., K)
        return distance.argmin(dim=-1)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Look up codes: (B, h, w) -> (B, D, h, w)."""
        return rearrange(F.embedding(indices, self.codebook), "b h w d -> b d h w")

    @torch.no_grad()
    def kmeans_init_(self, z: Tensor) -> None:
        """Initialize the codes by k-means on latents (B, D, h, w), identically on all ranks."""
        latents = self._scaled(rearrange(z.float(), "b d h w -> (b h w) d"))
        centres = latents[torch.multinomial(latents.new_ones(len(latents)), self.codebook_size, replacement=True)]
        for _ in range(self.kmeans_iters):
            nearest = torch.cdist(latents, centres).argmin(dim=1)
            count = code_counts(nearest, self.codebook_size)[:, None]
            total = torch.zeros_like(centres).index_add_(0, nearest, latents)
            centres = self._scaled(torch.where(count > 0, total / count.clamp(min=1), centres))
        if dist.is_initialized():
            dist.broadcast(centres, src=0)
        self.embedding.weight.data.copy_(centres)
        self.batches_since_use.zero_()

    @torch.no_grad()
    def ema_update_(self, latents: Tensor, indices: Tensor) -> None:
        """Move each code towards the mean of its latents (N, D) on all ranks."""
        count = code_counts(indices, self.codebook_size)[:, None].to(latents)
        total = torch.zeros_like(self.embedding.weight).index_add_(0, indices, latents)
        if dist.is_initialized():
            dist.all_reduce(count)
            dist.all_reduce(total)
        mean = torch.where(count > 0, total / count.clamp(min=1), self.embedding.weight)
        self.embedding.weight.lerp_(mean, 1 - self.codebook_ema_decay)

    @torch.no_grad()
    def reset_dead_codes_(self, latents: Tensor, indices: Tensor, error: Tensor) -> None:
        """Reset codes that have been unused for too long to latents (N, D) of this batch, identically on all ranks.

        Latents are sampled with probability proportional to their squared quantization error (N,), as in k-means++.
        """
        used = code_counts(indices, self.codebook_size)
        if dist.is_initialized():
            dist.all_reduce(used)
        self.batches_since_use.add_(1)[used > 0] = 0
        dead = self.batches_since_use >= self.dead_code_reset_after
        chosen = latents[torch.multinomial(error + 1e-12, self.codebook_size, replacement=True)]
        if dist.is_initialized():
            dist.broadcast(chosen, src=0)
        self.embedding.weight.data.copy_(torch.where(dead[:, None], chosen, self.embedding.weight))
        self.batches_since_use[dead] = 0
