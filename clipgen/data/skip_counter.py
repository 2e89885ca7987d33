"""How many images of a source were used, and how many had to be skipped."""

from __future__ import annotations

import logging
from collections import Counter

import torch
from torch.utils.data import get_worker_info

from clipgen.data.decoding import UnusableImageError
from clipgen.hashing import unit_hash

logger = logging.getLogger(__name__)
_REASONS = ("truncated", "empty", "not an image", "too large", "corrupt", "unreadable", "without label", "broken shard")


class SkipCounter:
    """Counts used and skipped images of one source, for all DataLoader workers together.

    The counts lie in shared memory, where worker processes write and the main process reads: one row per worker for
    the used images, and one byte per hash of a name for the skipped ones, so that each is counted (and warned about)
    once, however often and in whichever worker it turns up. Two names that share a byte count as one: of a
    thousand skipped images, two in five counts are one short.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._used = torch.zeros(1024, dtype=torch.int64).share_memory_()
        self._skipped = torch.zeros(1 << 20, dtype=torch.uint8).share_memory_()
        self._logged = ""

    def use(self, count: int = 1) -> None:
        """Count images as used."""
        self._used[_worker_row()] += count

    def restart(self) -> None:
        """Forget how many images this worker has used: a new pass begins."""
        self._used[_worker_row()] = 0

    def skip(self, name: str, error: UnusableImageError) -> bool:
        """Count an image as skipped and warn about it, unless that was done before; return whether it is new."""
        slot = int(unit_hash(name) * len(self._skipped))
        if self._skipped[slot]:
            return False
        self._skipped[slot] = 1 + _REASONS.index(error.reason)
        logger.warning("skipped %s: %s", name, error)
        return True

    def __str__(self) -> str:
        used = int(self._used.sum())
        codes = self._skipped[self._skipped > 0].sort().values.tolist()
        reasons = Counter(_REASONS[code - 1] for code in codes)
        details = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        return f"{used} image{'s' * (used != 1)}, {len(codes)} skipped" + (details and f": {details}")

    def summary(self) -> None:
        """Log the counts in one line, "photos: 15 images, 2 skipped: 1 truncated, 1 empty", if they are news."""
        if self._logged != str(self):
            self._logged = str(self)
            logger.info("%s: %s", self.name, self)


def _worker_row() -> int:
    worker = get_worker_info()
    return worker.id % 1024 if worker else 0
