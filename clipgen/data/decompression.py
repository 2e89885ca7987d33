"""Decompress the streams of tar shards with bounded memory.

``tarfile`` decompresses ten kilobytes at a time, which may expand to gigabytes.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from typing import IO, Any, cast

# Bytes that are read at a time.
_BLOCK_BYTES = 1 << 16
# Memory of the xz decoder, which a file asks for; ``xz -9`` needs 65 MiB.
_MAX_XZ_BYTES = 1 << 28
_SIGNATURE_BYTES = 6
_GZIP = b"\x1f\x8b"
_BZIP2 = b"BZh"
_XZ = (b"\xfd7zXZ\0", b"\x5d\0\0")


def open_decompressed(stream: IO[bytes]) -> IO[bytes]:
    """Return a stream of the decompressed content of a gzip, bzip2, xz or lzma stream; the content of any other."""
    start = stream.read(_SIGNATURE_BYTES)
    complete = _Prepended(start, stream)
    if start.startswith(_GZIP):
        return cast("IO[bytes]", gzip.GzipFile(fileobj=cast("Any", complete)))
    if start.startswith(_BZIP2):
        return cast("IO[bytes]", _Decompressed(complete, bz2.BZ2Decompressor))
    if start.startswith(_XZ):
        return cast("IO[bytes]", _Decompressed(complete, lambda: lzma.LZMADecompressor(memlimit=_MAX_XZ_BYTES)))
    return cast("IO[bytes]", complete)


def is_compressed(stream: IO[bytes]) -> bool:
    """Return whether the next bytes of a stream are the signature of a compressed file."""
    return stream.read(_SIGNATURE_BYTES).startswith((_GZIP, _BZIP2, *_XZ))


class _Prepended:
    """A stream whose first bytes were read already.

    Args:
        start: the bytes that were read.
        stream: the rest.
    """

    def __init__(self, start: bytes, stream: IO[bytes]) -> None:
        self.start = start
        self.stream = stream

    def read(self, size: int = _BLOCK_BYTES) -> bytes:
        """Return at most ``size`` bytes; none at the end."""
        if not self.start:
            return self.stream.read(size)
        chunk = self.start[:size]
        self.start = self.start[size:]
        return chunk


class _Decompressed(io.RawIOBase):
    """The content of a stream of one or several compressed parts.

    Args:
        stream: the compressed stream.
        make_decompressor: returns the decompressor of a part, with the interface of ``bz2.BZ2Decompressor``.
    """

    def __init__(self, stream: _Prepended, make_decompressor: Callable[[], Any]) -> None:
        self.stream = stream
        self.make_decompressor = make_decompressor
        self.decompressor = make_decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._next_content(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _next_content(self, size: int) -> bytes:
        """Return at least one and at most ``size`` bytes; none at the end."""
        while True:
            compressed = b""
            if self.decompressor.eof:
                compressed = self.decompressor.unused_data.lstrip(b"\0") or self.stream.read()
                if not compressed.strip(b"\0"):
                    return b""
                self.decompressor = self.make_decompressor()
            elif self.decompressor.needs_input:
                compressed = self.stream.read()
                if not compressed:
                    raise EOFError("the compressed file ends too early")
            content: bytes = self.decompressor.decompress(compressed, size)
            if content:
                return content
