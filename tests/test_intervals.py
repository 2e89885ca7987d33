"""Intervals of fractions and means."""

from __future__ import annotations

import pytest
import torch

from clipgen.evaluation.intervals import bootstrap_interval, difference_interval, wilson_interval


def test_wilson_interval_matches_published_values():
    """Newcombe 1998 (Statistics in Medicine 17), Table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, trials), expected in published.items():
        assert wilson_interval(successes, trials) == pytest.approx(expected, abs=1e-4)


def test_wilson_interval_refuses_impossible_counts():
    for successes, trials in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=r"successes must be in \[0, trials\]"):
            wilson_interval(successes, trials)


def test_bootstrap_interval_of_one_group_is_that_of_the_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    low, high = bootstrap_interval([values])
    error = values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean().item() + 1.96 * error, abs=0.3 * error)


def test_bootstrap_interval_includes_the_variance_between_groups():
    """Values of a group are equal, so that only the choice of the groups varies."""
    groups = [torch.full((50,), float(i)) for i in range(3)]
    assert bootstrap_interval(groups) == (0, 2)


def test_interval_of_a_difference_shows_only_real_effects():
    generator = torch.Generator().manual_seed(2)
    base, equal, better = (torch.rand(3, 500, generator=generator) < p for p in (0.5, 0.5, 0.7))
    low, high = difference_interval(list(equal.float()), list(base.float()))
    assert low < 0 < high
    low, high = difference_interval(list(better.float()), list(base.float()))
    assert 0.1 < low < 0.2 < high < 0.3


def test_bootstrap_interval_refuses_empty_groups():
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([torch.ones(2), torch.ones(0)])
