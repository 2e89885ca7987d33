"""Rule-based evaluator of the shapes data: reads size, color, shape and background from an image, without a network.

Colors are the nearest named ones. The silhouette is shifted so that its centroid lies in the center of the image, and
is compared with templates of every shape at every radius.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.data.shapes import BACKGROUNDS, COLORS, RADII, SHAPES, Attributes, rgb, silhouettes

ATTRIBUTES = ("shape", "color", "size", "background")
UNKNOWN = "nothing"  # shape and size of an image without a known silhouette
MIN_OVERLAP = 0.7  # smallest intersection over union of a silhouette with a known shape


def evaluate_shapes(images: Tensor) -> list[Attributes]:
    """Read the attributes of images (B, 3, H, H) in [-1, 1].

    Returns:
        B attributes; shape and size are ``UNKNOWN`` if no template overlaps enough.

    Raises:
        ValueError: the images have another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be (B, 3, H, H), got {tuple(images.shape)}")
    images = images.detach().float().cpu()
    background, background_names = read_background(images)
    foreground, color_names = read_color(images, background)
    silhouette_names = read_silhouette(coverage(images, background, foreground))
    attributes = []
    for (shape, size), color, background_name in zip(silhouette_names, color_names, background_names):
        attributes.append(Attributes(size, color, shape, background_name))
    return attributes


def matches(images: Tensor, expected: Sequence[Attributes]) -> Tensor:
    """Return whether images (B, 3, H, W) show what is expected, (B, 5) bool: all attributes at once, then each."""
    rows = []
    for actual, wanted in zip(evaluate_shapes(images), expected, strict=True):
        rows.append([getattr(actual, name) == getattr(wanted, name) for name in ATTRIBUTES])
    correct = torch.tensor(rows)
    return torch.cat([correct.all(dim=1, keepdim=True), correct], dim=1)


def accuracy(images: Tensor, expected: Sequence[Attributes]) -> dict[str, float]:
    """Return the fraction of images (B, 3, H, W) that show what is expected: ``all`` attributes at once, and each."""
    return dict(zip(("all", *ATTRIBUTES), matches(images, expected).double().mean(dim=0).tolist()))


def nearest_names(colors: Tensor, named: dict[str, tuple[int, int, int]]) -> list[str]:
    """Return the names of the colors that are nearest to (B, 3)."""
    names = list(named)
    return [names[i] for i in torch.cdist(colors, rgb(list(named.values()))).argmin(dim=1)]


def read_background(images: Tensor) -> tuple[Tensor, list[str]]:
    """Return the background color (B, 3), the median of the four corners, and its name."""
    side = max(images.shape[-1] // 10, 1)
    top_and_bottom = torch.cat([images[:, :, :side], images[:, :, -side:]], dim=2)
    corners = torch.cat([top_and_bottom[..., :side], top_and_bottom[..., -side:]], dim=3)
    color = corners.flatten(2).median(dim=2).values
    return color, nearest_names(color, BACKGROUNDS)


def read_color(images: Tensor, background: Tensor) -> tuple[Tensor, list[str]]:
    """Return the foreground color (B, 3), the mean of the pixels farthest from the background, and its name."""
    pixels = images.flatten(2)  # (B, 3, H*W)
    contrast = (pixels - background[:, :, None]).norm(dim=1)
    weight = (contrast > 0.7 * contrast.quantile(0.98, dim=1, keepdim=True)).float()
    color = (pixels * weight[:, None]).sum(2) / weight.sum(1).clamp(min=1)[:, None]
    return color, nearest_names(color, COLORS)


def coverage(images: Tensor, background: Tensor, foreground: Tensor) -> Tensor:
    """Return the fraction of each pixel that is foreground, (B, H, W): its position between the two colors."""
    line = (foreground - background)[:, :, None, None]
    position = ((images - background[:, :, None, None]) * line).sum(1) / line.square().sum(1).clamp(min=1e-3)
    # Faint tints of the background do not belong to the silhouette.
    return ((position - 0.2) / 0.6).clamp(0, 1)


def centered(masks: Tensor) -> Tensor:
    """Shift masks (B, H, W) so that their centroids lie in the center."""
    size = masks.shape[-1]
    # grid_sample's coordinates of the pixel centers.
    axis = (torch.arange(size) * 2 + 1) / size - 1
    total = masks.sum((1, 2)).clamp(min=1e-6)
    theta = torch.eye(2, 3).repeat(len(masks), 1, 1)
    theta[:, 0, 2] = (masks.sum(1) * axis).sum(1) / total
    theta[:, 1, 2] = (masks.sum(2) * axis).sum(1) / total
    grid = F.affine_grid(theta, [len(masks), 1, size, size], align_corners=False)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


@lru_cache(maxsize=4)
def templates(image_size: int) -> tuple[Tensor, list[tuple[str, str]]]:
    """Return centered masks (N, H, W) of every shape, from smaller than "small" to larger than "large", with names."""
    border = (RADII["small"][-1] + RADII["large"][0]) / 2
    radii = torch.arange(RADII["small"][0] - 1, RADII["large"][-1] + 1, 0.5)
    masks = []
    names = []
    for shape in SHAPES:
        masks.append(silhouettes(shape, radii * image_size / 32, torch.zeros(len(radii), 2), image_size))
        for radius in radii:
            names.append((shape, "small" if radius < border else "large"))
    return centered(torch.cat(masks)), names


def read_silhouette(masks: Tensor) -> list[tuple[str, str]]:
    """Return shape and size of masks (B, H, W): those of the template with the largest intersection over union."""
    template_masks, names = templates(masks.shape[-1])
    template_masks = template_masks.flatten(1)
    masks = centered(masks).flatten(1)
    intersection = torch.stack([torch.minimum(mask, template_masks).sum(1) for mask in masks])  # (B, N)
    union = masks.sum(1)[:, None] + template_masks.sum(1) - intersection
    best = (intersection / union.clamp(min=1e-6)).max(dim=1)
    silhouettes_read = []
    for overlap, index in zip(best.values, best.indices):
        silhouettes_read.append(names[index] if overlap >= MIN_OVERLAP else (UNKNOWN, UNKNOWN))
    return silhouettes_read
