"""Combinations of sampling parameters, and their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

from clipgen.sampling_params import SamplingParams

# Name of a field of ``SamplingParams``, and its values.
Axis = tuple[str, Sequence[Any]]


def expand_sweep(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Return all combinations of the values of a sweep; the last axis changes fastest."""
    names = [name for name, _ in axes]
    combinations = product(*(values for _, values in axes))
    return [dict(zip(names, values)) for values in combinations]


def sweep_labels(sweep: Sequence[SamplingParams]) -> list[str]:
    """Return one label per sampling parameters: the values that differ across the sweep."""
    values = [asdict(params) for params in sweep]
    varying = [name for name in values[0] if len({entry[name] for entry in values}) > 1]
    return [" ".join(f"{name}={entry[name]}" for name in varying) for entry in values]
