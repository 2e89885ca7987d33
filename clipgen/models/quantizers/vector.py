"""Vector quantization with a learned codebook (VQ-VAE), the quantizer of the paper.

Ours although vector-quantize-pytorch exists: the codebook must match published weights, resume bit for bit, and stay
identical on all ranks.
"""

from __future__ import annotations

import logging
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from clipgen.models.config import QuantizerConfig
from clipgen.models.quantizers.base import QuantizerOutput, code_counts

logger = logging.getLogger(__name__)

KMEANS_LATENTS_PER_CODE = 10
MAX_DISTANCES = 2**26  # distances in memory at a time in k-means: 256 MiB


class VectorQuantizer(nn.Module):
    """Nearest-neighbor codebook (Eq. 3 of CLIP-GEN; Eq. 1-3 of VQ-VAE, arXiv:1711.00937).

    ``z_q = argmin_k ||z - e_k||``, with ``codebook_loss = ||sg[z] - z_q||^2`` and
    ``commitment_loss = ||z - sg[z_q]||^2``, both means over elements; the caller's beta belongs to the second.

    With ``codebook_ema_decay`` above 0 the codes are not trained by a gradient: each batch moves a code by
    ``1 - codebook_ema_decay`` of the way to the mean of its latents (mini-batch k-means), and there is no
    ``codebook_loss``. With ``dead_code_reset_after`` above 0 the first training batch resets all codes that it
    does not use, nearly all of a new codebook.

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
        # All codes start one batch before their reset, so that the first batch resets those that it does not use.
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
        """Quantize latents (B, D, h, w), in fp32 regardless of autocast."""
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

    @property
    def kmeans_latents(self) -> int:
        """The number of latents, over all ranks, that ``kmeans_init_`` should get."""
        return KMEANS_LATENTS_PER_CODE * self.codebook_size

    def as_vectors(self, z: Tensor) -> Tensor:
        """Return latents (B, D, h, w) as they are compared with codes, (B * h * w, D) in fp32."""
        return self._scaled(rearrange(z.float(), "b d h w -> (b h w) d"))

    @torch.no_grad()
    def kmeans_init_(self, latents: Tensor) -> None:
        """Initialize the codes by k-means on latents (N, D) of all ranks, identically on all ranks.

        Raises:
            ValueError: no latent is finite.
        """
        latents = gather_rows(latents)
        latents = latents[torch.isfinite(latents).all(dim=1)]
        if not len(latents):
            raise ValueError("kmeans_iters needs finite latents in the first batch, got none")
        if len(latents) < self.codebook_size:
            logger.warning("k-means initializes %d codes from only %d latents.", self.codebook_size, len(latents))
        centers = latents[random_rows(len(latents), self.codebook_size, latents.device)]
        for _ in range(self.kmeans_iters):
            nearest = nearest_rows(latents, centers)
            count = code_counts(nearest, self.codebook_size)[:, None]
            total = torch.zeros_like(centers).index_add_(0, nearest, latents)
            centers = self._scaled(torch.where(count > 0, total / count.clamp(min=1), centers))
        if dist.is_initialized():
            dist.broadcast(centers, src=0)
        self.embedding.weight.data.copy_(centers)
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
        # The multinomial distribution fails on non-finite errors; a step with such errors is skipped anyway.
        error = error.nan_to_num(nan=0.0, posinf=0.0)
        chosen = latents[torch.multinomial(error + 1e-12, self.codebook_size, replacement=True)]
        if dist.is_initialized():
            dist.broadcast(chosen, src=0)
        self.embedding.weight.data.copy_(torch.where(dead[:, None], chosen, self.embedding.weight))
        self.batches_since_use[dead] = 0


def gather_rows(vectors: Tensor) -> Tensor:
    """Return the rows (N, D) of all ranks, the same number from each rank."""
    if not dist.is_initialized():
        return vectors
    num_rows = torch.tensor(len(vectors), device=vectors.device)
    dist.all_reduce(num_rows, dist.ReduceOp.MIN)
    own = vectors[: int(num_rows)].contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.cat(parts)


def random_rows(num_rows: int, count: int, device: torch.device) -> Tensor:
    """Return random row numbers (count,) int64 in [0, num_rows), without repetition if there are enough rows."""
    if num_rows >= count:
        return torch.randperm(num_rows, device=device)[:count]
    return torch.randint(num_rows, (count,), device=device)


def nearest_rows(vectors: Tensor, centers: Tensor) -> Tensor:
    """Return the index (N,) of the center (K, D) nearest to each vector (N, D), in chunks of bounded memory."""
    chunk_size = max(MAX_DISTANCES // len(centers), 1)
    nearest = [torch.cdist(chunk, centers).argmin(dim=1) for chunk in vectors.split(chunk_size)]
    return torch.cat(nearest)
