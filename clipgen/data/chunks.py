"""Split datasets into chunks that processes can read independently, and read chunks in batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from clipgen.data.source import Chunk, ImageSource

Batch = tuple[Tensor, list["int | None"]]  # images (B, A, 3, H, W) with A augmentations, classes


def index_ranges(count: int, size: int) -> list[range]:
    """Split the indices 0, 1, ..., count - 1 into ranges of ``size``; the last one may be shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def iter_batches(source: ImageSource, chunk: Chunk, num_views: int, batch_size: int) -> Iterator[Batch]:
    """Yield batches of the usable images of a chunk, in order.

    Args:
        source: source of the images.
        chunk: one of ``source.split_into_chunks(...)``.
        num_views: augmentations of each image.
        batch_size: crops per batch, at least those of one image.

    Yields:
        Images (B, num_views, 3, H, W) in [-1, 1], and their B classes or B times None.
    """
    images_per_batch = max(batch_size // num_views, 1)
    images = source.augmented_views(chunk, num_views)
    while True:
        batch = list(islice(images, images_per_batch))
        if not batch:
            return
        views, labels = zip(*batch)
        yield torch.stack(views), list(labels)
