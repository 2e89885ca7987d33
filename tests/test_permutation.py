"""Permutations that are computed number by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipgen.data import permutation
from clipgen.data.permutation import permute, permuted


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000, 65536, 65537])
def test_every_number_occurs_once(size):
    numbers = permute(np.arange(size, dtype=np.uint64), size, seed=3)
    assert sorted(numbers.tolist()) == list(range(size))


def test_permutations_depend_on_the_seed_and_look_random():
    size = 100_000
    first, second = (permute(np.arange(size, dtype=np.uint64), size, seed) for seed in (1, 2))
    assert (first == second).mean() < 0.001
    for numbers in (first, second):
        places = np.arange(size)
        assert abs(np.corrcoef(places, numbers.astype(float))[0, 1]) < 0.02
        # neighbors are as far from each other as those of a random order, a third of the range
        distances = np.abs(np.diff(numbers.astype(float)))
        assert abs(distances.mean() / size - 1 / 3) < 0.01


def test_small_permutations_are_those_of_torch():
    """So that existing runs can be resumed."""
    expected = torch.randperm(50, generator=torch.Generator().manual_seed(7)).tolist()
    assert list(permuted(50, 7, range(50))) == expected
    assert list(permuted(50, 7, range(3, 44, 4))) == expected[3:44:4]


def test_parts_of_large_permutations_do_not_depend_on_the_blocks(monkeypatch):
    monkeypatch.setattr(permutation, "MAX_SIZE_IN_MEMORY", 10)
    monkeypatch.setattr(permutation, "BLOCK", 7)
    full = list(permuted(1000, 5, range(1000)))
    assert sorted(full) == list(range(1000))
    assert list(permuted(1000, 5, range(10, 900, 3))) == full[10:900:3]
    # a position in 10^12 numbers is computed at once
    assert 0 <= next(permuted(10**12, 5, range(10**11, 10**12))) < 10**12
