"""Two datasets as the data of a Lightning run."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from clipgen.data.order import Order, batches_done


class ImageData(pl.LightningDataModule):
    """Batches {"images": (B, 3, H, W) in [-1, 1]} from a training and a validation dataset, map-style or iterable.

    Training batches are shuffled and full. The order of a map-style dataset follows from `seed` and step alone, so a
    run that is stopped anywhere and resumed sees what it would have seen.

    Args:
        train: training dataset. If it is iterable it shuffles and splits itself between ranks and workers.
        val: validation dataset, or None.
        batch_size: images in a batch, on each device.
        num_workers: processes that load data; 0 loads in the main process.
        val_batch_size: images in a validation batch; None stands for `batch_size`.
        seed: of the order and of the random crops.

    Raises:
        ValueError: an argument is out of range, or there are too few training images for one batch.
    """

    def __init__(
        self,
        train: Dataset[Any],
        val: Dataset[Any] | None,
        batch_size: int,
        num_workers: int = 0,
        val_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _require("batch_size", batch_size, 1)
        _require("num_workers", num_workers, 0)
        _require("val_batch_size", batch_size if val_batch_size is None else val_batch_size, 1)
        self.train = train
        self.val = val
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_batch_size = val_batch_size or batch_size
        self.seed = seed
        self._require_one_batch(world_size=1)

    def train_dataloader(self) -> DataLoader[Any]:
        """Make the loader of shuffled, full batches; without end if the dataset is."""
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        self._require_one_batch(world_size)
        stream = isinstance(self.train, IterableDataset)
        sampler = None if stream else Order.of(self.trainer, self.train, self.batch_size, self.seed)
        if stream and self.trainer and hasattr(self.train, "resume"):
            done, limit = batches_done(self.trainer), self.trainer.limit_train_batches
            epoch, batches = divmod(done, limit) if isinstance(limit, int) else (0, done)  # streams have no other end
            self.train.resume(epoch, batches, self.batch_size)
        generator = torch.Generator().manual_seed(self.seed + rank)
        return self._loader(self.train, self.batch_size, sampler=sampler, drop_last=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Make the loader of all validation images in order, or none at all."""
        if self.val is None:
            return []
        return self._loader(self.val, self.val_batch_size)

    def teardown(self, stage: str) -> None:
        """Let the datasets that can log a summary do so, and close those that can be closed."""
        for dataset in (self.train, self.val):
            for method in ("summary", "close"):
                getattr(dataset, method, lambda: None)()

    def _loader(self, dataset: Dataset[Any], batch_size: int, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

    def _require_one_batch(self, world_size: int) -> None:
        if isinstance(self.train, IterableDataset):
            return
        share = len(self.train) // world_size  # type: ignore[arg-type]
        if share < self.batch_size:
            raise ValueError(f"batch_size must be at most {share}, the training images a device, got {self.batch_size}")


def _require(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
