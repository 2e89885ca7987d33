"""Chance that follows from a text alone, so that whoever draws again draws the same."""

from __future__ import annotations

from hashlib import blake2b


def unit_hash(text: str) -> float:
    """Map a text to a number in [0, 1), evenly spread and the same on every machine."""
    digest = blake2b(text.encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def hashed_seed(text: str) -> int:
    """A seed in [0, 2**48) that follows from a text, the same on every machine."""
    return int(unit_hash(text) * 2**48)
