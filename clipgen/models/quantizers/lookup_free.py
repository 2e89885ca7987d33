"""Quantizers without a learned codebook: every element of a latent is rounded on its own, so no code can die."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from clipgen.models.quantizers.vector import QuantizerOutput


class FSQ(nn.Module):
    """Finite scalar quantisation (arXiv:2309.15505): element i is squashed and rounded to one of ``levels[i]`` values.

    K is the product of the levels and D their number; codes lie in [-1, 1]. It has no loss of its own.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        if not levels or min(levels) < 3:  # two would be signs alone, which is LFQ
            raise ValueError(f"levels must be whole numbers of at least 3, got {list(levels)}")
        self.codebook_size = math.prod(levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]  # the first element counts ones
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    @property
    def codebook(self) -> Tensor:
        """All codes, (K, D)."""
        return self._vectors(torch.arange(self.codebook_size, device=self.levels.device))

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Latents (B, D, h, w) -> codes and indices. Runs in fp32 whatever the autocast."""
        with torch.autocast(z.device.type, enabled=False):
            bounded = self._bound(rearrange(z.float(), "b d h w -> b h w d"))
            rounded = bounded + (bounded.round() - bounded).detach()  # straight through
            half = self.levels // 2
            indices = ((rounded.detach() + half) * self.basis).sum(dim=-1).round().long()
            return QuantizerOutput(rearrange(rounded / half, "b h w d -> b d h w"), indices, {})

    def _bound(self, z: Tensor) -> Tensor:
        """Squash so that rounding gives exactly ``levels`` values: -2 ... 1 for four of them, -2 ... 2 for five."""
        reach = (self.levels - 1) * 1.001 / 2  # a bit more, or the outermost values would hardly be met
        offset = (self.levels % 2 == 0) * 0.5
        return torch.tanh(z + torch.atanh(offset / reach)) * reach - offset

    def _vectors(self, indices: Tensor) -> Tensor:
        half = self.levels // 2
        return (indices[..., None] // self.basis % self.levels - half) / half

    def codes(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) -> codes (B, D, h, w)."""
        return rearrange(self._vectors(indices), "b h w d -> b d h w")


class LFQ(nn.Module):
    """Lookup-free quantisation (MAGVIT-v2, arXiv:2310.05737): element i is replaced by its sign, bit i of the index.

    K = 2 ** D. ``entropy_loss`` is E[H(q(z))] - diversity * H(E[q(z)]), with q the softmax over all codes: low for
    each latent, high over all of them. ``commitment_loss`` is ||z - sg[z_q]||^2.

    Args:
        codebook_dim: D.
        diversity: gamma, the weight of the second entropy.
        inverse_temperature: of q.
    """

    basis: Tensor

    def __init__(self, codebook_dim: int, diversity: float = 1.0, inverse_temperature: float = 100.0):
        super().__init__()
        self.codebook_size = 2**codebook_dim
        self.diversity, self.inverse_temperature = diversity, inverse_temperature
        self.register_buffer("basis", 2 ** torch.arange(codebook_dim).flip(0), persistent=False)

    @property
    def codebook(self) -> Tensor:
        """All codes, (K, D)."""
        return self._vectors(torch.arange(self.codebook_size, device=self.basis.device))

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Latents (B, D, h, w) -> codes, indices and losses. Runs in fp32 whatever the autocast."""
        with torch.autocast(z.device.type, enabled=False):
            z = rearrange(z.float(), "b d h w -> b h w d")
            signs = torch.where(z > 0, 1.0, -1.0)
            indices = ((z > 0) * self.basis).sum(dim=-1)
            losses = {"commitment_loss": (z - signs).square().mean()}
            if self.training:  # needs memory for every pair of latent and code
                losses["entropy_loss"] = self.entropy_loss(z.flatten(0, 2))
            z_q = z + (signs - z).detach()  # straight through
            return QuantizerOutput(rearrange(z_q, "b h w d -> b d h w"), indices, losses)

    def entropy_loss(self, z: Tensor) -> Tensor:
        """Entropy of each latent's codes less that of all latents' (N, D), in nats."""
        log_p = (2 * self.inverse_temperature * z @ self.codebook.T).log_softmax(dim=-1)  # -||z - e||^2, but constants
        p = log_p.exp()
        sure = -(p * log_p).sum(dim=-1).mean()
        mean = p.mean(dim=0)
        spread = -(mean * mean.clamp(min=1e-12).log()).sum()  # a code that nobody is near has no finite gradient
        return sure - self.diversity * spread

    def _vectors(self, indices: Tensor) -> Tensor:
        return ((indices[..., None] & self.basis) != 0) * 2.0 - 1

    def codes(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) -> codes (B, D, h, w)."""
        return rearrange(self._vectors(indices), "b h w d -> b d h w")
