"""Sampling, the decoding loop and guidance, compared with exact probabilities and transformers' own filters."""

from __future__ import annotations

import argparse
import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from clipgen.cli.sampling_args import add_sampling_options, sampling_options
from clipgen.sampling import (
    make_sample_fn,
    per_sample_seeds,
    per_sample_uniforms,
    sample_from_logits,
    sample_sequence,
    with_cfg,
)
from clipgen.sampling_params import MAX_GUIDANCE_SCALE, MIN_TEMPERATURE, SamplingParams, resolve_params

SETTINGS = [
    dict(temperature=1.0, top_k=300, top_p=1.0),
    dict(temperature=1.0, top_k=5, top_p=1.0),
    dict(temperature=1.0, top_k=300, top_p=0.6),
    dict(temperature=0.7, top_k=12, top_p=0.8),
    dict(temperature=2.0, top_k=3, top_p=0.9),
    dict(temperature=1.0, top_k=1, top_p=1.0),
]


def filtered_softmax(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Return the distribution by transformers' filters, in double precision: (B, K) -> (B, K)."""
    scores = TemperatureLogitsWarper(temperature)(None, logits.double())
    scores = TopKLogitsWarper(min(top_k, logits.shape[-1]))(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1)


def sample(logits: Tensor, uniforms: Tensor, **settings) -> Tensor:
    return sample_from_logits(logits, uniforms, SamplingParams(**settings))


def guidance_scales(scale: float, power: float, length: int) -> list[float]:
    return SamplingParams(guidance_scale=scale, guidance_power=power).guidance_scales(length)


def frequencies(logits: Tensor, uniforms: Tensor, **settings) -> Tensor:
    """Return how often each index is sampled from one sample's logits (K,)."""
    indices = sample(logits.expand(len(uniforms), -1), uniforms, **settings)
    return torch.bincount(indices, minlength=len(logits)) / len(uniforms)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sampling_follows_the_filtered_softmax(settings):
    """Equidistant uniforms select each index as often as its probability demands, up to one of them."""
    n = 20_000
    equidistant = (torch.arange(n) + 0.5) / n
    for logits in 2 * torch.randn(3, 40):
        expected = filtered_softmax(logits[None], **settings)[0]
        frequency = frequencies(logits, equidistant, **settings)
        assert not frequency[expected == 0].any()
        torch.testing.assert_close(frequency.double(), expected, atol=2 / n, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS[:5], ids=str)
def test_consecutive_seeds_give_independent_samples(settings):
    """By a chi-square test of the index frequencies."""
    n = 20_000
    logits = torch.randn(10)
    expected = filtered_softmax(logits[None], **settings)[0]
    counts = frequencies(logits, per_sample_uniforms(range(n), 2)[:, 1], **settings).double() * n
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - n * expected)[possible].square() / (n * expected[possible])).sum().item()
    degrees_of_freedom = possible.sum().item() - 1
    assert chi_square < degrees_of_freedom + 4 * math.sqrt(2 * degrees_of_freedom) + 4


def test_top_k_keeps_exactly_k_codes_per_sample():
    logits = torch.randn(4, 20)
    logits[1] = 0.0  # all equal
    equidistant = (torch.arange(2000) + 0.5) / 2000
    for row in logits:
        for k in (1, 2, 7, 20, 99):
            kept = frequencies(row / 10, equidistant, top_k=k) > 0
            assert kept.sum() == min(k, 20)
            assert row[kept].min() >= row[~kept].max() if k < 20 else True


def test_top_p_keeps_at_least_one_code_per_sample():
    """An implementation that shifts the mask along the batch would keep none for the first sample."""
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [1 / 3, 1 / 3, 1 / 3]]))
    for u in (0.0, 0.5, 1 - 2**-24):
        assert sample(logits, torch.full((3,), u), top_p=1e-9).tolist()[:2] == [0, 2]
        assert sample(logits, torch.full((3,), u), top_p=0.5).tolist()[:2] == [0, 2]
    kept = [set(sample(logits, torch.full((3,), u), top_p=0.7).tolist()[:1]) for u in (0.0, 0.3, 0.66, 0.68, 0.999)]
    assert kept == [{0}, {0}, {0}, {1}, {1}]  # the first code has 0.6 / 0.9 = 0.667 of the probability


