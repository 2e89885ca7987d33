"""The order in which readers (the workers of all ranks) go through shards: each shard once per pass.

The shards of a pass are in random order. Reader number r of R reads the slices r, r + R, r + 2 R, ... of all passes in
turn. If there are fewer shards than readers, each shard is several slices: slice k of K contains every K-th sample.

A position is the number of samples that each reader has delivered. When the number of readers changes, the new ones
first deliver what the old ones have left of their passes, and then begin a pass of their own, so that no sample of a
pass is repeated or left out.

The numbers of samples in shards are not known before they are read. Readers note them, so that a resumed run does not
have to read again what lies before its position.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from typing import Any

# The slices of a segment are shuffled together; a resumed run reads the segment of its position again.
SLICES_PER_SEGMENT = 8
# Times that a shard may be read for an equal share of all readers, as a multiple of what is inevitable.
MAX_READS = 8
UNKNOWN = -1


@dataclass(frozen=True)
class ShardSlice:
    """Every ``step``-th sample of a shard, from sample number ``offset`` on."""

    shard: int
    offset: int = 0
    step: int = 1


@dataclass(frozen=True)
class Segment:
    """Slices that are shuffled together.

    Args:
        name: name of the segment, from which its random numbers are derived.
        pass_number: the pass that the slices belong to.
        slices: the slices.
    """

    name: str
    pass_number: int
    slices: list[ShardSlice]


@dataclass(frozen=True)
class Position:
    """A position in the shards, of all readers.

    Args:
        num_ranks: number of processes.
        num_workers: workers per process.
        first_pass: the pass that these readers began with.
        delivered: number of samples that each reader has delivered. Worker w of rank r is reader ``w * num_ranks + r``.
        batches: number of batches that each rank has got from these readers; the workers deliver them in turn.
        previous: position of the readers before these, who have left samples of the passes before ``first_pass``.
    """

    num_ranks: int
    num_workers: int
    first_pass: int = 0
    delivered: list[int] = field(default_factory=list)
    batches: int = 0
    previous: Position | None = None

    @classmethod
    def start(cls, num_ranks: int, num_workers: int) -> Position:
        """Return the position at the start of a run."""
        return cls(num_ranks, num_workers, delivered=[0] * (num_ranks * num_workers))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Position:
        """Return the position that ``as_dict`` describes."""
        previous = values["previous"]
        return cls(**{**values, "previous": cls.from_dict(previous) if previous else None})

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and dictionaries."""
        return asdict(self)

    @property
    def num_readers(self) -> int:
        return self.num_ranks * self.num_workers

    def after(self, batches: int, batch_size: int) -> Position:
        """Return the position after further batches on each rank."""
        delivered = list(self.delivered)
        for reader in range(self.num_readers):
            worker = reader // self.num_ranks
            first = (worker - self.batches) % self.num_workers
            delivered[reader] += len(range(first, batches, self.num_workers)) * batch_size
        return Position(
            self.num_ranks, self.num_workers, self.first_pass, delivered, self.batches + batches, self.previous
        )

    def reader(self, rank: int, worker: int) -> int:
        """Return the reader that a worker is. After a resume, worker 0 delivers the next batch of the run."""
        return (worker + self.batches) % self.num_workers * self.num_ranks + rank


