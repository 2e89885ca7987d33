"""The networks of VQ-GAN (arXiv:2012.09841): encoder, quantizer, decoder.

Encoder and decoder are pyramids of residual blocks with self-attention at chosen resolutions. The parameters carry
taming-transformers' names, so that published weights load.
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

from clipgen.models.config import AutoencoderConfig, QuantizerConfig
from clipgen.models.quantizers import make_quantizer
from clipgen.models.quantizers.base import QuantizerOutput

NUM_GROUPS = 32  # groups of a group norm, as in VQ-GAN


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each position: (B, C, h, w) -> (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def make_norm(channels: int, eps: float, kernel_size: int = 3) -> nn.Module:
    """Return a group norm, or for 1 x 1 kernels a layer norm, which does not mix positions.

    Raises:
        ValueError: the number of channels is not a multiple of ``NUM_GROUPS``.
    """
    if kernel_size == 1:
        return LayerNorm2d(channels, eps=1e-6)
    if channels % NUM_GROUPS:
        raise ValueError(f"autoencoder.ch must give multiples of {NUM_GROUPS} channels, got {channels}")
    return nn.GroupNorm(NUM_GROUPS, channels, eps=eps)


def make_conv(in_channels: int, out_channels: int, kernel_size: int = 3) -> nn.Conv2d:
    """Return a convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


class ResnetBlock(nn.Module):
    """Residual block, twice (norm, swish, convolution): (B, C_in, h, w) -> (B, C_out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, config: AutoencoderConfig, kernel_size: int = 3):
        super().__init__()
        self.norm1 = make_norm(in_channels, config.norm_eps, kernel_size)
        self.conv1 = make_conv(in_channels, out_channels, kernel_size)
        self.norm2 = make_norm(out_channels, config.norm_eps, kernel_size)
        self.conv2 = make_conv(out_channels, out_channels, kernel_size)
        self.dropout = nn.Dropout(config.dropout)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return shortcut + hidden


class AttnBlock(nn.Module):
    """Residual single-head self-attention over all positions: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, config: AutoencoderConfig):
        super().__init__()
        self.norm = make_norm(channels, config.norm_eps)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q = rearrange(self.q(normed), "b c h w -> b 1 (h w) c")
        k = rearrange(self.k(normed), "b c h w -> b 1 (h w) c")
        v = rearrange(self.v(normed), "b c h w -> b 1 (h w) c")
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halve height and width by a strided convolution, or by averages of four pixels if not ``with_conv``.

    The convolution is padded on the right and at the bottom only, as in taming-transformers.
    """

    def __init__(self, channels: int, with_conv: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by nearest-neighbor interpolation, followed by a convolution if ``with_conv``."""

    def __init__(self, channels: int, with_conv: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResolutionStage(nn.Module):
    """The residual blocks of one resolution, followed by an optional change of resolution.

    Args:
        channels: channels before the first block and after each block.
        attention: apply self-attention after each block.
        config: sizes of the autoencoder.
        kernel_size: kernel size of the residual blocks.
        down: halve the resolution at the end.
        up: double the resolution at the end.
    """

    def __init__(
        self,
        channels: Sequence[int],
        attention: bool,
        config: AutoencoderConfig,
        *,
        kernel_size: int = 3,
        down: bool = False,
        up: bool = False,
    ):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b, config, kernel_size) for a, b in pairwise(channels))
        self.attn = nn.ModuleList(AttnBlock(c, config) for c in channels[1:] if attention)
        if down:
            self.downsample = Downsample(channels[-1], config.resamp_with_conv)
        if up:
            self.upsample = Upsample(channels[-1], config.resamp_with_conv)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


