"""Deterministic hashes and seeds, identical on every machine and in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

BLOCK_BYTES = 1 << 20  # bytes read at a time


def unit_hash(text: str) -> float:
    """Map a string to a number in [0, 1), uniformly distributed over strings."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def hashed_seed(text: str) -> int:
    """Map a string to a seed in [0, 2**48)."""
    return int(unit_hash(text) * 2**48)


def hash_lines(lines: Iterable[str]) -> str:
    """Return a hash of strings, in order, as if they were the lines of a file."""
    digest = hashlib.sha256()
    separator = b""
    for line in lines:
        digest.update(separator + line.encode("utf-8", "surrogateescape"))
        separator = b"\n"
    return digest.hexdigest()[:16]


def hash_files(paths: Iterable[Path]) -> str:
    """Return a hash of the content of files, in order. For a path that is not a file (a URL) its name is hashed."""
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            digest.update(str(path).encode())
            continue
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()[:32]
