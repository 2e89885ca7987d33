"""Sampling of code indices: top-k, top-p, temperature, classifier-free guidance, and the decoding loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from clipgen.sampling_params import SamplingParams, check_seed

LogitsFn = Callable[[int, "Tensor | None"], Tensor]  # (position, previous index (B,)) -> logits (B, K)
SampleFn = Callable[[int, "Tensor | None"], Tensor]  # (position, previous index (B,)) -> index (B,)
StepCallback = Callable[[Tensor], None]  # receives all indices so far, (B, t)


def sample_from_logits(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> Tensor:
    """Sample one index per sample: top-k (Fan et al. 2018), top-p (Holtzman et al. 2020), then the inverse CDF.

    Args:
        logits: (B, K); not modified.
        uniforms: (B,) in [0, 1), the randomness, so that a sample does not depend on the rest of the batch.
        params: temperature, top_k and top_p.

    Returns:
        (B,) int64.
    """
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    # Sorted in descending order. The difference to the largest logit cannot overflow at low temperatures.
    values, candidates = logits.float().topk(min(int(params.top_k), logits.shape[-1]), dim=-1)
    p = torch.softmax((values - values[:, :1]) / params.temperature, dim=-1)
    better = p.cumsum(dim=-1) - p  # probability of all better candidates; 0 for the best, which is always kept
    kept = better < params.top_p
    cumulative = torch.where(kept, p, 0.0).cumsum(dim=-1)
    target = uniforms[:, None].to(p) * cumulative[:, -1:]
    choice = (cumulative <= target).sum(dim=-1, keepdim=True)
    last_kept = kept.sum(dim=-1, keepdim=True) - 1
    return candidates.gather(-1, choice.minimum(last_kept))[:, 0]


def make_sample_fn(logits_fn: LogitsFn, uniforms: Tensor, params: SamplingParams) -> SampleFn:
    """Return the function that samples the index at a position from its logits.

    Args:
        logits_fn: called at positions 0, 1, 2, ... in turn.
        uniforms: (B, T) in [0, 1), see ``sample_from_logits``.
        params: see ``sample_from_logits``; guidance is applied by ``with_cfg``.
    """

    def sample_fn(position: int, previous: Tensor | None) -> Tensor:
        return sample_from_logits(logits_fn(position, previous), uniforms[:, position], params)

    return sample_fn


def with_cfg(logits_fn: LogitsFn, scales: Sequence[float]) -> LogitsFn:
    """Apply classifier-free guidance (arXiv:2207.12598), see ``guide``.

    Args:
        logits_fn: scores a batch of 2 B samples, B with the condition and the same B with the null condition.
        scales: guidance scale at each position; 1 disables guidance.
    """

    def guided_logits(position: int, previous: Tensor | None) -> Tensor:
        both = None if previous is None else previous.repeat(2)
        return guide(logits_fn(position, both), scales[position])

    return guided_logits


def guide(logits: Tensor, scale: float | Tensor) -> Tensor:
    """Combine logits (2 B, K) with the condition and with the null condition: ``l_null + scale * (l - l_null)``."""
    conditional, null = logits.float().chunk(2)
    return null + scale * (conditional - null)


@torch.no_grad()
def sample_sequence(
    sample_fn: SampleFn,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    *,
    prefix: Tensor | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Sample T indices per sample, each given the previous ones, (B, T) int64.

    Args:
        sample_fn: called at positions 0, 1, 2, ... in turn. It may overwrite what it returned before.
        shape: (B, T).
        device: device of the indices.
        prefix: the first indices (B, P), which are kept as they are.
        callback: called at every step with all indices so far, (B, t).
    """
    prefix_length = 0 if prefix is None else prefix.shape[1]
    indices = torch.empty(tuple(shape), dtype=torch.int64, device=device)
    previous = None
    for position in range(shape[1]):
        sampled = sample_fn(position, previous)
        previous = prefix[:, position] if prefix is not None and position < prefix_length else sampled
        indices[:, position] = previous
        if callback:
            callback(indices[:, : position + 1])
    return indices


def per_sample_uniforms(seeds: Sequence[int], length: int, device: torch.device | str = "cpu") -> Tensor:
    """Return uniform numbers (len(seeds), length) in [0, 1), each row from its own seed.

    A sample's numbers do not depend on the batch it is in, nor on the device: they are generated on the CPU.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed)
        rows.append(torch.rand(length, generator=generator, dtype=torch.float32, device="cpu"))
    return torch.stack(rows).to(device)


def per_sample_seeds(seed: int | Sequence[int] | None, batch_size: int) -> list[int]:
    """Return one seed per sample: ``seed``, ``seed + 1``, ...; the given seeds; or (None) a random first one.

    Raises:
        TypeError: the seed is not a whole number, a list of them, or None.
        ValueError: the number of seeds is not the batch size, or a seed is not in [0, 2**63).
    """
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    if not isinstance(seed, (Integral, Iterable)):
        raise TypeError(f"seed must be an int, a list with one seed per sample, or None, got {seed!r}")
    if isinstance(seed, Integral):
        seeds = [int(seed) + i for i in range(batch_size)]
    else:
        seeds = [int(value) for value in seed]  # type: ignore[union-attr]
    if len(seeds) != batch_size:
        raise ValueError(f"seed must be one number, or one for each of the {batch_size} samples, got {len(seeds)}")
    for value in seeds:
        check_seed(value)
    return seeds
