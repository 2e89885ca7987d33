"""Vector quantisation with a learned codebook: latents -> one of K codes, with straight-through gradients.

Every quantizer, here and in ``lookup_free``, is called with latents (B, D, h, w), returns ``QuantizerOutput``, turns indices
back by ``codes``, and shows all its codes as ``codebook`` (K, D).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class QuantizerOutput(NamedTuple):
    """What a quantizer returns."""

    z_q: Tensor  # (B, D, h, w), gradients pass straight through to z
    indices: Tensor  # (B, h, w) int64
    losses: dict[str, Tensor]  # by name (codebook_loss, commitment_loss, entropy_loss, kl_loss), not yet weighted


class VectorQuantizer(nn.Module):
    """Nearest-neighbour codebook (Eq. 3 of CLIP-GEN; Eq. 1-3 of VQ-VAE, arXiv:1711.00937).

    ``z_q = argmin_k ||z - e_k||``, with ``codebook_loss = ||sg[z] - z_q||^2`` and
    ``commitment_loss = ||z - sg[z_q]||^2``, both means over elements; the caller's beta belongs to the second.

    Args:
        codebook_size: K.
        codebook_dim: D.
        distance: ``"euclidean"`` (the paper), or ``"cosine"``: latents and codes are compared and handed on at unit
            length times sqrt(D), the way of ViT-VQGAN (arXiv:2110.04627), whose codes stay alive.
        dead_code_reset_after: a code that no latent of this many training batches chose is moved onto a latent far
            from its code; 0 leaves dead codes dead (the paper). The first training batch seeds the whole codebook.
        kmeans_iters: rounds of k-means in ``kmeans_init_``, which puts the codes where the latents are.
        codebook_ema_decay: 0 learns the codes by the gradient of ``codebook_loss`` (the paper). Above 0,
            each batch moves a code by ``1 - codebook_ema_decay`` of the way to the mean of its latents (mini-batch
            k-means), which follows the encoder faster; then there is no ``codebook_loss``.
    """

    idle: Tensor

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
        if codebook_size < 2:
            raise ValueError(f"codebook_size must be at least 2, got {codebook_size}")
        if distance not in ("euclidean", "cosine"):
            raise ValueError(f"distance must be 'euclidean' or 'cosine', got {distance!r}")
        if not 0 <= codebook_ema_decay < 1:
            raise ValueError(f"codebook_ema_decay must be in [0, 1), got {codebook_ema_decay}")
        self.codebook_size, self.codebook_dim = codebook_size, codebook_dim
        self.distance, self.dead_code_reset_after, self.codebook_ema_decay = (
            distance,
            dead_code_reset_after,
            codebook_ema_decay,
        )
        self.kmeans_iters = kmeans_iters
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        self.embedding.weight.requires_grad_(codebook_ema_decay == 0)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        # batches since each code was last chosen; at first all are due, so that the first batch seeds them
        self.register_buffer("idle", torch.full((codebook_size,), max(dead_code_reset_after, 1) - 1))

    @property
    def codebook(self) -> Tensor:
        """The codes as they are handed on, (K, D)."""
        return self._scaled(self.embedding.weight)

    def _scaled(self, vectors: Tensor) -> Tensor:
        """Cosine codes live on the sphere of radius sqrt(D): their elements are of unit variance."""
        return F.normalize(vectors, dim=-1) * math.sqrt(self.codebook_dim) if self.distance == "cosine" else vectors

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Latents (B, D, h, w) -> codes, indices and losses. Runs in fp32 whatever the autocast."""
        with torch.autocast(z.device.type, enabled=False):
            flat = self._scaled(rearrange(z.float(), "b d h w -> b h w d"))
            indices = self.nearest(flat)
            codes = F.embedding(indices, self.codebook)  # (B, h, w, D)
            if self.training and self.codebook_ema_decay:
                self.move_(flat.detach().flatten(0, 2), indices.flatten())
            if self.training and self.dead_code_reset_after:
                error = (flat - codes).detach().square().sum(-1)
                self.revive_(flat.detach().flatten(0, 2), indices.flatten(), error.flatten())
            losses = {"commitment_loss": F.mse_loss(flat, codes.detach())}
            if not self.codebook_ema_decay:
                losses["codebook_loss"] = F.mse_loss(codes, flat.detach())
            z_q = flat + (codes - flat).detach()  # straight through
            return QuantizerOutput(rearrange(z_q, "b h w d -> b d h w"), indices, losses)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Index of the nearest code: (..., D) -> (...). ||v - e||^2 without ||v||^2, which no code changes."""
        codes = self.codebook.detach().to(vectors.dtype)
        distance = codes.square().sum(1) - 2 * vectors.detach() @ codes.T  # (..., K)
        return distance.argmin(dim=-1)

    def codes(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) -> codes (B, D, h, w)."""
        return rearrange(F.embedding(indices, self.codebook), "b h w d -> b d h w")

    @torch.no_grad()
    def kmeans_init_(self, z: Tensor) -> None:
        """Put the codes where k-means finds the clusters of the first batch (B, D, h, w), the same on every rank."""
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
        self.idle.zero_()

    @torch.no_grad()
    def move_(self, latents: Tensor, indices: Tensor) -> None:
        """Move each code towards the mean of the latents (N, D) that chose it, over all ranks."""
        count = code_counts(indices, self.codebook_size)[:, None].to(latents)
        total = torch.zeros_like(self.embedding.weight).index_add_(0, indices, latents)
        if dist.is_initialized():
            dist.all_reduce(count)
            dist.all_reduce(total)
        mean = torch.where(count > 0, total / count.clamp(min=1), self.embedding.weight)
        self.embedding.weight.lerp_(mean, 1 - self.codebook_ema_decay)

    @torch.no_grad()
    def revive_(self, latents: Tensor, indices: Tensor, error: Tensor) -> None:
        """Move codes that were idle too long onto latents (N, D) of this batch, the same on every rank.

        Latents are drawn by their squared distance (N,) to the code they got, as k-means++ does: where codes are
        missing, not where most latents are.
        """
        used = code_counts(indices, self.codebook_size)
        if dist.is_initialized():
            dist.all_reduce(used)
        self.idle.add_(1)[used > 0] = 0
        dead = self.idle >= self.dead_code_reset_after
        chosen = latents[torch.multinomial(error + 1e-12, self.codebook_size, replacement=True)]
        if dist.is_initialized():
            dist.broadcast(chosen, src=0)
        self.embedding.weight.data.copy_(torch.where(dead[:, None], chosen, self.embedding.weight))
        self.idle[dead] = 0


