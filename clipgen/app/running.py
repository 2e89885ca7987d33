"""The requests in work, which are stopped when their visitor leaves."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class RunningRequests:
    """Events that stop the requests of each visitor."""

    def __init__(self) -> None:
        self._events: defaultdict[str, set[threading.Event]] = defaultdict(set)
        self._lock = threading.Lock()

    @contextmanager
    def register(self, visitor: str) -> Iterator[threading.Event]:
        """Return an event that is set if the visitor leaves before the context ends."""
        event = threading.Event()
        with self._lock:
            self._events[visitor].add(event)
        try:
            yield event
        finally:
            with self._lock:
                self._events[visitor].discard(event)
                if not self._events[visitor]:
                    del self._events[visitor]

    def stop(self, visitor: str) -> None:
        """Stop the requests of a visitor who has left."""
        with self._lock:
            for event in self._events.get(visitor, ()):
                event.set()
