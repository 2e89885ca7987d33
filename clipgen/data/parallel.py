"""Decoding in threads, in order, not far ahead of who reads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = min(os.cpu_count() or 1, 16)
AHEAD = 2 * THREADS  # results that wait at most: ten views of a photo are 8 MB
_AHEAD_BYTES = 1 << 29  # of items that wait
Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    weigh: Callable[[Item], int] = lambda item: 0,
) -> Iterator[Result]:
    """``function`` of each item, in order; Pillow and torch leave other threads alone while they work.

    Args:
        weigh: bytes of an item; of large ones fewer wait.
    """
    waiting: deque[tuple[Future[Result], int]] = deque()
    held = 0
    pool = ThreadPoolExecutor(THREADS)
    try:
        for item in items:
            waiting.append((pool.submit(function, item), weigh(item)))
            held += waiting[-1][1]
            while waiting and (len(waiting) > AHEAD or held > _AHEAD_BYTES):
                future, size = waiting.popleft()
                held -= size
                yield future.result()
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)  # what nobody will read is not begun
