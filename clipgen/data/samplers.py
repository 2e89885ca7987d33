"""The order in which training goes through a dataset: a function of seed and step alone, so that it can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import Dataset, DistributedSampler


def batches_done(trainer: Any) -> int:
    """Training batches that a run has processed, those before a resume included.

    What Lightning calls completed is one less where the checkpoint was written at the end of a step, and its counters
    may be restored after the loaders are made.
    """
    progress: dict[str, Any] = trainer.fit_loop.epoch_loop.batch_progress.state_dict()
    if resumed := trainer._checkpoint_connector._loaded_checkpoint:
        progress = resumed["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    done: int = progress["total"]["processed"]
    return done


@dataclass(frozen=True)
class Place:
    """A place in the training data: after ``items`` of pass ``turn``, counted over all ranks, and where it was counted:
    after ``batches`` of the run."""

    turn: int = 0
    items: int = 0
    batches: int = 0


class DataPlace(pl.Callback):
    """Keep the place in the training data in checkpoints, as the number of items that all ranks have consumed.

    A run that is resumed on another number of devices, or with another batch size, continues there. A checkpoint
    without a place, of an older version or of a stream, is read as written with the batches of the resumed run.
    """

    def __init__(self) -> None:
        self.start = Place()  # of this process's part of the run

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if sampler := self._sampler(trainer):
            checkpoint["data_place"] = asdict(sampler.place_after(batches_done(trainer)))

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if place := checkpoint.get("data_place"):
            self.start = Place(**{key: int(value) for key, value in place.items()})

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        sampler = self._sampler(trainer)
        current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if sampler is None or trainer.limit_train_batches != 1.0 or not (self.start.batches and current.processed):
            return
        # Lightning counts the batches of an epoch: the rest of the pass must be the rest of the epoch
        done = sampler.batches - sampler.batches_left(self.start) if self.start.items else sampler.batches
        current.completed += done - current.processed
        current.ready = current.started = current.processed = done

    @staticmethod
    def _sampler(trainer: pl.Trainer) -> ResumableSampler | None:
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        return sampler if isinstance(sampler, ResumableSampler) else None


class ResumableSampler(DistributedSampler[Any]):
    """Shuffled item numbers, one pass after another, each pass in an order of its own; passes hold full batches only.

    Iterating goes through the rest of the pass that has begun, then through the next one. A dataset with a true
    ``counts_passes`` is asked for item ``i`` of pass ``p`` as ``(p, i)``: it can draw other crops then.

    Args:
        dataset: with a length. batch_size: items in a batch, on each rank.
        rank, world_size: each rank gets items of its own.
        trainer: of a Lightning run, which knows where it stands, as after a resume; None begins with the first pass.

    Raises:
        ValueError: there is not one batch for each rank.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, seed: int, rank: int = 0, world_size: int = 1, trainer: Any = None
    ):
        super().__init__(dataset, world_size, rank, seed=seed, drop_last=True)
        self.size = len(dataset)  # type: ignore[arg-type]
        self.batch_size, self.step = batch_size, batch_size * world_size  # items of a step on each rank, on all
        self.batches = self.size // self.step
        if not self.batches:
            at_most = self.size // world_size
            raise ValueError(f"batch_size must be at most {at_most}, the training images a device, got {batch_size}")
        self.counts_passes = getattr(dataset, "counts_passes", False)
        self.consumed, self.trainer = 0, trainer  # items without a trainer, over all passes

    @classmethod
    def for_trainer(cls, trainer: Any, dataset: Dataset[Any], batch_size: int, seed: int) -> ResumableSampler:
        """For a Lightning run, from the step at which it stands; without a trainer, from the first."""
        if trainer is None:
            return cls(dataset, batch_size, seed)
        return cls(dataset, batch_size, seed, trainer.global_rank, trainer.world_size, trainer)

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Lightning's own count, which starts anew where a run is resumed in the middle of a pass: not needed."""

    def __iter__(self) -> Iterator[Any]:
        place = self._place()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + place.turn)
        end = place.items + self.batches_left(place) * self.step
        mine = torch.randperm(self.size, generator=generator)[place.items : end][self.rank :: self.num_replicas]
        for some in mine.split(10_000):  # a list of all takes five times as much memory
            for item in some.tolist():
                self.consumed += 1
                yield (place.turn, item) if self.counts_passes else item

    def batches_left(self, place: Place) -> int:
        """Return the number of full batches of each rank in the rest of the pass."""
        return max(self.size - place.items, 0) // self.step

    def place_after(self, batches: int) -> Place:
        """Return the place after so many batches of the run, of which the first may have had another size."""
        callbacks = self.trainer.callbacks if self.trainer else []
        start = next((callback.start for callback in callbacks if isinstance(callback, DataPlace)), Place())
        since, left = batches - start.batches, self.batches_left(start)
        if since < left:
            return Place(start.turn, start.items + since * self.step, batches)
        turns, rest = divmod(since - left, self.batches)
        return Place(start.turn + 1 + turns, rest * self.step, batches)

    def _place(self) -> Place:
        if self.trainer is not None:  # workers fetch ahead, and trainer.limit_train_batches leaves that unused
            return self.place_after(batches_done(self.trainer))
        turn, done = divmod(self.consumed, len(self))
        return Place(turn, done * self.num_replicas)
