"""The order in which training goes through a dataset: a function of seed and step alone, so that it can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
        self.batch_size, self.batches = batch_size, self.size // (batch_size * world_size)
        if not self.batches:
            at_most = self.size // world_size
            raise ValueError(f"batch_size must be at most {at_most}, the training images a device, got {batch_size}")
        self.counts_passes = getattr(dataset, "counts_passes", False)
        self.consumed, self.trainer = 0, trainer  # items, over all passes

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
        if self.trainer is not None:  # workers fetch ahead, and trainer.limit_train_batches leaves that unused
            self.consumed = batches_done(self.trainer) * self.batch_size
        turn, done = divmod(self.consumed, len(self))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        order = torch.randperm(self.size, generator=generator)[: len(self) * self.num_replicas]
        mine = order[self.rank :: self.num_replicas][done:]
        for some in mine.split(10_000):  # a list of all takes five times as much memory
            for item in some.tolist():
                self.consumed += 1
                yield (turn, item) if self.counts_passes else item
