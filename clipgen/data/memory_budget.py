"""Limit the memory of the images that the threads of a process decode at the same time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

# A larger image is decoded alone.
_DECODING_BYTES = 1 << 29


class MemoryBudget:
    """Memory that the threads of a process share: a thread waits while the others hold too much.

    A request above the limit is granted when no other thread holds memory, so no request waits forever.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.changed = threading.Condition()

    @contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        """Hold ``size`` bytes of the budget inside the ``with``."""
        with self.changed:
            self.changed.wait_for(lambda: not self.held or self.held + size <= self.limit)
            self.held += size
        try:
            yield
        finally:
            with self.changed:
                self.held -= size
                self.changed.notify_all()


_budget = MemoryBudget(_DECODING_BYTES)


def reserve_memory(size: int) -> AbstractContextManager[None]:
    """Hold ``size`` bytes of the budget for decoding inside the ``with``, once they are free."""
    return _budget.reserved(size)


def _reset_budget() -> None:
    """Reset the budget in a forked process, which does not have the threads that held memory."""
    global _budget
    _budget = MemoryBudget(_DECODING_BYTES)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_budget)