class ShardOrder:
    """The order of the samples of each reader.

    Args:
        num_shards: number of shards.
        seed: seed of the order.
        sizes: number of samples in each shard, ``UNKNOWN`` if it is not known; may change.
    """

    def __init__(self, num_shards: int, seed: str, sizes: Sequence[int]):
        self.num_shards = num_shards
        self.seed = seed
        self.sizes = sizes

    def moved_to(self, position: Position, num_ranks: int, num_workers: int) -> Position:
        """Return the position for another number of readers; the same position if it does not change."""
        if (num_ranks, num_workers) == (position.num_ranks, position.num_workers):
            return position
        latest = max(self._current_pass(position, reader) for reader in range(position.num_readers))
        delivered = [0] * (num_ranks * num_workers)
        return Position(num_ranks, num_workers, latest + 1, delivered, 0, position)

    def samples(
        self,
        position: Position,
        reader: int,
        read: Callable[[Segment], Iterator[Any]],
        end_pass: int | None = None,
        skip: int = 0,
    ) -> Iterator[Any]:
        """Yield the samples that a reader delivers from a position on.

        Args:
            position: the position.
            reader: number of the reader.
            read: yields the samples of a segment.
            end_pass: the pass before which to end; None never ends.
            skip: number of samples to leave out.
        """
        skip += position.delivered[reader]
        for part in self._parts(position, reader, end_pass):
            size = self._size(part)
            if size is not None and size <= skip:
                skip -= size
                continue
            for sample in part.samples(self, read) if isinstance(part, Remainder) else read(part):
                if skip:
                    skip -= 1
                else:
                    yield sample

    def remaining(self, position: Position, reader: int, end_pass: int) -> int | None:
        """Return the number of undelivered samples of a reader before a pass, or None if it is not known."""
        total = -position.delivered[reader]
        for part in self._parts(position, reader, end_pass):
            size = self._size(part)
            if size is None:
                return None
            total += size
        return max(total, 0)

    def _current_pass(self, position: Position, reader: int) -> int:
        """Return the current pass of a reader."""
        if not any(self.sizes):
            return position.first_pass
        skip = position.delivered[reader]
        for part in self._parts(position, reader):
            size = self._size(part)
            # A part of unknown size has not been read to its end, so it has not been delivered completely.
            if size is None or size > skip:
                return part.pass_number
            skip -= size
        raise AssertionError("the parts of a reader have no end")

    def _parts(self, position: Position, reader: int, end_pass: int | None = None) -> Iterator[Remainder | Segment]:
        """Yield the parts that a reader reads: the remainders of earlier readers, then its own segments."""
        yield from self._remainders(position, reader)
        yield from self._segments(position, reader, end_pass)

    def _remainders(self, position: Position, reader: int) -> list[Remainder]:
        """Return the remainders of earlier readers that a reader takes over."""
        previous = position.previous
        if previous is None:
            return []
        num_old = previous.num_readers
        # Groups of old and new readers, so that all new readers get the same share.
        num_groups = math.gcd(num_old, position.num_readers)
        if position.num_readers // num_groups > MAX_READS:
            num_groups = min(num_old, position.num_readers)
        group = reader % num_groups
        sharing = range(group, position.num_readers, num_groups)
        remainders = []
        for number, old in enumerate(range(group, num_old, num_groups)):
            offset = (sharing.index(reader) + number) % len(sharing)
            remainders.append(Remainder(previous, old, position.first_pass, offset, len(sharing)))
        return remainders

    def _segments(self, position: Position, reader: int, end_pass: int | None) -> Iterator[Segment]:
        """Yield the segments of a reader, without those left by earlier readers."""
        num_readers = position.num_readers
        for number in count(position.first_pass) if end_pass is None else range(position.first_pass, end_pass):
            slices = self._slices(number, num_readers)
            # Slices are counted over all passes, so that each reader gets as many slices as the others.
            first = (reader - number * len(slices)) % num_readers
            mine = slices[first::num_readers]
            for start in range(0, len(mine), SLICES_PER_SEGMENT):
                name = f"{self.seed} {number} {num_readers} {reader} {start}"
                yield Segment(name, number, mine[start : start + SLICES_PER_SEGMENT])

    def _slices(self, pass_number: int, num_readers: int) -> list[ShardSlice]:
        """Return the slices of a pass in random order."""
        per_shard = slices_per_shard(self.num_shards, num_readers)
        order = list(range(self.num_shards * per_shard))
        random.Random(f"{self.seed} {pass_number}").shuffle(order)
        return [ShardSlice(number % self.num_shards, number // self.num_shards, per_shard) for number in order]

    def _size(self, part: Remainder | Segment) -> int | None:
        """Return the number of samples in a part, or None if it is not known."""
        if isinstance(part, Remainder):
            return part.size(self)
        total = 0
        for shard_slice in part.slices:
            size = int(self.sizes[shard_slice.shard])
            if size == UNKNOWN:
                return None
            total += len(range(shard_slice.offset, size, shard_slice.step))
        return total


def slices_per_shard(num_shards: int, num_readers: int) -> int:
    """Return the number of slices per shard: 1 if there are enough shards.

    Otherwise all readers get the same number of slices, unless that would read shards very often.
    """
    if num_shards >= num_readers:
        return 1
    fewest = math.ceil(num_readers / num_shards)
    even = num_readers // math.gcd(num_readers, num_shards)
    return even if even <= MAX_READS * fewest else fewest


@dataclass(frozen=True)
class Remainder:
    """Samples of an earlier reader that were not delivered; ``step`` readers share them in turn.

    Args:
        position: position of the earlier readers.
        reader: number of the earlier reader.
        end_pass: the pass before which the samples end.
        offset: the first of the samples.
        step: distance to the next sample.
    """

    position: Position
    reader: int
    end_pass: int
    offset: int = 0
    step: int = 1

    @property
    def pass_number(self) -> int:
        """The pass that the samples belong to, or the last one of several."""
        return self.end_pass - 1

    def samples(self, order: ShardOrder, read: Callable[[Segment], Iterator[Any]]) -> Iterator[Any]:
        """Yield the samples."""
        return islice(order.samples(self.position, self.reader, read, self.end_pass, self.offset), 0, None, self.step)

    def size(self, order: ShardOrder) -> int | None:
        """Return the number of samples, or None if it is not known."""
        remaining = order.remaining(self.position, self.reader, self.end_pass)
        return None if remaining is None else len(range(self.offset, remaining, self.step))
