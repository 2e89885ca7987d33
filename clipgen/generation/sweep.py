"""Combinations of sampling parameters, and their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import product
from typing import Any

from clipgen.sampling_params import SamplingParams

# Name of a field of ``SamplingParams``, and its values.
Axis = tuple[str, Sequence[Any]]


def expand_sweep(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Return all combinations of the values of a sweep; the last axis changes fastest."""
    names = [name for name, _ in axes]
    choices = [values for _, values in axes]
    return [dict(zip(names, values)) for values in product(*choices)]


def sweep_labels(sweep: Sequence[SamplingParams]) -> list[str]:
    """Return one label per sampling parameters: the values that differ across the sweep."""
    varying = [field.name for field in fields(SamplingParams) if varies(field.name, sweep)]
    return [sweep_label(params, varying) for params in sweep]


def varies(name: str, sweep: Sequence[SamplingParams]) -> bool:
    """Return whether a sampling parameter has several values in a sweep."""
    return len({getattr(params, name) for params in sweep}) > 1


def sweep_label(params: SamplingParams, names: Sequence[str]) -> str:
    """Return the values of some sampling parameters in words."""
    return " ".join(f"{name}={getattr(params, name)}" for name in names)
