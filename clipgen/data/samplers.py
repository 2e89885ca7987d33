"""The order in which training and validation go through a map-style dataset, on any number of processes.

The order of training is a function of seed and step alone, so that it can be resumed. Validation counts each item once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import Dataset, DistributedSampler

from clipgen.data.permutation import permuted
from clipgen.data.source import ResumableStream, supports_epoch_index

CHECKPOINT_KEY = "data_position"
STREAM_KEY = "stream_position"


def batches_done(trainer: Any) -> int:
    """Return the number of training batches that a run has processed, including those before a resume.

    Lightning's "completed" count is one too low if the checkpoint was written at the end of a step, and its counters
    may be restored only after the data loaders are made.
    """
    progress: dict[str, Any] = trainer.fit_loop.epoch_loop.batch_progress.state_dict()
    resumed_checkpoint = trainer._checkpoint_connector._loaded_checkpoint
    if resumed_checkpoint:
        progress = resumed_checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    done: int = progress["total"]["processed"]
    return done


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class DataPosition:
    """A position in the training data.

    Args:
        epoch: number of the epoch through the dataset.
        items: items of the epoch that all ranks together have consumed.
        batches: batches of the run at which the position was recorded.
    """

    epoch: int = 0
    items: int = 0
    batches: int = 0


class DataPositionCallback(pl.Callback):
    """Store the position in the training data in checkpoints, as the number of items that all ranks have consumed.

    A run that is resumed on another number of devices, or with another batch size, continues there. Checkpoints without
    a position, those of older versions, are read as if written with the batches of the resumed run.
    """

    def __init__(self) -> None:
        # The position at which the run was resumed.
        self.start = DataPosition()
        self.batches_at_start = 0
        self.stream_state: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        sampler = self._sampler(trainer)
        if sampler:
            checkpoint[CHECKPOINT_KEY] = asdict(sampler.position_after(batches_done(trainer)))
        loader: Any = trainer.train_dataloader
        stream = getattr(loader, "dataset", None)
        if isinstance(stream, ResumableStream):
            batches = batches_done(trainer) - self.batches_at_start
            checkpoint[STREAM_KEY] = stream.state_after(batches, max(loader.num_workers, 1))

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.batches_at_start = batches_done(trainer)
        self.stream_state = checkpoint.get(STREAM_KEY)
        position = checkpoint.get(CHECKPOINT_KEY)
        if position:
            self.start = DataPosition(**{key: int(value) for key, value in position.items()})

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        sampler = self._sampler(trainer)
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        resumed_mid_epoch = self.start.batches and progress.processed
        if sampler is None or trainer.limit_train_batches != 1.0 or not resumed_mid_epoch:
            return
        # Lightning counts the batches of an epoch. Set its count so that its epoch ends with that of the dataset.
        done = sampler.batches
        if self.start.items:
            done -= sampler.batches_left(self.start)
        progress.completed += done - progress.processed
        progress.ready = done
        progress.started = done
        progress.processed = done

    @staticmethod
    def _sampler(trainer: pl.Trainer) -> ResumableSampler | None:
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        return sampler if isinstance(sampler, ResumableSampler) else None


def position_callback(trainer: Any) -> DataPositionCallback | None:
    """Return the callback of a trainer that knows where its run was resumed, if it has one."""
    for callback in trainer.callbacks if trainer else []:
        if isinstance(callback, DataPositionCallback):
            return callback
    return None


class ResumableSampler(DistributedSampler[Any]):
    """Shuffled item indices, epoch after epoch, in full batches only; each epoch has its own order.

    Iterating yields the rest of the current epoch; the next iteration yields the next epoch. If the dataset supports
    epoch indices, items are ``(epoch, index)``, so that their augmentations can differ between epochs.

    Args:
        dataset: a dataset with a length.
        batch_size: items per batch on each rank.
        seed: seed of the order.
        rank: number of this process.
        world_size: number of processes, which get different items.
        trainer: trainer of a Lightning run, which determines the position; None starts with the first epoch.

    Raises:
        ValueError: there is not one batch for each rank.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        trainer: Any = None,
    ):
        super().__init__(dataset, world_size, rank, seed=seed, drop_last=True)
        self.size = len(dataset)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.items_per_step = batch_size * world_size
        self.batches = self.size // self.items_per_step
        if not self.batches:
            raise ValueError(
                f"data.batch_size must be at most {self.size // world_size}, the training images per device, "
                f"got {batch_size}"
            )
        self.yields_epoch = supports_epoch_index(dataset)
        self.trainer = trainer
        # Items of this rank over all epochs; the position if there is no trainer.
        self.consumed = 0

    @classmethod
    def for_trainer(cls, trainer: Any, dataset: Dataset[Any], batch_size: int, seed: int) -> ResumableSampler:
        """Make the sampler of a Lightning run, from its current step on; without a trainer, from the first."""
        if trainer is None:
            return cls(dataset, batch_size, seed)
        return cls(dataset, batch_size, seed, trainer.global_rank, trainer.world_size, trainer)

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: Lightning's epoch counter restarts on a mid-epoch resume, so it is ignored."""

    def __iter__(self) -> Iterator[Any]:
        position = self._position()
        seed = self.seed * 1_000_003 + position.epoch
        end = position.items + self.batches_left(position) * self.items_per_step
        places = range(position.items + self.rank, end, self.num_replicas)
        for item in permuted(self.size, seed, places):
            self.consumed += 1
            yield (position.epoch, item) if self.yields_epoch else item

    def batches_left(self, position: DataPosition) -> int:
        """Return the number of full batches per rank in the rest of the epoch."""
        return max(self.size - position.items, 0) // self.items_per_step

    def position_after(self, batches: int) -> DataPosition:
        """Return the position after a number of batches of the run; those before a resume may have had another size."""
        start = self._start()
        batches_since_start = batches - start.batches
        batches_left = self.batches_left(start)
        if batches_since_start < batches_left:
            return DataPosition(start.epoch, start.items + batches_since_start * self.items_per_step, batches)
        epochs, rest = divmod(batches_since_start - batches_left, self.batches)
        return DataPosition(start.epoch + 1 + epochs, rest * self.items_per_step, batches)

    def _start(self) -> DataPosition:
        """Return the position at which the run was resumed."""
        callback = position_callback(self.trainer)
        return callback.start if callback else DataPosition()

    def _position(self) -> DataPosition:
        if self.trainer is not None:
            # Workers prefetch items that trainer.limit_train_batches leaves unused, so these are not counted here.
            return self.position_after(batches_done(self.trainer))
        epoch, items_of_rank = divmod(self.consumed, len(self))
        return DataPosition(epoch, items_of_rank * self.num_replicas)


