"""A rule-based judge of the shapes set: reads size, colour, shape and background back from an image, without a network.

Colours are the nearest named ones; the silhouette is moved so that its centroid lies in the middle, and compared with
templates of every shape at every radius.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.data.shapes import BACKGROUNDS, COLORS, RADII, SHAPES, Attributes, rgb, silhouettes

ATTRIBUTES = ("shape", "color", "size", "background")
NOTHING = "nothing"  # the judge's word where an image shows no silhouette that it knows
MIN_OVERLAP = 0.7  # intersection over union under which a silhouette is no known shape


def judge(images: Tensor) -> list[Attributes]:
    """Read the attributes back from images.

    Args:
        images: (B, 3, H, H) in [-1, 1].

    Returns:
        One ``Attributes`` an image; its shape and size are ``"nothing"`` where no template overlaps enough.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be (B, 3, H, H), got {tuple(images.shape)}")
    images = images.detach().float().cpu()
    background, background_names = read_background(images)
    foreground, color_names = read_color(images, background)
    masks = coverage(images, background, foreground)
    return [
        Attributes(size, color, shape, ground)
        for (shape, size), color, ground in zip(read_silhouette(masks), color_names, background_names)
    ]


def matches(images: Tensor, expected: Sequence[Attributes]) -> Tensor:
    """Whether images (B, 3, H, H) show what is expected, (B, 5) bool: all attributes at once, then each alone."""
    pairs = zip(judge(images), expected, strict=True)
    each = torch.tensor([[getattr(f, name) == getattr(e, name) for name in ATTRIBUTES] for f, e in pairs])
    return torch.cat([each.all(dim=1, keepdim=True), each], dim=1)


def accuracy(images: Tensor, expected: Sequence[Attributes]) -> dict[str, float]:
    """Part of the images (B, 3, H, H) that show what is expected: ``all`` attributes at once, and each alone."""
    return dict(zip(("all", *ATTRIBUTES), matches(images, expected).double().mean(dim=0).tolist()))


def nearest(colors: Tensor, names: dict[str, tuple[int, int, int]]) -> list[str]:
    """Names of the colours nearest to (B, 3)."""
    return [list(names)[i] for i in torch.cdist(colors, rgb(list(names.values()))).argmin(dim=1)]


def read_background(images: Tensor) -> tuple[Tensor, list[str]]:
    """Background colour (B, 3) and its name: the median of the four corners."""
    k = max(images.shape[-1] // 10, 1)
    corners = [
        images[:, :, rows, columns].flatten(2)
        for rows in (slice(k), slice(-k, None))
        for columns in (slice(k), slice(-k, None))
    ]
    color = torch.cat(corners, dim=2).median(dim=2).values
    return color, nearest(color, BACKGROUNDS)


def read_color(images: Tensor, background: Tensor) -> tuple[Tensor, list[str]]:
    """Foreground colour (B, 3) and its name: the mean of the pixels that differ most from the background."""
    pixels = images.flatten(2)  # (B, 3, H*W)
    contrast = (pixels - background[:, :, None]).norm(dim=1)
    weight = (contrast > 0.7 * contrast.quantile(0.98, dim=1, keepdim=True)).float()
    color = (pixels * weight[:, None]).sum(2) / weight.sum(1).clamp(min=1)[:, None]
    return color, nearest(color, COLORS)


def coverage(images: Tensor, background: Tensor, foreground: Tensor) -> Tensor:
    """How much of each pixel is foreground, (B, H, W) in [0, 1]: its place on the line between the two colours."""
    line = (foreground - background)[:, :, None, None]
    place = ((images - background[:, :, None, None]) * line).sum(1) / line.square().sum(1).clamp(min=1e-3)
    return ((place - 0.2) / 0.6).clamp(0, 1)  # faint tints of the background are no part of the silhouette


def centered(masks: Tensor) -> Tensor:
    """Move masks (B, H, W) so that their centroids lie in the middle."""
    size = masks.shape[-1]
    axis = (torch.arange(size) * 2 + 1) / size - 1  # grid_sample's coordinates of pixel centres
    total = masks.sum((1, 2)).clamp(min=1e-6)
    x = (masks.sum(1) * axis).sum(1) / total
    y = (masks.sum(2) * axis).sum(1) / total
    theta = torch.eye(2, 3).repeat(len(masks), 1, 1)
    theta[:, 0, 2], theta[:, 1, 2] = x, y
    grid = F.affine_grid(theta, [len(masks), 1, size, size], align_corners=False)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


@lru_cache(maxsize=4)
def templates(image_size: int) -> tuple[Tensor, list[tuple[str, str]]]:
    """Centred masks (N, H, W) of every shape at radii from under "small" to over "large", with their names."""
    border = (RADII["small"][-1] + RADII["large"][0]) / 2
    radii = torch.arange(RADII["small"][0] - 1, RADII["large"][-1] + 1, 0.5)
    sizes = ["small" if radius < border else "large" for radius in radii]
    masks = [silhouettes(s, radii * image_size / 32, torch.zeros(len(radii), 2), image_size) for s in SHAPES]
    return centered(torch.cat(masks)), [(shape, size) for shape in SHAPES for size in sizes]


def read_silhouette(masks: Tensor) -> list[tuple[str, str]]:
    """Shape and size of masks (B, H, W): those of the template with the largest soft intersection over union."""
    known, names = templates(masks.shape[-1])
    masks, known = centered(masks).flatten(1), known.flatten(1)
    inside = torch.stack([torch.minimum(mask, known).sum(1) for mask in masks])  # (B, N)
    overlap = inside / (masks.sum(1)[:, None] + known.sum(1) - inside).clamp(min=1e-6)
    best = overlap.max(dim=1)
    return [names[i] if value >= MIN_OVERLAP else (NOTHING, NOTHING) for value, i in zip(best.values, best.indices)]
