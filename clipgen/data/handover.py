"""Let rank 0 do work at the start, such as reading the headers of a folder, and hand the result to the others."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from clipgen.data.packed_strings import map_or_read

T = TypeVar("T")
# File with a result, next to those of its arrays.
RESULT_FILE = "result.pickle"
# Arrays are sent to other processes in blocks of this size.
BLOCK_BYTES = 1 << 26
# Environment variable with the folder of the results of a process, for the processes that it starts later.
FOLDER_VARIABLE = "CLIPGEN_HANDOVER"
_numbers: Iterator[int] | None = None


@contextmanager
def compute_on_rank_zero() -> Iterator[None]:
    """Let ``from_rank_zero`` call its function on rank 0 only; all processes of a run enter the ``with``."""
    global _numbers
    _numbers = count()
    try:
        yield
    finally:
        _numbers = None


@contextmanager
def share_results_in_files() -> Iterator[None]:
    """Keep the results of this process for the processes that are started inside the ``with``."""
    # Windows does not remove files that are mapped.
    with tempfile.TemporaryDirectory(prefix="clipgen-", ignore_cleanup_errors=True) as folder:
        os.environ[FOLDER_VARIABLE] = folder
        try:
            yield
        finally:
            del os.environ[FOLDER_VARIABLE]


def from_rank_zero(compute: Callable[[], T]) -> T:
    """Return the result of ``compute``, which must be picklable.

    In a training run on several devices only rank 0 calls it: connected processes receive the result, and those that
    rank 0 starts later read it from a file. Otherwise every process calls it.
    """
    if _numbers is None:
        return compute()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return broadcast(compute)
    if FOLDER_VARIABLE not in os.environ:
        return compute()
    folder = Path(os.environ[FOLDER_VARIABLE]) / str(next(_numbers))
    if not folder.is_dir():
        write_result(folder, compute())
    result: T = read_result(folder)
    return result


def write_result(folder: Path, result: Any) -> None:
    """Write a result, with a file for each of its arrays."""
    content, arrays = pickle_with_buffers(result)
    folder.mkdir()
    (folder / RESULT_FILE).write_bytes(content)
    for number, array in enumerate(arrays):
        (folder / str(number)).write_bytes(array)


def read_result(folder: Path) -> Any:
    """Read what ``write_result`` wrote; large arrays are memory-mapped."""
    arrays = []
    for number in range(len(list(folder.iterdir())) - 1):
        with (folder / str(number)).open("rb") as file:
            arrays.append(map_or_read(file, np.uint8))
    return pickle.loads((folder / RESULT_FILE).read_bytes(), buffers=arrays)


def pickle_with_buffers(result: Any) -> tuple[bytes, list[memoryview]]:
    """Return a pickled object, and the memory of the arrays in it, which is not copied."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
    return content, [buffer.raw() for buffer in buffers]


def broadcast(compute: Callable[[], T]) -> T:
    """Return the result of ``compute`` on rank 0, or raise the error that it raises there."""
    result: Any = None
    arrays: list[memoryview] = []
    # The error, the pickled result, and the sizes of its arrays.
    message: list[Any] = [None, None, None]
    if dist.get_rank() == 0:
        try:
            result = compute()
            content, arrays = pickle_with_buffers(result)
            message = [None, content, [len(array) for array in arrays]]
        except Exception as error:
            message[0] = error
    dist.broadcast_object_list(message)
    raised, content, sizes = message
    if raised is not None:
        raise raised
    if dist.get_rank() == 0:
        for array in arrays:
            send_array(array)
        received: T = result
    else:
        received = pickle.loads(content, buffers=[receive_array(size) for size in sizes])
    return received


def send_array(array: memoryview) -> None:
    """Send bytes from rank 0 to the others, which call ``receive_array``."""
    for start in range(0, len(array), BLOCK_BYTES):
        dist.broadcast_object_list([bytes(array[start : start + BLOCK_BYTES])])


def receive_array(size: int) -> np.ndarray:
    """Return the bytes that rank 0 sends; they are memory-mapped if they are many."""
    with tempfile.TemporaryFile() as file:
        for _ in range(0, size, BLOCK_BYTES):
            block: list[Any] = [None]
            dist.broadcast_object_list(block)
            file.write(block[0])
        return map_or_read(file, np.uint8)
