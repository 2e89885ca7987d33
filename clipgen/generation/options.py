"""Options of the methods that generate images, besides the sampling parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from PIL import Image
from torch import Tensor

from clipgen.sampling_params import SamplingParams, resolve_params

# Receives the images so far, (B, 3, h, W).
Preview = Callable[[Tensor], None]
# Receives the work done since the last call, in images.
Progress = Callable[[float], None]


@dataclass(frozen=True)
class GenerationOptions:
    """Keyword arguments of the methods that generate images.

    Args:
        outpaint: image to complete: its upper part is kept, the rest is generated.
        keep_fraction: fraction of the height of ``outpaint`` that is kept.
        preview: called after each row of indices with the images so far, (B, 3, h, W) in [-1, 1].
        progress: called after each row of indices with the work done since the last call, in images (a fraction);
            does not decode.
    """

    outpaint: Image.Image | None = None
    keep_fraction: float = 0.5
    preview: Preview | None = None
    progress: Progress | None = None


def resolve_options(
    params: SamplingParams | None,
    keywords: Mapping[str, Any],
) -> tuple[SamplingParams, GenerationOptions]:
    """Divide keyword arguments into sampling parameters and other options.

    Args:
        params: sampling parameters, which the keyword arguments override; None uses the defaults.
        keywords: fields of ``SamplingParams`` and ``GenerationOptions`` with their values.

    Raises:
        TypeError: a name is a field of neither.
    """
    sampling_names = [field.name for field in fields(SamplingParams)]
    option_names = [field.name for field in fields(GenerationOptions)]
    unknown = [name for name in keywords if name not in sampling_names + option_names]
    if unknown:
        names = ", ".join(sampling_names + option_names)
        raise TypeError(f"a keyword argument must be one of {names}, got {', '.join(unknown)}")
    options = {name: keywords[name] for name in option_names if name in keywords}
    sampling = {name: keywords[name] for name in sampling_names if name in keywords}
    return resolve_params(params, sampling), GenerationOptions(**options)
