"""Quantizers, one method per file. A new one is added in its file and in the table below."""

from __future__ import annotations

from typing import Any

from clipgen.models.config import QuantizerConfig
from clipgen.models.quantizers.base import Quantizer
from clipgen.models.quantizers.fsq import FSQ
from clipgen.models.quantizers.gumbel import GumbelQuantizer
from clipgen.models.quantizers.lfq import LFQ
from clipgen.models.quantizers.vector import VectorQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "euclidean": VectorQuantizer,  # the paper
    "cosine": VectorQuantizer,
    "fsq": FSQ,
    "lfq": LFQ,
    "gumbel": GumbelQuantizer,
}


def make_quantizer(config: QuantizerConfig) -> Any:
    """Return the quantizer that a configuration names, a module that fulfills the ``Quantizer`` protocol.

    Raises:
        ValueError: the type is unknown, or its sizes are inconsistent.
    """
    if config.type not in QUANTIZERS:
        raise ValueError(f"quantizer.type must be one of {', '.join(QUANTIZERS)}, got {config.type!r}")
    return QUANTIZERS[config.type].from_config(config)