# ---------------------------------------------------------------------------------------------------------- validation


class ValidationSampler(DistributedSampler[Any]):
    """Item indices in order, distributed over the ranks in the batches that a single process would make.

    Every rank gets the same number of batches, because sharded networks (FSDP) compute together. A rank that has none
    left repeats the first item, which ``num_real_samples`` excludes.

    Args:
        dataset: a dataset with a length.
        batch_size: items per batch.
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int, rank: int = 0, world_size: int = 1):
        super().__init__(dataset, world_size, rank, shuffle=False)
        self.size = len(dataset)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.batches = math.ceil(self.size / (batch_size * world_size))

    @classmethod
    def for_trainer(cls, trainer: Any, dataset: Dataset[Any], batch_size: int) -> ValidationSampler:
        """Make the sampler of this process of a Lightning run; without a trainer, of a single process."""
        if trainer is None:
            return cls(dataset, batch_size)
        return cls(dataset, batch_size, trainer.global_rank, trainer.world_size)

    def _items(self, batch_idx: int) -> range:
        """Return the item indices of this rank's batch number ``batch_idx``, without repetitions."""
        start = (batch_idx * self.num_replicas + self.rank) * self.batch_size
        return range(min(start, self.size), min(start + self.batch_size, self.size))

    def num_real_samples(self, batch_idx: int) -> int:
        """Return the number of samples to count in this rank's batch; the samples after them are repetitions."""
        return len(self._items(batch_idx))

    def __len__(self) -> int:
        return sum(len(self._items(batch_idx)) or 1 for batch_idx in range(self.batches))

    def __iter__(self) -> Iterator[int]:
        for batch_idx in range(self.batches):
            yield from self._items(batch_idx) or [0]


def num_real_samples(trainer: Any, batch_idx: int, batch_size: int) -> int:
    """Return the number of samples of a validation batch to count, at most ``batch_size``, without repetitions.

    Repetitions come from ``ValidationSampler``, and from torch's ``DistributedSampler``, which Lightning adds to any
    other data loader.
    """
    sampler = getattr(getattr(trainer, "val_dataloaders", None), "sampler", None)
    if isinstance(sampler, ValidationSampler):
        return min(sampler.num_real_samples(batch_idx), batch_size)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return batch_size
    num_items = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    full_batch_size = trainer.val_dataloaders.batch_size or batch_size
    return max(min(num_items - batch_idx * full_batch_size, batch_size), 0)
