"""Ordered parallel map over threads with bounded prefetch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

NUM_THREADS = min(os.cpu_count() or 1, 16)
# Ten views of a photo are 8 MB, so results must not pile up.
MAX_PENDING = 2 * NUM_THREADS
MAX_PENDING_BYTES = 1 << 29

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    item_bytes: Callable[[Item], int] = lambda item: 0,
) -> Iterator[Result]:
    """Yield ``function(item)`` for each item, in order, computed in threads.

    Threads suffice for decoding images, because Pillow and torch release the interpreter lock while they work.

    Args:
        function: called in a thread.
        items: read as results are taken, at most ``MAX_PENDING`` items or ``MAX_PENDING_BYTES`` ahead.
        item_bytes: memory that an item takes.
    """
    pending: deque[tuple[Future[Result], int]] = deque()
    pending_bytes = 0
    pool = ThreadPoolExecutor(NUM_THREADS)
    try:
        for item in items:
            size = item_bytes(item)
            pending.append((pool.submit(function, item), size))
            pending_bytes += size
            while pending and (len(pending) > MAX_PENDING or pending_bytes > MAX_PENDING_BYTES):
                future, size = pending.popleft()
                pending_bytes -= size
                yield future.result()
        while pending:
            yield pending.popleft()[0].result()
    finally:
        # The consumer may stop early: do not start what will not be read.
        pool.shutdown(cancel_futures=True)
