"""Load two datasets as the training and validation data of a Lightning run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from clipgen.data.byte_images import packed_collate, unpack, with_images
from clipgen.data.permutation import permuted
from clipgen.data.samplers import ResumableSampler, ValidationSampler, batches_done, position_callback
from clipgen.data.source import ResumableStream, skip_counter_of, supports_epoch_index

logger = logging.getLogger(__name__)


class ImageDataModule(pl.LightningDataModule):
    """Batches {"images": (B, 3, H, W) in [-1, 1]} from a training and a validation dataset, map-style or iterable.

    Training batches are shuffled and full. The order of a map-style dataset is a function of ``seed`` and step alone,
    so a resumed run gets the same batches as an uninterrupted one. The datasets are usually ``ImageSource``s, but
    training and validation accept any torch dataset with such samples.

    Args:
        train: training dataset. If it is iterable, it shuffles and splits itself between ranks and workers.
        val: validation dataset, or None.
        batch_size: images per batch on each device.
        num_workers: number of processes that load data; 0 loads in the main process.
        seed: seed of the order and of the random crops.

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
        if batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1, got {batch_size}")
        if num_workers < 0:
            raise ValueError(f"data.num_workers must be at least 0, got {num_workers}")
        if not isinstance(train, IterableDataset):
            num_images = len(train)  # type: ignore[arg-type]
            if num_images < batch_size:
                raise ValueError(
                    f"data.batch_size must be at most {num_images}, the training images, got {batch_size}: give "
                    f"data.batch_size={num_images} or less"
                )
        self.train = train
        self.val = val
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Make the loader of shuffled, full batches; it is endless if the dataset is."""
        sampler = None
        if isinstance(self.train, IterableDataset):
            self._resume_stream()
        else:
            sampler = ResumableSampler.for_trainer(self.trainer, self.train, self.batch_size, self.seed)
        rank = self.trainer.global_rank if self.trainer else 0
        generator = torch.Generator().manual_seed(self.seed + rank)
        return self._loader(self.train, sampler=sampler, drop_last=True, generator=generator)

    def _resume_stream(self) -> None:
        """Move a stream to the position of the run."""
        if not self.trainer or not isinstance(self.train, ResumableStream):
            return
        # Streams are endless, so only limit_train_batches ends an epoch.
        limit = self.trainer.limit_train_batches
        per_epoch = limit if isinstance(limit, int) else None
        done = batches_done(self.trainer)
        callback = position_callback(self.trainer)
        state = callback.stream_state if callback else None
        if done and state is None:
            # Written without the callback, or by an older version: as many batches, which have to be read again.
            logger.info("The checkpoint has no position in the shards: reading what comes before batch %d", done)
            self.train.resume(None, self.batch_size)
            state = self.train.state_after(done, max(self.num_workers, 1))
        self.train.resume(state, self.batch_size, per_epoch, done % per_epoch if per_epoch else 0)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Make the loader of all validation images in order; [] if there are none."""
        if self.val is None:
            return []
        # A stream splits itself between ranks.
        if isinstance(self.val, IterableDataset):
            return self._loader(self.val)
        return self._loader(self.val, sampler=ValidationSampler.for_trainer(self.trainer, self.val, self.batch_size))

    def teardown(self, stage: str) -> None:
        """Log the numbers of used and skipped images."""
        for dataset in (self.train, self.val):
            skip_counter = skip_counter_of(dataset)
            if skip_counter:
                skip_counter.log_summary()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Convert the images of a batch to floats, on the device."""
        return with_images(batch, unpack)

    def _loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
        # Only a trainer calls the hook that unpacks.
        if self.trainer:
            options["collate_fn"] = packed_collate
        return make_loader(dataset, self.batch_size, self.num_workers, **options)


def make_loader(dataset: Dataset[Any], batch_size: int, num_workers: int, **options: Any) -> DataLoader[Any]:
    """Make a loader that keeps its workers between epochs, and pins memory if there is a GPU."""
    return DataLoader(
        dataset,
        batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def training_images(trainer: Any, count: int, batch_size: int) -> Iterator[Tensor]:
    """Yield batches of about ``count`` training images, different ones on every rank, or as many as there are.

    They are read in this process and in another order than in training, whose order and position do not change. Used
    to initialize a model before training starts.
    """
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    if dataset is None or count <= 0:
        return
    if isinstance(dataset, IterableDataset):
        # The copy keeps the position of the stream as it is.
        samples: Iterator[Any] = iter(copy.copy(dataset))
    else:
        samples = _random_samples(dataset, trainer.global_rank, trainer.world_size)
    samples = islice(samples, count)
    while batch := list(islice(samples, batch_size)):
        yield torch.stack([sample["images"] for sample in batch])


def _random_samples(dataset: Any, rank: int, world_size: int) -> Iterator[Any]:
    """Yield the samples of this rank in random order."""
    has_epochs = supports_epoch_index(dataset)
    for item in permuted(len(dataset), 0, range(rank, len(dataset), world_size)):
        yield dataset[(0, item) if has_epochs else item]
