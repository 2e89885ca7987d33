"""Layers of class-conditional GANs for inference: spectral norms are folded into the weights before they are loaded.

SAGAN: Zhang et al. 2018, arXiv:1805.08318. BigGAN and BigGAN-deep: Brock et al. 2018, arXiv:1809.11096, Appendix B.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

MAX_DEVIATIONS = 2.0  # standard deviations at which the truncated normal ends


def truncated_normal(noise: Tensor, truncation: float) -> Tensor:
    """Map standard normal noise to a normal cut at two standard deviations, scaled by ``truncation``.

    The map is monotonic and acts on each number alone, so an image still follows from its own noise
    (the truncation trick: arXiv:1809.11096, Sec. 3.1).

    Args:
        noise: standard normal, any shape.
        truncation: scale in (0, 1].
    """
    # In the cut distribution a quantile u is the quantile low + u (high - low) of the normal.
    low, high = torch.special.ndtr(torch.tensor([-MAX_DEVIATIONS, MAX_DEVIATIONS], dtype=torch.float64)).tolist()
    quantile = low + torch.special.ndtr(noise.double().cpu()) * (high - low)
    return (torch.special.ndtri(quantile) * truncation).to(noise)


def upsample(x: Tensor) -> Tensor:
    """Double height and width by nearest neighbor: (B, C, H, W) -> (B, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2)


def affine(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Scale and shift each channel of each image: x (B, C, H, W), gain and bias (B, C) or (1, C)."""
    return x * gain[:, :, None, None] + bias[:, :, None, None]


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose gain and bias are linear in the condition; with stored statistics, which training updates.

    Args:
        channels: channels of the input.
        condition_dim: width of the condition.
        eps: added to the variance.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, condition_dim: int, eps: float):
        super().__init__()
        self.gain = nn.Linear(condition_dim, channels, bias=False)
        self.bias = nn.Linear(condition_dim, channels, bias=False)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return ``normalize(x) * (1 + gain(c)) + bias(c)``: (B, C, H, W), (B, D) -> (B, C, H, W)."""
        x = F.batch_norm(x, self.mean, self.var, training=self.training, eps=self.eps)
        return affine(x, 1 + self.gain(condition), self.bias(condition))


class FixedBatchNorm(nn.Module):
    """Batch norm with a learned gain and bias (the last norm of a generator), and statistics as above.

    Args:
        channels: channels of the input.
        eps: added to the variance.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, (B, C, H, W)."""
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, training=self.training, eps=self.eps)


class ResidualBlock(nn.Module):
    """Generator block of BigGAN and of StudioGAN's SAGAN, which doubles the resolution (arXiv:1809.11096, Fig. 15b).

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        condition_dim: width of the condition of both norms.
        eps: epsilon of the norms.
    """

    def __init__(self, channels_in: int, channels_out: int, condition_dim: int, eps: float):
        super().__init__()
        self.norm1 = ConditionalBatchNorm(channels_in, condition_dim, eps)
        self.norm2 = ConditionalBatchNorm(channels_out, condition_dim, eps)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Apply the block: (B, C, H, W), (B, D) -> (B, C', 2H, 2W)."""
        hidden = self.conv1(upsample(self.norm1(x, condition).relu()))
        hidden = self.conv2(self.norm2(hidden, condition).relu())
        return hidden + self.shortcut(upsample(x))


class SelfAttention(nn.Module):
    """Self-attention over positions, keys and values max-pooled 2 x 2 (arXiv:1805.08318, Sec. 3).

    Args:
        channels: channels of input and output.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.theta = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.phi = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.g = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.o = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + gamma * o(attention)``, (B, C, H, W)."""
        query = rearrange(self.theta(x), "b c h w -> b (h w) c")
        key = rearrange(F.max_pool2d(self.phi(x), 2), "b c h w -> b c (h w)")
        value = rearrange(F.max_pool2d(self.g(x), 2), "b c h w -> b (h w) c")
        weights = (query @ key).softmax(dim=-1)  # (B, HW, HW / 4); not scaled by the square root of the width
        attended = rearrange(weights @ value, "b (h w) c -> b c h w", h=x.shape[2])
        return x + self.gamma * self.o(attended)
