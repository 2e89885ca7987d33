"""The requests in progress, which are stopped when their visitor cancels them or leaves."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class RunningRequests:
    """Events that stop the requests of each visitor."""

    def __init__(self) -> None:
        self._events: defaultdict[str, set[threading.Event]] = defaultdict(set)
        self._changed = threading.Condition()

    @contextmanager
    def register(self, visitor: str) -> Iterator[threading.Event]:
        """Return an event that is set if the visitor cancels or leaves before the context ends."""
        event = threading.Event()
        with self._changed:
            self._events[visitor].add(event)
        try:
            yield event
        finally:
            with self._changed:
                self._events[visitor].discard(event)
                if not self._events[visitor]:
                    del self._events[visitor]
                self._changed.notify_all()

    def stop(self, visitor: str, timeout: float = 0) -> None:
        """Stop the requests of a visitor.

        Args:
            visitor: the visitor.
            timeout: longest time in seconds to wait for their end.
        """
        with self._changed:
            stopped = set(self._events.get(visitor, ()))
            for event in stopped:
                event.set()
            self._changed.wait_for(lambda: stopped.isdisjoint(self._events.get(visitor, ())), timeout)
