"""Pack images as bytes for the way from a loading process to the device: a quarter of the memory of floats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate


def pack(images: Tensor) -> Tensor:
    """Return images (..., H, W) in [-1, 1] as uint8 if ``unpack`` restores them exactly; else return them unchanged.

    Images from 8-bit files can be restored; those of other types than float32 are returned unchanged.
    """
    if not images.is_floating_point():
        return images
    packed = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return packed if images.dtype == torch.float32 and torch.equal(unpack(packed), images) else images


def unpack(images: Tensor) -> Tensor:
    """Return images (..., H, W) in [-1, 1]: uint8 is converted to float32, floats are returned unchanged."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def packed_collate(samples: list[Any]) -> Any:
    """Collate samples as DataLoader does, and pack their images."""
    batch = default_collate(samples)
    return with_images(batch, pack)


def with_images(batch: Any, function: Any) -> Any:
    """Apply a function to the images of a batch, if it has any under that name."""
    if isinstance(batch, dict) and isinstance(batch.get("images"), Tensor):
        return {**batch, "images": function(batch["images"])}
    return batch
