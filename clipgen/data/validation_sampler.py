"""Validation on several processes that counts every item once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset, DistributedSampler


class ValidationSampler(DistributedSampler[Any]):
    """Item numbers in order, dealt out to the ranks in whole batches: those that a single process would make.

    Every rank gets as many batches, because sharded networks (FSDP) compute together. A rank that is short of one
    repeats the first item, which ``real_rows`` leaves out.

    Args:
        dataset: map-style dataset.
        batch_size: number of items in a batch.
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int, rank: int = 0, world_size: int = 1):
        super().__init__(dataset, world_size, rank, shuffle=False)
        self.size, self.batch_size = len(dataset), batch_size  # type: ignore[arg-type]
        self.batches = -(-self.size // (batch_size * world_size))

    @classmethod
    def for_trainer(cls, trainer: Any, dataset: Dataset[Any], batch_size: int) -> ValidationSampler:
        """Make the sampler of this process of a Lightning run; without a trainer, of a single process."""
        if trainer is None:
            return cls(dataset, batch_size)
        return cls(dataset, batch_size, trainer.global_rank, trainer.world_size)

    def _items(self, batch: int) -> range:
        start = (batch * self.num_replicas + self.rank) * self.batch_size
        return range(min(start, self.size), min(start + self.batch_size, self.size))

    def real_rows(self, batch: int) -> int:
        """Return the number of rows to count in this rank's n-th batch; rows after them are repetitions."""
        return len(self._items(batch))

    def __len__(self) -> int:
        return sum(len(self._items(batch)) or 1 for batch in range(self.batches))

    def __iter__(self) -> Iterator[int]:
        for batch in range(self.batches):
            yield from self._items(batch) or [0]


def real_rows(trainer: Any, batch_idx: int, rows: int) -> int:
    """Return how many of the rows of a validation batch to count: all but repetitions that fill up a rank's share.

    Knows ``ValidationSampler``, and torch's ``DistributedSampler``, which Lightning gives to any other data loader.
    """
    sampler = getattr(getattr(trainer, "val_dataloaders", None), "sampler", None)
    if isinstance(sampler, ValidationSampler):
        return min(sampler.real_rows(batch_idx), rows)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return rows
    mine = range(sampler.rank, len(sampler.dataset), sampler.num_replicas)  # type: ignore[arg-type]
    batch_size = trainer.val_dataloaders.batch_size or rows
    return max(min(len(mine) - batch_idx * batch_size, rows), 0)
