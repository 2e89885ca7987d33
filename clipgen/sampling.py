"""Drawing indices one after another: top-k, top-p and the decode loop, over any step function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

Step = Callable[[int, "Tensor | None"], Tensor]  # (position, previous index (B,)) -> logits (B, K)
Watch = Callable[[Tensor], None]
DEFAULTS = dict(temperature=1.0, top_k=300, top_p=1.0, guidance_scale=1.0, guidance_power=0.0)  # k, p: the paper's


def check_sampling(
    temperature: float, top_k: int, top_p: float, guidance_scale: float = 1.0, guidance_power: float = 0.0
) -> None:
    """Raise ValueError unless the settings make sense."""
    for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        if not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if not guidance_scale >= 0:
        raise ValueError(f"guidance_scale must be at least 0, got {guidance_scale}")
    for name, value in (("guidance_scale", guidance_scale), ("guidance_power", guidance_power)):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")


def draw(logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, top_k: int = 300, top_p: float = 1.0) -> Tensor:
    """Draw one index a row: top-k (Fan et al. 2018), then top-p (Holtzman et al. 2020), then the inverse CDF.

    Args:
        logits: (B, K); not written to.
        uniforms: (B,) in [0, 1): the randomness, so that a row does not depend on its neighbours.
        temperature: divides the logits; 0 takes the largest.
        top_k: keep the k largest. top_p: keep the fewest whose probabilities reach p, at least one.

    Returns:
        (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    values, candidates = logits.float().topk(min(top_k, logits.shape[-1]), dim=-1)  # sorted, largest first
    p = torch.softmax((values - values[:, :1]) / temperature, dim=-1)  # at most 0: a tiny temperature must not overflow
    before = p.cumsum(dim=-1) - p  # probability of all better candidates; 0 for the best, which always stays
    cumulative = torch.where(before < top_p, p, 0.0).cumsum(dim=-1)
    target = uniforms[:, None].to(p) * cumulative[:, -1:]
    choice = (cumulative <= target).sum(dim=-1, keepdim=True)
    last = (before < top_p).sum(dim=-1, keepdim=True) - 1
    return candidates.gather(-1, choice.minimum(last))[:, 0]


def guided(step: Step, scales: Sequence[float]) -> Step:
    """Classifier-free guidance (arXiv:2207.12598): the inner step scores B conditioned rows, then the same B without.

    ``l = l_null + scale * (l_condition - l_null)``, with the scale of each position: 1 is no guidance.
    """

    def guided_step(position: int, previous: Tensor | None) -> Tensor:
        condition, null = step(position, None if previous is None else previous.repeat(2)).float().chunk(2)
        return null + scales[position] * (condition - null)

    return guided_step


def guidance_scales(scale: float, power: float, length: int) -> list[float]:
    """The scale at each position: ``1 + (scale - 1) * w``, x in [0, 1] from the first to the last. w is 1 for power 0,
    rises as ``x ** power`` for a power above, falls as ``(1 - x) ** -power`` for one below."""
    places = [position / max(length - 1, 1) for position in range(length)]
    return [1 + (scale - 1) * (x**power if power >= 0 else (1 - x) ** -power) for x in places]


@torch.no_grad()
def decode(
    step: Step,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 300,
    top_p: float = 1.0,
    given: Tensor | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Draw T indices a row, each given the ones before: uniforms (B, T) -> (B, T) int64.

    Args:
        given: the first indices (B, P), which are taken as they are. watch: called with all indices so far, (B, t).
    """
    check_sampling(temperature, top_k, top_p)
    indices = torch.empty(uniforms.shape, dtype=torch.int64, device=uniforms.device)
    previous = None
    for position in range(uniforms.shape[1]):
        logits = step(position, previous)
        if given is not None and position < given.shape[1]:
            previous = given[:, position]
        else:
            previous = draw(logits, uniforms[:, position], temperature=temperature, top_k=top_k, top_p=top_p)
        indices[:, position] = previous
        if watch:
            watch(indices[:, : position + 1])
    return indices


def per_sample_uniforms(seeds: Sequence[int], length: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform numbers (len(seeds), length) in [0, 1): each row from its own seed, whatever the batch it is drawn in."""
    streams = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    rows = [torch.rand(length, generator=stream, dtype=torch.float32, device="cpu") for stream in streams]
    return torch.stack(rows).to(device)


def per_sample_seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """One seed a row: ``seed``, ``seed + 1``, ...; or the given ones; None draws a first one at random."""
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    if not isinstance(seed, (Integral, Iterable)):
        raise TypeError(f"seed must be an int, a list with one for each row, or None, got {seed!r}")
    seeds = [int(seed) + row for row in range(rows)] if isinstance(seed, Integral) else list(map(int, seed))  # type: ignore[arg-type]
    if len(seeds) != rows:
        raise ValueError(f"seed must be one number, or one for each of the {rows} rows, got {len(seeds)}")
    if senseless := [each for each in seeds if not 0 <= each < 2**63]:
        raise ValueError(f"seeds must be in [0, 2**63), got {senseless[0]}")
    return seeds