class MidBlock(nn.Module):
    """Residual block, self-attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, config: AutoencoderConfig, kernel_size: int = 3):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, config, kernel_size)
        self.block_2 = ResnetBlock(channels, channels, config, kernel_size)
        self.attn_1 = AttnBlock(channels, config) if config.mid_attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def checkpointed_forward(module: nn.Module, x: Tensor, grad_checkpointing: bool) -> Tensor:
    """Apply a module; with ``grad_checkpointing`` its activations are recomputed in the backward pass.

    Args:
        module: maps a tensor to a tensor, such as a stage of the encoder, (B, C, h, w) -> (B, C', h', w').
        x: input of the module.
        grad_checkpointing: recompute activations: less memory, more time.
    """
    if grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(module, x, use_reentrant=False)
    return module(x)


class Encoder(nn.Module):
    """Encode images (B, 3, H, W) as features (B, z_channels, H / f, W / f).

    With ``encoder_kernel_size`` 1 each feature depends on (almost) its own patch alone: only the strided convolutions
    reach further. Identical patches then map to identical indices regardless of their context, which a small
    transformer learns in far fewer steps; combining patches is left to the decoder.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        kernel_size = config.encoder_kernel_size
        self.grad_checkpointing = config.grad_checkpointing
        self.patch = nn.PixelUnshuffle(config.patch_size)
        self.conv_in = make_conv(3 * config.patch_size**2, config.ch, kernel_size)
        self.down = nn.ModuleList()
        in_channels = config.ch
        for i, mult in enumerate(config.ch_mult):
            channels = [in_channels] + [config.ch * mult] * config.num_res_blocks
            attention = config.resolution // config.patch_size // 2**i in config.attn_resolutions
            down = i < len(config.ch_mult) - 1
            self.down.append(ResolutionStage(channels, attention, config, kernel_size=kernel_size, down=down))
            in_channels = channels[-1]
        self.mid = MidBlock(in_channels, config, kernel_size)
        self.norm_out = make_norm(in_channels, config.norm_eps, kernel_size)
        self.conv_out = make_conv(in_channels, config.z_channels, kernel_size)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(self.patch(images))
        for module in (*self.down, self.mid):
            x = checkpointed_forward(module, x, self.grad_checkpointing)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Decode features (B, z_channels, h, w) to images (B, 3, h * f, w * f)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.grad_checkpointing = config.grad_checkpointing
        in_channels = config.ch * config.ch_mult[-1]
        self.conv_in = nn.Conv2d(config.z_channels, in_channels, 3, padding=1)
        self.mid = MidBlock(in_channels, config)
        # Resolutions are counted up from the lowest one, so that odd sizes find the same stages as in the encoder.
        num_stages = len(config.ch_mult)
        lowest_resolution = config.resolution // config.patch_size // 2 ** (num_stages - 1)
        stages = []
        for i, mult in reversed(list(enumerate(config.ch_mult))):
            attention = lowest_resolution * 2 ** (num_stages - 1 - i) in config.attn_resolutions
            channels = [in_channels] + [config.ch * mult] * (config.num_res_blocks + 1)
            stages.append(ResolutionStage(channels, attention, config, up=i > 0))
            in_channels = channels[-1]
        self.up = nn.ModuleList(reversed(stages))  # up.0 is the highest resolution
        self.norm_out = make_norm(in_channels, config.norm_eps)
        self.conv_out = nn.Conv2d(in_channels, 3 * config.patch_size**2, 3, padding=1)
        self.unpatch = nn.PixelShuffle(config.patch_size)

    def forward(self, z: Tensor) -> Tensor:
        return self.unpatch(self.conv_out(self.forward_features(z)))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the compiled ``forward_features``, which refers to these weights and not to a copy's."""
        return {name: value for name, value in super().__getstate__().items() if name != "forward_features"}

    def forward_features(self, z: Tensor) -> Tensor:
        """Apply all but the last layer: (B, z_channels, h, w) -> (B, ch * ch_mult[0], h * f / p, w * f / p).

        p is ``patch_size``. The last layer is separate because the adaptive weight needs its gradient alone.
        """
        x = self.conv_in(z)
        for module in (self.mid, *reversed(self.up)):
            x = checkpointed_forward(module, x, self.grad_checkpointing)
        return F.silu(self.norm_out(x))

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adaptive weight compares gradients (VQ-GAN, Eq. 7)."""
        return self.conv_out.weight


class Autoencoder(nn.Module):
    """Encoder, quantizer and decoder: all of stage 1 that is needed after training."""

    def __init__(self, config: AutoencoderConfig, quantizer: QuantizerConfig):
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = make_quantizer(quantizer)
        self.quant_conv = nn.Conv2d(config.z_channels, quantizer.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(quantizer.codebook_dim, config.z_channels, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) as latents (B, D, h, w)."""
        return self.quant_conv(self.encoder(images))

    def decode(self, z_q: Tensor) -> Tensor:
        """Decode codes (B, D, h, w) to images (B, 3, H, W)."""
        return self.decoder(self.post_quant_conv(z_q.to(self.post_quant_conv.weight.dtype)))

    def forward(self, images: Tensor) -> tuple[Tensor, QuantizerOutput]:
        """Return the reconstruction (B, 3, H, W) of images (B, 3, H, W) in [-1, 1], and the quantizer's output.

        The reconstruction is not clamped.
        """
        quantized = self.quantize(self.encode(images))
        return self.decode(quantized.z_q), quantized
