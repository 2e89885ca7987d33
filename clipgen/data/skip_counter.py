"""How many images of a source were used, and how many had to be skipped."""

from __future__ import annotations

import logging
from collections import Counter

import torch
from torch.utils.data import get_worker_info

from clipgen.data.decoding import UnusableImageError
from clipgen.files import printable
from clipgen.hashing import unit_hash

logger = logging.getLogger(__name__)
_REASONS = (
    "truncated",
    "empty",
    "not an image",
    "too large",
    "corrupt",
    "unreadable",
    "without label",
    "broken shard",
    "no decoder",
    "same name",
)
# Files that are named for each reason; of a broken shard there may be tens of thousands.
_WARNINGS = 20


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
        self._warned = torch.zeros(len(_REASONS), dtype=torch.int64).share_memory_()
        self._aside = torch.zeros(1 << 20, dtype=torch.uint8).share_memory_()
        self._logged = ""

    def use(self, count: int = 1) -> None:
        """Count images as used."""
        self._used[_worker_row()] += count

    def restart(self) -> None:
        """Forget how many images this worker has used: a new pass begins."""
        self._used[_worker_row()] = 0

    def skip(self, name: str, error: UnusableImageError) -> bool:
        """Count an image as skipped and warn about it, unless that was done before; return whether it is new."""
        slot, reason = int(unit_hash(name) * len(self._skipped)), _REASONS.index(error.reason)
        if self._skipped[slot]:
            return False
        self._skipped[slot] = 1 + reason
        self._warned[reason] += 1
        if self._warned[reason] <= _WARNINGS:
            logger.warning("skipped %s: %s", printable(name), printable(str(error)))
        if self._warned[reason] == _WARNINGS:
            logger.warning("%s: more of this kind (%s) are counted, not named", printable(self.name), error.reason)
        return True

    def set_aside(self, name: str, used: str) -> None:
        """Count a picture that is part of another picture's sample, as "0.seg.png" is of that of "0.jpg"."""
        if not self._aside.any():
            logger.info("%s is not used: it is taken for a part of %s", printable(name), printable(used))
        self._aside[int(unit_hash(name) * len(self._aside))] = 1

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
            logger.info("%s: %s", printable(self.name), self)
            if aside := int(self._aside.sum()):
                logger.info("%s: %d further pictures are parts of these", printable(self.name), aside)


def _worker_row() -> int:
    worker = get_worker_info()
    return worker.id % 1024 if worker else 0