def test_sample_does_not_depend_on_its_batch():
    logits, uniforms = torch.randn(16, 30), torch.rand(16)
    together = sample(logits, uniforms, top_k=10, top_p=0.9)
    alone = torch.cat([sample(logits[i : i + 1], uniforms[i : i + 1], top_k=10, top_p=0.9) for i in range(16)])
    assert torch.equal(together, alone) and len(together.unique()) > 3


def test_logits_are_not_modified():
    logits = torch.randn(4, 30)
    before = logits.clone()
    for settings in (*SETTINGS, dict(temperature=0)):
        sample(logits, torch.rand(4), **settings)
    assert torch.equal(logits, before)


def test_temperatures_near_zero_select_the_argmax():
    logits = 100 * torch.randn(64, 30)
    for temperature in (0, 1e-4, 1e-30, 1e-37):
        assert torch.equal(sample(logits, torch.rand(64), temperature=temperature), logits.argmax(-1)), temperature


def test_extreme_logits_and_uniforms_give_valid_indices():
    logits = torch.tensor([[1e4, 0.0, -1e4], [-math.inf, 0.0, 0.0], [0.0, -math.inf, -math.inf]])
    for u in (0.0, 0.5, 1 - 2**-24):
        indices = sample(logits, torch.full((3,), u)).tolist()
        assert indices[0] == 0 and indices[1] in (1, 2) and indices[2] == 0
    half = sample(logits.bfloat16(), torch.rand(3))
    assert half.dtype == torch.int64 and half.shape == (3,)


def test_extreme_params_give_valid_indices():
    """Scales and temperatures beyond them give NaN, which no index is sampled from."""
    params = SamplingParams(temperature=MIN_TEMPERATURE, guidance_scale=MAX_GUIDANCE_SCALE)
    both = torch.tensor([[0.0, 1e30, -1e30], [0.0, -1e30, 1e30]])
    logits = with_cfg(lambda position, previous: both, params.guidance_scales(1))(0, None)
    assert sample_from_logits(logits, torch.tensor([0.5]), params).tolist() == [1]


def test_sampled_indices_are_fed_back():
    calls = []

    def logits_fn(position: int, previous: Tensor | None) -> Tensor:
        """Make the next number, modulo 5, certain."""
        calls.append((position, None if previous is None else previous.tolist()))
        following = torch.full((2,), 3) if previous is None else (previous + 1) % 5
        return torch.nn.functional.one_hot(following, 5).float() * 1e3

    indices = sample_sequence(make_sample_fn(logits_fn, torch.rand(2, 4), SamplingParams()), (2, 4))
    assert indices.tolist() == [[3, 4, 0, 1]] * 2 and indices.dtype == torch.int64
    assert calls == [(0, None), (1, [3, 3]), (2, [4, 4]), (3, [0, 0])]


def test_each_uniform_is_used_once():
    """With equal logits of 4 codes, a uniform determines the index."""
    uniforms = torch.tensor([[0.1, 0.3, 0.6], [0.5, 0.0, 0.99]])
    sample_fn = make_sample_fn(lambda position, previous: torch.zeros(2, 4), uniforms, SamplingParams())
    indices = sample_sequence(sample_fn, uniforms.shape)
    order = torch.zeros(1, 4).topk(4).indices[0]
    assert torch.equal(indices, order[(uniforms * 4).long()])


def test_guidance_by_hand():
    condition, null = torch.randn(2, 5), torch.randn(2, 5)
    fed_back = []

    def logits_fn(position: int, previous: Tensor | None) -> Tensor:
        fed_back.append(previous)
        return torch.cat([condition, null])

    torch.testing.assert_close(with_cfg(logits_fn, [1.0])(0, None), condition)
    torch.testing.assert_close(with_cfg(logits_fn, [0.0])(0, None), null)
    torch.testing.assert_close(with_cfg(logits_fn, [9.0, 3.0])(1, torch.tensor([7, 8])), 3 * condition - 2 * null)
    assert fed_back[-1].tolist() == [7, 8, 7, 8]  # both halves of the batch continue the same sequences


