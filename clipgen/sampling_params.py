"""Parameters of sampling, which are checked without importing torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

# Logits are divided by the temperature in float32, which rounds smaller numbers to 0.
MIN_TEMPERATURE = 1e-37
# Guided logits are finite in float32 up to much larger scales.
MAX_GUIDANCE_SCALE = 1000


def check_seed(seed: int) -> None:
    """Raise ValueError if a seed is out of range."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")


def check_num_images(num_images: int, rerank_from: int | None) -> None:
    """Raise ValueError if the number of images per prompt, or of candidates for them, is out of range."""
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    if rerank_from is not None and rerank_from < num_images:
        raise ValueError(f"rerank_from must be at least num_images ({num_images}), got {rerank_from}")


def is_finite(value: Any) -> bool:
    """Return whether a number is finite; an integer that is too large for a float is not."""
    return bool(abs(value) <= sys.float_info.max)


@dataclass(frozen=True)
class SamplingParams:
    """Parameters for sampling code indices; k = 300 and p = 1 are the paper's choice.

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
            if not is_finite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature must be 0 or at least {MIN_TEMPERATURE}, got {self.temperature}")
        if self.top_k < 1 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k must be a whole number of at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale must be at least 0, got {self.guidance_scale}")
        if self.guidance_scale > MAX_GUIDANCE_SCALE:
            raise ValueError(f"guidance_scale must be at most {MAX_GUIDANCE_SCALE}, got {self.guidance_scale}")

    @property
    def uses_guidance(self) -> bool:
        """Whether the logits without condition are also needed."""
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
        params: the parameters; None uses the defaults.
        overrides: fields of ``SamplingParams`` and their values.

    Raises:
        TypeError: a name is not a field of ``SamplingParams``.
    """
    names = [field.name for field in fields(SamplingParams)]
    unknown = [name for name in overrides if name not in names]
    if unknown:
        raise TypeError(f"a sampling parameter must be one of {', '.join(names)}, got {', '.join(unknown)}")
    return replace(params or SamplingParams(), **overrides)
