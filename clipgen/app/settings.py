"""The values of the settings that all tabs share."""

from __future__ import annotations

from typing import Any, NamedTuple

from clipgen.generation.sampling_options import SAMPLING_OPTIONS


class Settings(NamedTuple):
    """The values of the shared settings, as the page sends them."""

    model: str
    num_images: float
    seed: str
    rerank_from: float
    temperature: float
    top_k: float
    top_p: float
    guidance_scale: float
    guidance_power: float

    def sampling(self) -> dict[str, Any]:
        """Return the sampling parameters by name, with the types of ``SamplingParams``."""
        names = [name for name in self._fields if name in SAMPLING_OPTIONS]
        return {name: SAMPLING_OPTIONS[name].type(getattr(self, name)) for name in names}

    def first_seed(self) -> int | None:
        """Return the seed; None if the field is empty.

        Raises:
            ValueError: the text is not a whole number.
        """
        text = str(self.seed or "").strip()
        if not text:
            return None
        if not text.isascii() or not text.isdigit() or len(text) > 19:
            raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, or empty, got {text[:30]!r}")
        return int(text)
