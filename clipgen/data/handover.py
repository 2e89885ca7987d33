"""Let one process do work at the start, such as reading the headers of a folder, and hand the result to the others."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
# Environment variable with the folder of the results of a process, for the processes that it starts later
FOLDER = "CLIPGEN_HANDOVER"
_numbers: Iterator[int] | None = None


@contextmanager
def one_process_works() -> Iterator[None]:
    """Inside the ``with``, which all processes of a run enter, ``from_first_process`` calls its function only once."""
    global _numbers
    _numbers = count()
    try:
        yield
    finally:
        _numbers = None


@contextmanager
def results_for_children() -> Iterator[None]:
    """Keep the results of this process for the processes that are started inside the ``with``."""
    with tempfile.TemporaryDirectory(prefix="clipgen-") as folder:
        os.environ[FOLDER] = folder
        try:
            yield
        finally:
            del os.environ[FOLDER]


def from_first_process(compute: Callable[[], T]) -> T:
    """Return the result of ``compute``, which must be picklable.

    In a training on several devices only the first process calls it: connected processes receive the result, and those
    that the first one starts later read it from a file. Otherwise every process calls it.
    """
    if _numbers is None:
        return compute()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return broadcast(compute)
    if FOLDER not in os.environ:
        return compute()
    path = Path(os.environ[FOLDER]) / f"{next(_numbers)}.pickle"
    if not path.is_file():
        path.write_bytes(pickle.dumps(compute()))
    result: T = pickle.loads(path.read_bytes())
    return result


def broadcast(compute: Callable[[], T]) -> T:
    """Return what ``compute`` returns in the first process, or raise what it raises there."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = compute()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    result: T = box[0]
    return result
