"""Items are mapped in threads, in order and with bounded memory."""

from __future__ import annotations

import time

import pytest

from clipgen.data.parallel import MAX_PENDING, NUM_THREADS, parallel_map


def test_parallel_map_keeps_the_order_and_bounds_prefetch():
    started = []

    def slow_at_first(item: int) -> int:
        started.append(item)
        time.sleep(0.02 if item == 0 else 0)
        return 2 * item

    results = parallel_map(slow_at_first, range(10 * MAX_PENDING))
    assert next(results) == 0 and len(started) <= MAX_PENDING + 1
    assert [0, *results] == list(range(0, 20 * MAX_PENDING, 2))
    with pytest.raises(ZeroDivisionError):
        list(parallel_map(lambda item: 1 / item, [1, 0]))


def test_parallel_map_stops_when_its_results_are_not_read():
    started = []

    def slow(item: int) -> None:
        started.append(item)
        time.sleep(0.05)

    results = parallel_map(slow, range(100))
    next(results)
    results.close()
    assert len(started) <= 3 * NUM_THREADS < MAX_PENDING * 2


def test_parallel_map_bounds_the_bytes_of_pending_items():
    started = []
    results = parallel_map(
        lambda item: item, (started.append(i) or i for i in range(100)), item_bytes=lambda item: 1 << 29
    )
    assert next(results) == 0 and len(started) <= 2
    assert list(results) == list(range(1, 100))
