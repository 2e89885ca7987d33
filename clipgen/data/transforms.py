"""Transform PIL images of any size to square image tensors: resize the short side, crop, flip."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Transform = Callable[..., Tensor]  # (image, generator=None) -> (3, H, W)


def train_transform(image_size: int, flip: bool = True) -> Transform:
    """Return the paper's training transform: short side to ``image_size``, random crop, and random horizontal flip.

    It turns an RGB image of any size into (3, image_size, image_size) in [-1, 1]. Random numbers come from the
    generator that is passed as second argument, else from torch's global one, which DataLoader seeds in workers.
    """
    return partial(_transform, _require_size(image_size), True, flip)


def val_transform(image_size: int) -> Transform:
    """Return the deterministic transform: short side to ``image_size``, center crop; range and shape as in training."""
    return partial(_transform, _require_size(image_size), False, False)


def _transform(
    image_size: int,
    random_crop: bool,
    flip: bool,
    image: Image.Image,
    generator: torch.Generator | None = None,
) -> Tensor:
    x = y = flip_uniform = 0.5
    if random_crop:
        x, y, flip_uniform = torch.rand(3, generator=generator).tolist()
    square = _resize_and_crop(image, image_size, x, y)
    if flip and flip_uniform < 0.5:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    return pixels.contiguous().float() / 127.5 - 1


def _resize_and_crop(image: Image.Image, image_size: int, x: float, y: float) -> Image.Image:
    """Resize the short side and crop at the relative position (x, y).

    Both are done in one step, so that a 1 x 4000 image is not enlarged to a huge strip first.
    """
    side = min(image.size)
    left = _crop_start(image.width, side, image_size, x)
    top = _crop_start(image.height, side, image_size, y)
    box = (left, top, left + side, top + side)
    # Pillow's resampling is antialiased when it shrinks.
    return image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)


def _crop_start(length: int, side: int, image_size: int, position: float) -> float:
    """Return the start of the crop along one axis, in pixels of the original image.

    It starts at a whole pixel of the resized image, so an image that already has the right size stays sharp.
    """
    num_starts = length * image_size // side - image_size + 1
    return int(position * num_starts) * side / image_size


def _require_size(image_size: int) -> int:
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    return image_size
