"""Sampling of code indices: top-k, top-p, temperature, classifier-free guidance, and the decoding loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

LogitsFn = Callable[[int, "Tensor | None"], Tensor]  # (position, previous index (B,)) -> logits (B, K)
StepCallback = Callable[[Tensor], None]  # receives all indices so far, (B, t)


@dataclass(frozen=True)
class SamplingParams:
    """How code indices are sampled; k = 300 and p = 1 are the paper's choice.

    Args:
        temperature: divides the logits; 0 always takes the most likely code.
        top_k: keep the k most likely codes.
        top_p: keep the fewest most likely codes whose probabilities sum to p, at least one.
        guidance_scale: scale of classifier-free guidance; 1 disables it. Needs a transformer trained with
            ``model.conditioning.drop_prob`` above 0.
        guidance_power: 0 applies the same guidance at all positions; above 0 it grows along the image, below 0 it
            fades, see ``guidance_scales``.

    Raises:
        TypeError, ValueError: a value is not a number, or out of range.
    """

    temperature: float = 1.0
    top_k: int = 300
    top_p: float = 1.0
    guidance_scale: float = 1.0
    guidance_power: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k < 1 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k must be a whole number of at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale must be at least 0, got {self.guidance_scale}")

    @property
    def uses_guidance(self) -> bool:
        """Whether the logits without condition are needed, too."""
        return self.guidance_scale != 1

    def guidance_scales(self, length: int) -> list[float]:
        """Return the guidance scale at each position, ``1 + (guidance_scale - 1) * w``.

        With x in [0, 1] from the first position to the last, w is 1 for power 0, rises as ``x ** power`` for a
        positive power, and falls as ``(1 - x) ** -power`` for a negative one.
        """
        power = self.guidance_power
        scales = []
        for position in range(length):
            x = position / max(length - 1, 1)
            weight = x**power if power >= 0 else (1 - x) ** -power
            scales.append(1 + (self.guidance_scale - 1) * weight)
        return scales


def resolve_params(params: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
    """Return sampling parameters, with some replaced by name.

    Args:
        params: the parameters; None stands for the defaults.
        overrides: fields of ``SamplingParams`` and their values.

    Raises:
        TypeError: a name is not a field of ``SamplingParams``.
    """
    names = [field.name for field in fields(SamplingParams)]
    unknown = [name for name in overrides if name not in names]
    if unknown:
        raise TypeError(f"a sampling parameter must be one of {', '.join(names)}, got {', '.join(unknown)}")
    return replace(params or SamplingParams(), **overrides)


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


def with_cfg(logits_fn: LogitsFn, scales: Sequence[float]) -> LogitsFn:
    """Apply classifier-free guidance (arXiv:2207.12598): ``l = l_null + scale * (l_condition - l_null)``.

    Args:
        logits_fn: scores a batch of 2 B samples, B with the condition and the same B with the null condition.
        scales: guidance scale at each position; 1 disables guidance.
    """

    def guided_logits(position: int, previous: Tensor | None) -> Tensor:
        both = None if previous is None else previous.repeat(2)
        condition, null = logits_fn(position, both).float().chunk(2)
        return null + scales[position] * (condition - null)

    return guided_logits


@torch.no_grad()
def sample_sequence(
    logits_fn: LogitsFn,
    uniforms: Tensor,
    params: SamplingParams,
    *,
    prefix: Tensor | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Sample T indices per sample, each given the previous ones: uniforms (B, T) -> (B, T) int64.

    Args:
        logits_fn: called at positions 0, 1, 2, ... in turn.
        uniforms: (B, T) in [0, 1), see ``sample_from_logits``.
        params: see ``sample_from_logits``; guidance is applied by ``with_cfg``.
        prefix: the first indices (B, P), which are kept as they are.
        callback: called at every step with all indices so far, (B, t).
    """
    prefix_length = 0 if prefix is None else prefix.shape[1]
    indices = torch.empty(uniforms.shape, dtype=torch.int64, device=uniforms.device)
    previous = None
    for position in range(uniforms.shape[1]):
        logits = logits_fn(position, previous)
        if prefix is not None and position < prefix_length:
            previous = prefix[:, position]
        else:
            previous = sample_from_logits(logits, uniforms[:, position], params)
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
    """Return one seed per sample: ``seed``, ``seed + 1``, ...; the given seeds; or (None) a random first one."""
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
        if not 0 <= value < 2**63:
            raise ValueError(f"seeds must be in [0, 2**63), got {value}")
    return seeds
