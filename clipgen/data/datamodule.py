"""Two datasets as the data of a Lightning run."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from clipgen.data.samplers import ResumableSampler, batches_done


class ImageDataModule(pl.LightningDataModule):
    """Batches {"images": (B, 3, H, W) in [-1, 1]} from a training and a validation dataset, map-style or iterable.

    Training batches are shuffled and full. The order of a map-style dataset follows from `seed` and step alone, so a
    run that is stopped anywhere and resumed sees what it would have seen.

    Args:
        train: training dataset. If it is iterable it shuffles and splits itself between ranks and workers.
        val: validation dataset, or None.
        batch_size: images in a batch, on each device.
        num_workers: processes that load data; 0 loads in the main process.
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
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.train, self.val = train, val
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        if not isinstance(train, IterableDataset) and len(train) < batch_size:  # type: ignore[arg-type]
            raise ValueError(f"batch_size must be at most {len(train)}, the training images, got {batch_size}")  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Any]:
        """Make the loader of shuffled, full batches; without end if the dataset is."""
        rank = self.trainer.global_rank if self.trainer else 0
        stream = isinstance(self.train, IterableDataset)
        sampler = None if stream else ResumableSampler.for_trainer(self.trainer, self.train, self.batch_size, self.seed)
        if stream and self.trainer and hasattr(self.train, "resume"):
            done, limit = batches_done(self.trainer), self.trainer.limit_train_batches
            epoch, batches = divmod(done, limit) if isinstance(limit, int) else (0, done)  # streams have no other end
            self.train.resume(epoch, batches, self.batch_size)
        generator = torch.Generator().manual_seed(self.seed + rank)
        return self._loader(self.train, sampler=sampler, drop_last=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Make the loader of all validation images in order, or none at all."""
        if self.val is None:
            return []
        return self._loader(self.val)

    def teardown(self, stage: str) -> None:
        """Let the datasets that count skipped images log the counts."""
        for dataset in (self.train, self.val):
            if tally := getattr(dataset, "tally", None):
                tally.summary()

    def _loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )
