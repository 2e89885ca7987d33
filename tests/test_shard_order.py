"""Shards are read once per pass by the workers of all ranks, and a run can be resumed with any number of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from clipgen.data.shard_order import UNKNOWN, Position, Segment, ShardOrder


class Readers:
    """Readers of shards whose samples are ``(shard, number)``.

    Args:
        lengths: number of samples in each shard.
    """

    def __init__(self, lengths: list[int]):
        self.lengths = lengths
        self.sizes = torch.full((len(lengths),), UNKNOWN, dtype=torch.int32)
        self.order = ShardOrder(len(lengths), "0", self.sizes)
        self.num_read = 0

    def read(self, segment: Segment) -> Iterator[tuple[int, int]]:
        samples = []
        for shard_slice in segment.slices:
            samples += [
                (shard_slice.shard, i)
                for i in range(shard_slice.offset, self.lengths[shard_slice.shard], shard_slice.step)
            ]
        random.Random(segment.name).shuffle(samples)
        for sample in samples:
            self.num_read += 1
            yield sample
        for shard_slice in segment.slices:
            self.sizes[shard_slice.shard] = self.lengths[shard_slice.shard]

    def batches(self, position: Position, count: int, batch_size: int) -> list[list[tuple[int, int]]]:
        """Return the next batches of each rank, as DataLoader does: its workers deliver them in turn."""
        batches = []
        for rank in range(position.num_ranks):
            streams = []
            for worker in range(position.num_workers):
                streams.append(self.order.samples(position, position.reader(rank, worker), self.read))
            for number in range(count):
                batches.append(list(islice(streams[number % position.num_workers], batch_size)))
        return batches


@pytest.mark.parametrize(
    ("num_shards", "num_ranks", "num_workers"), [(8, 1, 1), (8, 2, 2), (12, 2, 3), (1, 2, 1), (2, 4, 1), (3, 4, 2)]
)
def test_every_image_is_seen_once_per_pass(num_shards, num_ranks, num_workers):
    """Also with fewer shards than readers, which then share them."""
    readers = Readers([24] * num_shards)
    position = Position.start(num_ranks, num_workers)
    batches = 24 * num_shards // (num_ranks * 3)  # of three samples on each rank
    for _ in range(3):
        seen = Counter(sample for batch in readers.batches(position, batches, 3) for sample in batch)
        assert len(seen) == 24 * num_shards and set(seen.values()) == {1}
        position = position.after(batches, 3)


def test_passes_have_different_orders():
    order = ShardOrder(20, "0", [5] * 20)
    passes = [[shard_slice.shard for shard_slice in order._slices(number, 1)] for number in range(3)]
    assert all(sorted(shards) == list(range(20)) for shards in passes)
    assert passes[0] != passes[1] != passes[2]


@pytest.mark.parametrize(("num_ranks", "num_workers"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_resumed_readers_continue_exactly(num_ranks, num_workers):
    """With unequal shards, at any batch, whether the sizes of the shards are known or not."""
    lengths = [3, 10, 1, 7, 12, 5, 0, 9, 4]
    start = Position.start(num_ranks, num_workers)
    expected = Readers(lengths).batches(start, 40, 2)
    for stop in (1, 2, 7, 23):
        readers = Readers(lengths)
        readers.batches(start, stop, 2)
        for known in (True, False):
            if not known:
                readers = Readers(lengths)
            resumed = readers.batches(Position.from_dict(start.after(stop, 2).as_dict()), 40 - stop, 2)
            for rank in range(num_ranks):
                first = rank * 40
                assert resumed[rank * (40 - stop) :][: 40 - stop] == expected[first + stop : first + 40]


def test_resume_of_a_long_run_reads_only_the_current_segment():
    readers = Readers([10] * 40)
    position = Position.start(1, 1).after(0, 1)
    readers.sizes.fill_(10)
    position = position.after(100_003, 1)
    readers.batches(position, 1, 1)
    assert readers.num_read <= 80


@pytest.mark.parametrize("before", [(1, 1), (2, 1), (4, 2), (3, 1)])
@pytest.mark.parametrize("after", [(1, 2), (6, 1), (2, 3), (1, 5)])
def test_other_number_of_readers_continues_at_the_same_place(before, after):
    """No image of the passes that were begun is repeated or left out; the batch size changes, too."""
    lengths = [7, 12, 5, 9, 11, 3, 8, 10]
    readers = Readers(lengths)
    old = Position.start(*before)
    seen = Counter(sample for batch in readers.batches(old, 5, 2) for sample in batch)
    new = readers.order.moved_to(old.after(5, 2), *after)
    total = new.first_pass * sum(lengths)
    for reader in range(new.num_readers):
        left = readers.order.samples(new, reader, readers.read, new.first_pass)
        seen.update(left)
    assert sum(seen.values()) == total and set(seen.values()) == {new.first_pass}
    # and again, in the middle of what the first readers have left
    third = readers.order.moved_to(new.after(1, 3), 3, 1)
    again = Counter(sample for batch in readers.batches(old, 5, 2) for sample in batch)
    again.update(sample for batch in readers.batches(new, 1, 3) for sample in batch)
    for reader in range(3):
        again.update(readers.order.samples(third, reader, readers.read, third.first_pass))
    assert set(again.values()) == {third.first_pass} and len(again) == sum(lengths)


def test_position_is_plain_and_complete():
    position = Position.start(2, 2).after(3, 4)
    assert position.delivered == [8, 8, 4, 4]
    moved = ShardOrder(4, "0", [1] * 4).moved_to(position, 1, 1)
    assert moved.delivered == [0] and moved.previous == position
    assert Position.from_dict(moved.as_dict()) == moved
