"""Training images beside the training loop, for what has to see some before it begins."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset


def training_images(trainer: Any, count: int, batch_size: int) -> Iterator[Tensor]:
    """Yield batches of about ``count`` training images, other ones on every rank, or as many as there are.

    They are read in this process and in an order of their own, so that the training's own order does not notice.
    """
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    if dataset is None or count <= 0:
        return
    items = _streamed(dataset) if isinstance(dataset, IterableDataset) else _drawn(trainer, dataset)
    images: list[Tensor] = []
    for _, item in zip(range(count), items):
        images.append(item["images"])
        if len(images) == batch_size:
            yield torch.stack(images)
            images = []
    if images:
        yield torch.stack(images)


def _streamed(dataset: Any) -> Iterator[Any]:
    """Yield the items of a stream, whose position is left as it is."""
    yield from copy.copy(dataset)


def _drawn(trainer: Any, dataset: Any) -> Iterator[Any]:
    """Yield the items of this rank in random order."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    for item in order[trainer.global_rank :: trainer.world_size].tolist():
        yield dataset[(0, item) if getattr(dataset, "counts_passes", False) else item]
