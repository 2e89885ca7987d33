"""Random permutations of numbers that are too many to be kept in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

# Up to here, permutations are kept in memory (80 MB).
MAX_SIZE_IN_MEMORY = 10_000_000
# Numbers are converted to a Python list in blocks, because a list takes five times the memory of an array.
BLOCK = 10_000
_ROUNDS = 6


def permuted(size: int, seed: int, places: range) -> Iterator[int]:
    """Yield the numbers at some places of a random permutation of the numbers below ``size``.

    Large permutations are computed in blocks.
    """
    order = None
    if size <= MAX_SIZE_IN_MEMORY:
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).numpy()
    for start in range(0, len(places), BLOCK):
        block = places[start : start + BLOCK]
        if order is not None:
            numbers = order[block.start : block.stop : block.step]
        else:
            numbers = permute(np.arange(block.start, block.stop, block.step, dtype=np.uint64), size, seed)
        yield from numbers.tolist()


def permute(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Return the numbers at positions of a permutation, each computed by itself.

    A Feistel network permutes the numbers below a power of four. Numbers that are not below ``size`` are permuted again
    until they are (cycle walking, Black and Rogaway 2002).
    """
    half_bits = np.uint64(((size - 1).bit_length() + 1) // 2)
    keys = np.random.default_rng(seed).integers(0, 2**64, _ROUNDS, dtype=np.uint64)
    numbers = positions.copy()
    outside = np.arange(len(numbers))
    while len(outside):
        numbers[outside] = feistel(numbers[outside], half_bits, keys)
        outside = outside[numbers[outside] >= size]
    return numbers


def feistel(numbers: np.ndarray, half_bits: np.uint64, keys: np.ndarray) -> np.ndarray:
    """Permute the numbers of ``2 * half_bits`` bits."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left = numbers >> half_bits
    right = numbers & mask
    for key in keys:
        mixed = left ^ (mix(right ^ key) & mask)
        left = right
        right = mixed
    return (left << half_bits) | right


def mix(numbers: np.ndarray) -> np.ndarray:
    """Return hashes of numbers, by the finalizer of SplitMix64."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
