"""Lists of strings, such as the names of millions of files, with little private memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from typing import IO, Any

import numpy as np

# Arrays up to this number of bytes are kept in memory.
MAX_BYTES_IN_MEMORY = 1 << 26


class PackedStrings(Sequence[str]):
    """A list of strings stored in two arrays, which are in a temporary file if they are large.

    Reading a Python list changes reference counts, so forked workers would gradually copy all of it (about 1 GB for 8
    workers and a million names). The pages of a mapped file are shared, and the system can drop them.

    Args:
        strings: the strings, which are read one after another.
    """

    def __init__(self, strings: Iterable[str]):
        with tempfile.TemporaryFile() as content, tempfile.TemporaryFile() as ends:
            end = 0
            ends.write(end.to_bytes(8, "little"))
            for string in strings:
                end += content.write(string.encode("utf-8", "surrogateescape"))
                ends.write(end.to_bytes(8, "little"))
            self.content = map_or_read(content, np.uint8)
            self.ends = map_or_read(ends, np.dtype("<i8"))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        # Indexing a range raises IndexError past the end, which ends a plain for loop.
        index = range(len(self))[index]
        return self.content[self.ends[index] : self.ends[index + 1]].tobytes().decode("utf-8", "surrogateescape")


def map_or_read(file: IO[bytes], dtype: Any) -> np.ndarray:
    """Return the content of a file: memory-mapped if it is large, else read."""
    file.flush()
    file.seek(0, 2)
    if file.tell() > MAX_BYTES_IN_MEMORY:
        # pickle can pass on the memory of a plain array, but not of a memmap, without copying it.
        return np.memmap(file, dtype, "r").view(np.ndarray)
    file.seek(0)
    return np.frombuffer(file.read(), dtype)
