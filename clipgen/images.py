"""Check image tensors, convert them to and from PIL images, and write PNG files with metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from clipgen.data.byte_images import unpack
from clipgen.data.color_conversion import to_rgb
from clipgen.data.transforms import val_transform
from clipgen.storage.files import atomic_write


def check_images(images: Tensor) -> None:
    """Raise ValueError unless these are images (B, 3, H, W) of floats; bytes would be taken for nearly white images."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        dtype = str(images.dtype).removeprefix("torch.")
        raise ValueError(f"images must be (B, 3, H, W) floats in [-1, 1], got {dtype} of {tuple(images.shape)}")


def images_from_batch(batch: Any) -> Tensor:
    """Return the images (B, 3, H, W) in [-1, 1] of a batch, which may contain other entries.

    Raises:
        TypeError: the batch is not ``{"images": images}``. Those of torchvision are tuples, with values in [0, 1].
    """
    if isinstance(batch, Mapping) and "images" in batch:
        return batch["images"]
    if isinstance(batch, Mapping):
        got = f"one with {', '.join(map(str, batch))}"
    else:
        got = f"a {type(batch).__name__}"
    raise TypeError(f'a batch must be {{"images": (B, 3, H, W) in [-1, 1]}}, got {got}')


def to_bytes(images: Tensor) -> Tensor:
    """Convert images (..., H, W) in [-1, 1] to uint8 in [0, 255], as an image file stores them; the shape is kept."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def rounded(images: Tensor) -> Tensor:
    """Round images (B, 3, H, W) in [-1, 1] to 8 bits, as an image file stores them: the same shape and range."""
    return unpack(to_bytes(images))


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert images (B, 3, H, W) in [-1, 1] to B PIL images."""
    return [Image.fromarray(image) for image in to_bytes(images).permute(0, 2, 3, 1).cpu().numpy()]


def from_pil(image: Image.Image, size: int | None = None) -> Tensor:
    """Convert the central square of a PIL image, upright, to (1, 3, size, size) in [-1, 1]; None keeps its size."""
    # Broken tags are ignored, as in ``decode_image``.
    with suppress(Exception):
        image = ImageOps.exif_transpose(image)
    rgb = to_rgb(image)
    return val_transform(size or min(rgb.size))(rgb)[None]


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio (B,) in dB of images (B, 3, H, W) in [-1, 1]; at most 100."""
    squared = ((reconstructions - images) / 2).square().mean(dim=(1, 2, 3))
    return -10 * squared.clamp(min=1e-10).log10()


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[Any, Any] | None = None) -> Path:
    """Write a PNG file atomically and return its path.

    Args:
        image: the image.
        path: file to write.
        metadata: text chunks; values that are not strings are written as JSON.
    """
    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    with atomic_write(path) as partial:
        image.save(partial, format="PNG", pnginfo=info)
    return Path(path)