def test_guidance_scales_by_position():
    assert guidance_scales(3.0, 0.0, 4) == [3.0] * 4
    assert guidance_scales(5.0, 1.0, 5) == [1, 2, 3, 4, 5] and guidance_scales(5.0, -1.0, 5) == [5, 4, 3, 2, 1]
    assert guidance_scales(5.0, 2.0, 3) == [1, 2, 5] and guidance_scales(0.0, 1.0, 3) == [1, 0.5, 0]
    assert guidance_scales(2.0, 1.0, 1) == [1]


def test_uniforms_depend_only_on_the_seed():
    streams = per_sample_uniforms([5, 6, 5], 8)
    assert streams.shape == (3, 8) and torch.equal(streams[0], streams[2]) and not torch.equal(streams[0], streams[1])
    assert torch.equal(per_sample_uniforms([6], 8)[0], streams[1])
    assert torch.equal(per_sample_uniforms([6], 4)[0], streams[1, :4])
    state = torch.random.get_rng_state()
    per_sample_uniforms([1], 8)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_seeds_are_consecutive_given_or_random():
    assert per_sample_seeds(7, 3) == [7, 8, 9]
    assert per_sample_seeds([4, 1], 2) == [4, 1]
    assert per_sample_seeds(np.int64(7), 2) == per_sample_seeds(np.array([7, 8]), 2) == [7, 8]
    random_seeds = per_sample_seeds(None, 2)
    assert random_seeds[1] == random_seeds[0] + 1 and per_sample_seeds(None, 2) != random_seeds
    with pytest.raises(ValueError, match="one for each of the 3 samples, got 2"):
        per_sample_seeds([1, 2], 3)
    assert per_sample_seeds(2**63 - 2, 2) == [2**63 - 2, 2**63 - 1]
    for seed, first in ((2**63 - 1, 2**63), (-1, -1)):
        with pytest.raises(ValueError, match=rf"seed must be in \[0, 2\*\*63\), got {first}"):
            per_sample_seeds(seed, 2)


def test_uniforms_do_not_depend_on_the_default_dtype():
    expected = per_sample_uniforms([3], 5)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    uniforms = per_sample_uniforms([3], 5)
    torch.set_default_dtype(default)
    assert torch.equal(uniforms, expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", 10**400),
        ("temperature", 1e-308),
        ("top_k", 0),
        ("top_k", -3),
        ("top_p", 0.0),
        ("top_p", 1.3),
        ("top_p", math.nan),
        ("guidance_scale", -1.0),
        ("guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("guidance_scale", 1e308),
        ("guidance_power", math.inf),
    ],
)
def test_params_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {re.escape(str(value))}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("value", ["300", None, True])
def test_params_that_are_not_numbers_are_refused(value):
    with pytest.raises(TypeError, match=f"top_k must be a number, got {value!r}"):
        SamplingParams(top_k=value)


def test_only_the_options_that_were_given_override_the_defaults_of_a_model():
    parser = argparse.ArgumentParser()
    add_sampling_options(parser)
    assert sampling_options(parser.parse_args([])) == {}
    assert sampling_options(parser.parse_args(["--top-k", "7"])) == {"top_k": 7}
    with pytest.raises(ValueError, match="top_k must be a whole number of at least 1, got 0"):
        sampling_options(parser.parse_args(["--top-k", "0"]))


def test_params_are_overridden_by_name():
    params = SamplingParams(top_k=5, top_p=0.5)
    assert resolve_params(params, {"top_k": 7}) == SamplingParams(top_k=7, top_p=0.5)
    assert resolve_params(None, {}) == SamplingParams()
    with pytest.raises(ValueError, match="top_k must be a whole number"):
        resolve_params(params, {"top_k": 0})
    with pytest.raises(TypeError, match=r"a sampling parameter must be one of temperature, top_k, .*, got top, k"):
        resolve_params(params, {"top": 1, "k": 2, "top_k": 3})
