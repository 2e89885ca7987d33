"""Validation samplers: every item is counted once, on any number of processes."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader, DistributedSampler

from clipgen.data.samplers import ValidationSampler, num_real_samples


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 9, 16])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_batches_of_a_single_process(size, world_size):
    """Each rank gets the same number of batches, and each item is counted once."""
    batches: dict[int, list[int]] = {}
    lengths = set()
    for rank in range(world_size):
        sampler = ValidationSampler(range(size), 4, rank, world_size)
        rank_batches = list(DataLoader(range(size), 4, sampler=sampler, collate_fn=list))
        assert len(rank_batches) == sampler.batches and sum(map(len, rank_batches)) == len(sampler)
        lengths.add(len(rank_batches))
        for number, batch in enumerate(rank_batches):
            real_items = batch[: sampler.num_real_samples(number)]
            if real_items:
                batches[number * world_size + rank] = real_items
    assert [batches[number] for number in sorted(batches)] == list(DataLoader(range(size), 4, collate_fn=list))
    assert len(lengths) == 1


def test_repetitions_of_torchs_distributed_sampler_are_not_counted():
    counted = []
    for rank in range(2):
        loader = DataLoader(range(5), 2, sampler=DistributedSampler(range(5), 2, rank, shuffle=False), collate_fn=list)
        trainer = type("Trainer", (), {"val_dataloaders": loader})
        for number, batch in enumerate(loader):
            counted += batch[: num_real_samples(trainer, number, len(batch))]
    assert sorted(counted) == list(range(5))