class GumbelQuantizer(nn.Module):
    """Codes drawn by the Gumbel-softmax of logits that a 1 x 1 convolution gives (arXiv:1611.01144), as in
    taming-transformers' GumbelVQ; in evaluation the likeliest. Here for its published weights.

    ``kl_loss`` is the divergence of the drawn distribution from the uniform one.
    """

    def __init__(self, codebook_size: int, codebook_dim: int):
        super().__init__()
        self.codebook_size = codebook_size
        self.proj = nn.Conv2d(codebook_dim, codebook_size, 1)
        self.embed = nn.Embedding(codebook_size, codebook_dim)

    @property
    def codebook(self) -> Tensor:
        """All codes, (K, D)."""
        return self.embed.weight

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Latents (B, D, h, w) -> codes, indices and losses. Runs in fp32 whatever the autocast."""
        with torch.autocast(z.device.type, enabled=False):
            weight, bias = self.proj.weight.float(), self.proj.bias.float()  # type: ignore[union-attr]
            logits = F.conv2d(z.float(), weight, bias)  # (B, K, h, w)
            p = logits.softmax(dim=1)
            kl = (p * torch.log(p * self.codebook_size + 1e-10)).sum(dim=1).mean()
            if not self.training:
                indices = logits.argmax(dim=1)
                return QuantizerOutput(self.codes(indices), indices, {"kl_loss": kl})
            one_hot = F.gumbel_softmax(logits, tau=1.0, dim=1, hard=True)
            z_q = torch.einsum("bkhw,kd->bdhw", one_hot, self.codebook)
            return QuantizerOutput(z_q, one_hot.argmax(dim=1), {"kl_loss": kl})

    def codes(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) -> codes (B, D, h, w)."""
        return rearrange(self.embed(indices), "b h w d -> b d h w")


def code_counts(indices: Tensor, codebook_size: int) -> Tensor:
    """How often each code was chosen, (K,); torch.bincount would wait for a GPU."""
    flat = indices.flatten()
    return flat.new_zeros(codebook_size).index_add_(0, flat, torch.ones_like(flat))


def usage_and_perplexity(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """From how often each code was chosen (K,): the part of codes in use, and exp(entropy) of their distribution."""
    p = chosen.float() / chosen.sum().clamp(min=1)
    return (chosen > 0).float().mean(), torch.exp(-torch.special.xlogy(p, p).sum())
