"""From pictures to square `images` tensors: resize the short side, crop, flip."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Transform = Callable[..., Tensor]  # (picture, generator=None) -> image


def train_transform(image_size: int, flip: bool = True) -> Transform:
    """Make the paper's training transform: short side to `image_size`, random crop, and with `flip` a mirror image half
    of the time. It turns an RGB picture of any size into (3, image_size, image_size) in [-1, 1].

    The draws come from the generator that it is given, else from torch's global one, which DataLoader seeds in workers.
    """
    return partial(_transform, _checked(image_size), True, flip)


def val_transform(image_size: int) -> Transform:
    """Make the transform without chance: short side to `image_size`, centre crop; range and shape as in training."""
    return partial(_transform, _checked(image_size), False, False)


def _transform(
    image_size: int, random_crop: bool, flip: bool, image: Image.Image, generator: torch.Generator | None = None
) -> Tensor:
    x, y, mirror = torch.rand(3, generator=generator).tolist() if random_crop else (0.5, 0.5, 1.0)
    square = _crop(image, image_size, x, y)
    if flip and mirror < 0.5:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    return pixels.contiguous().float() / 127.5 - 1


def _crop(image: Image.Image, image_size: int, x: float, y: float) -> Image.Image:
    """Resize the short side and crop, in one step: the enlarged strip that a 1 x 4000 image gives never exists."""
    side = min(image.size)
    # The crop begins at a whole pixel of the resized image, so one that has the right size already stays sharp.
    places = [length * image_size // side - image_size + 1 for length in image.size]
    left, top = (int(u * n) * side / image_size for u, n in zip((x, y), places, strict=True))
    box = (left, top, left + side, top + side)
    return image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)  # antialiased when it shrinks


def _checked(image_size: int) -> int:
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    return image_size
