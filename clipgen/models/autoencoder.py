"""The network of VQ-GAN (arXiv:2012.09841): encoder, quantizer, decoder. The first and the last are pyramids of
residual blocks with attention at chosen resolutions.

The parameters carry taming-transformers' names, so that published weights fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipgen.models.quantizers.lookup_free import FSQ, LFQ
from clipgen.models.quantizers.vector import GumbelQuantizer, QuantizerOutput, VectorQuantizer

QUANTIZERS = ("euclidean", "cosine", "fsq", "lfq", "gumbel")


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each position alone: (B, C, h, w) -> (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def norm(channels: int, local: bool = False) -> nn.Module:
    return LayerNorm2d(channels, eps=1e-6) if local else nn.GroupNorm(32, channels, eps=1e-6)


def conv(in_channels: int, out_channels: int, local: bool = False) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1) if local else nn.Conv2d(in_channels, out_channels, 3, padding=1)


class ResnetBlock(nn.Module):
    """norm, swish, conv, twice, beside a shortcut: (B, C_in, h, w) -> (B, C_out, h, w).

    A ``local`` block sees one position at a time: its kernels are 1 x 1, its norms are over channels.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float, local: bool = False):
        super().__init__()
        self.norm1, self.conv1 = norm(in_channels, local), conv(in_channels, out_channels, local)
        self.norm2, self.conv2 = norm(out_channels, local), conv(out_channels, out_channels, local)
        self.dropout = nn.Dropout(dropout)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Self-attention of one head over all positions, beside a shortcut: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halve height and width by a strided convolution, padded on the right and below only; without ``with_conv`` by
    means of four."""

    def __init__(self, channels: int, with_conv: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then (``with_conv``) a convolution."""

    def __init__(self, channels: int, with_conv: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResolutionStage(nn.Module):
    """The blocks of one resolution, then (``down``) or (``up``) a change of it."""

    def __init__(
        self,
        channels: Sequence[int],
        attention: bool,
        dropout: float,
        *,
        local: bool = False,
        down: bool = False,
        up: bool = False,
        resamp_with_conv: bool = True,
    ):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b, dropout, local) for a, b in pairwise(channels))
        self.attn = nn.ModuleList(AttnBlock(c) for c in channels[1:] if attention)
        if down:
            self.downsample = Downsample(channels[-1], resamp_with_conv)
        if up:
            self.upsample = Upsample(channels[-1], resamp_with_conv)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if self.attn else x
        if hasattr(self, "downsample"):
            return self.downsample(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class MidBlock(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, attention: bool, dropout: float, local: bool = False):
        super().__init__()
        self.block_1, self.block_2 = (ResnetBlock(channels, channels, dropout, local) for _ in range(2))
        self.attn_1 = AttnBlock(channels) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def checkpointed_forward(part: nn.Module, x: Tensor, checkpointing: bool) -> Tensor:
    """part(x), whose inner activations are computed again in the backward pass where ``checkpointing``."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(part, x, use_reentrant=False)
    return part(x)


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, z_channels, H / f, W / f), f = patch_size * 2 ** (len(ch_mult) - 1).

    Args:
        ch: channels at the first level; ``ch_mult`` multiplies them level by level.
        num_res_blocks: residual blocks a level.
        attn_resolutions: resolutions with attention, counted down from ``resolution``.
        resolution: the nominal height of the images; any size divisible by f is accepted.
        z_channels: channels of the features.
        patch_size: pixels are first folded into channels, patch by patch. 1 is VQ-GAN; 2 or 4 spare the costly
            work at full resolution where a CPU has to do it.
        mid_attention: attend to all positions in the middle, as VQ-GAN does.
        resamp_with_conv: change the resolution by convolutions, as all published VQ-GANs do.
        checkpointing: keep only what enters each level, and compute the rest again in the backward pass: less memory,
            more time.
        local: each feature is a function of its own patch alone (1 x 1 kernels, norms over channels; only strided
            convolutions reach further). Equal patches then get equal indices wherever and beside whatever they stand,
            which a small transformer learns in a fraction of the steps; putting them together is left to the decoder.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        resolution: int,
        z_channels: int,
        patch_size: int = 1,
        mid_attention: bool = True,
        resamp_with_conv: bool = True,
        dropout: float = 0.0,
        checkpointing: bool = False,
        local: bool = False,
    ):
        super().__init__()
        self.checkpointing = checkpointing
        self.patch = nn.PixelUnshuffle(patch_size)
        self.conv_in = conv(3 * patch_size**2, ch, local)
        self.down, before = nn.ModuleList(), ch
        for i, mult in enumerate(ch_mult):
            attention = resolution // patch_size // 2**i in attn_resolutions
            channels = [before] + [ch * mult] * num_res_blocks
            resampling = dict(down=i < len(ch_mult) - 1, resamp_with_conv=resamp_with_conv)
            self.down.append(ResolutionStage(channels, attention, dropout, local=local, **resampling))
            before = channels[-1]
        self.mid = MidBlock(before, mid_attention, dropout, local)
        self.norm_out, self.conv_out = norm(before, local), conv(before, z_channels, local)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(self.patch(images))
        for part in (*self.down, self.mid):
            x = checkpointed_forward(part, x, self.checkpointing)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) -> images (B, 3, h * f, w * f); the arguments are the encoder's."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        resolution: int,
        z_channels: int,
        patch_size: int = 1,
        mid_attention: bool = True,
        resamp_with_conv: bool = True,
        dropout: float = 0.0,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.checkpointing = checkpointing
        before = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, before, 3, padding=1)
        self.mid = MidBlock(before, mid_attention, dropout)
        levels, lowest = [], resolution // patch_size // 2 ** (len(ch_mult) - 1)  # counted up from there
        for i, mult in reversed(list(enumerate(ch_mult))):
            attention = lowest * 2 ** (len(ch_mult) - 1 - i) in attn_resolutions
            channels = [before] + [ch * mult] * (num_res_blocks + 1)
            levels.append(ResolutionStage(channels, attention, dropout, up=i > 0, resamp_with_conv=resamp_with_conv))
            before = channels[-1]
        self.up = nn.ModuleList(reversed(levels))  # up.0 is the highest resolution
        self.norm_out, self.conv_out = norm(before), nn.Conv2d(before, 3 * patch_size**2, 3, padding=1)
        self.unpatch = nn.PixelShuffle(patch_size)

    def forward(self, z: Tensor) -> Tensor:
        return self.unpatch(self.conv_out(self.trunk(z)))

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: not what torch.compile made of ``trunk``, which holds on to these weights."""
        return {name: value for name, value in super().__getstate__().items() if name != "trunk"}

    def trunk(self, z: Tensor) -> Tensor:
        """All but the last layer, which stays apart because the adaptive weight asks for its gradients alone."""
        x = self.conv_in(z)
        for part in (self.mid, *reversed(self.up)):
            x = checkpointed_forward(part, x, self.checkpointing)
        return F.silu(self.norm_out(x))

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adaptive weight of VQ-GAN compares gradients (its Eq. 7)."""
        return self.conv_out.weight


class Autoencoder(nn.Module):
    """Images -> latents -> codes -> images: all of stage 1 that is needed once it is trained.

    Args:
        quantizer: ``"euclidean"`` (the paper) or ``"cosine"``: ``VectorQuantizer``; ``"fsq"``, ``"lfq"``:
            ``lookup_free``; ``"gumbel"``: ``GumbelQuantizer``.
        codebook_size, codebook_dim: K, D. levels: of FSQ, whose product is K and whose number is D.
        dead_code_reset_after, codebook_ema_decay, kmeans_iters: see ``VectorQuantizer``.
        norm_eps: of the group norms; HFAiLab/clip-gen's weights want 1e-5.
        local_encoder: ``local`` of the encoder alone. The rest: see ``Encoder``.
    """

    def __init__(
        self,
        *,
        quantizer: str,
        codebook_size: int,
        codebook_dim: int,
        levels: Sequence[int] | None = None,
        dead_code_reset_after: int = 0,
        codebook_ema_decay: float = 0.0,
        kmeans_iters: int = 0,
        z_channels: int,
        local_encoder: bool = False,
        norm_eps: float = 1e-6,
        **sizes: Any,
    ):
        super().__init__()
        self.encoder = Encoder(z_channels=z_channels, local=local_encoder, **sizes)
        self.decoder = Decoder(z_channels=z_channels, **sizes)
        self.quantize = make_quantizer(
            quantizer,
            codebook_size,
            codebook_dim,
            levels,
            dead_code_reset_after=dead_code_reset_after,
            codebook_ema_decay=codebook_ema_decay,
            kmeans_iters=kmeans_iters,
        )
        self.quant_conv = nn.Conv2d(z_channels, codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_dim, z_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.eps = norm_eps

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> latents (B, D, h, w)."""
        return self.quant_conv(self.encoder(images))

    def decode(self, z_q: Tensor) -> Tensor:
        """Codes (B, D, h, w) -> images (B, 3, H, W)."""
        return self.decoder(self.post_quant_conv(z_q.to(self.post_quant_conv.weight.dtype)))

    def forward(self, images: Tensor) -> tuple[Tensor, QuantizerOutput]:
        """Images -> reconstruction, and what the quantizer returned."""
        quantized = self.quantize(self.encode(images))
        return self.decode(quantized.z_q), quantized


def make_quantizer(
    kind: str, codebook_size: int, codebook_dim: int, levels: Sequence[int] | None, **learned: Any
) -> Any:
    """The quantizer of a name; ValueError where its sizes do not go together. ``learned``: of ``VectorQuantizer``."""
    if kind not in QUANTIZERS:
        raise ValueError(f"quantizer must be one of {', '.join(QUANTIZERS)}, got {kind!r}")
    if kind in ("euclidean", "cosine"):
        return VectorQuantizer(codebook_size, codebook_dim, kind, **learned)
    if used := [f"{name}={value}" for name, value in learned.items() if value]:
        raise ValueError(f"quantizer {kind!r} does not move its codes: leave out {', '.join(used)}")
    if kind == "gumbel":
        return GumbelQuantizer(codebook_size, codebook_dim)
    if kind == "fsq" and not levels:
        raise ValueError("levels must be given for quantizer 'fsq', as in [8, 5, 5, 5], got none")
    made, dim = (FSQ(levels or ()), len(levels or ())) if kind == "fsq" else (LFQ(codebook_dim), codebook_dim)
    if (codebook_size, codebook_dim) != (made.codebook_size, dim):
        raise ValueError(
            f"codebook_size and codebook_dim must be {made.codebook_size} and {dim} for quantizer {kind!r}"
            f"{f' of levels {list(levels)}' if levels else ''}, got {codebook_size} and {codebook_dim}"
        )
    return made
