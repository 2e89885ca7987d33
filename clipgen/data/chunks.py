"""A data set in pieces that can be read alone, in any order and by any process."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from clipgen.data.webdataset import ImageShards

Batch = tuple[Tensor, list["int | None"]]  # images (B, A, 3, H, W), classes


def runs(count: int, size: int) -> list[range]:
    """0, 1, ..., count - 1 in runs of ``size``."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def pieces(dataset: Any, size: int) -> list[Any]:
    """The tar files of a stream; runs of ``size`` items of anything else."""
    return dataset.urls if isinstance(dataset, ImageShards) else runs(len(dataset), size)


def read(dataset: Any, piece: Any, views: int, batch_size: int) -> Iterator[Batch]:
    """Batches (B, A, 3, H, W) of the usable images of a piece, in order, with their B classes where there are some."""
    if not hasattr(dataset, "views"):
        raise TypeError(f"{type(dataset).__name__} must have a method views(items, count), as ImageFolder has")
    images = dataset.views(piece, views)
    while batch := list(islice(images, max(batch_size // views, 1))):
        pictures, labels = zip(*batch)
        yield torch.stack(pictures), list(labels)


def source_files(dataset: Any) -> list[str]:
    """The files that a data set reads, in order: pieces are numbered by them."""
    return [*getattr(dataset, "files", ()), *getattr(dataset, "urls", ())]
