"""Intervals of measured fractions and means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Standard normal quantile of a two-sided 95 % interval.
Z95 = 1.959964


def wilson_interval(successes: float, trials: int, z: float = Z95) -> tuple[float, float]:
    """Return Wilson's score interval of a fraction, 95 % by default.

    Unlike the normal approximation, it is accurate near 0 and 1 and never leaves [0, 1].

    Args:
        successes: number of successes.
        trials: number of independent trials.
        z: quantile of the standard normal distribution.

    Raises:
        ValueError: there is no trial, or ``successes`` is not in [0, trials].
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes must be in [0, trials] with at least one trial, got {successes} of {trials}")
    fraction = successes / trials
    center = fraction + z**2 / (2 * trials)
    spread = z * math.sqrt(fraction * (1 - fraction) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    return max((center - spread) / scale, 0.0), min((center + spread) / scale, 1.0)


def bootstrap_interval(groups: Sequence[Tensor], resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean over groups and their values, from a nested bootstrap.

    A resample draws groups (seeds of training runs) with replacement, then values (images) with replacement in each.
    With few groups the interval is too narrow: the means of resamples of three vary 0.8 times as much as those of
    threes.

    Args:
        groups: values (N,) of each group.
        resamples: number of resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: there is no group, or a group is empty.
    """
    return percentiles(bootstrap_means(groups, resamples, torch.Generator().manual_seed(seed)))


def difference_interval(
    groups: Sequence[Tensor], others: Sequence[Tensor], resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of the mean of groups minus that of others, both resampled as in ``bootstrap_interval``."""
    generator = torch.Generator().manual_seed(seed)
    means = bootstrap_means(groups, resamples, generator)
    return percentiles(means - bootstrap_means(others, resamples, generator))


def bootstrap_means(groups: Sequence[Tensor], resamples: int, generator: torch.Generator) -> Tensor:
    """Return the mean (resamples,) of each resample, in float64.

    Args:
        groups: values (N,) of each group.
        resamples: number of resamples.
        generator: source of the random numbers.

    Raises:
        ValueError: there is no group, or a group is empty.
    """
    if not groups or any(len(group) == 0 for group in groups):
        raise ValueError("groups must contain at least one value each, got an empty one")
    means = torch.empty(resamples, dtype=torch.float64)
    for number in range(resamples):
        chosen = torch.randint(len(groups), (len(groups),), generator=generator).tolist()
        values = [resample(groups[index], generator).double().mean() for index in chosen]
        means[number] = torch.stack(values).mean()
    return means


def percentiles(means: Tensor) -> tuple[float, float]:
    """Return the bounds of the central 95 % of means (N,) in float64."""
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def resample(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return as many of the values (N,), drawn with replacement."""
    return values[torch.randint(len(values), (len(values),), generator=generator)]
