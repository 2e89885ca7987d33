"""Build a request from the values of a tab and the shared settings. Invalid values raise ValueError."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clipgen.app.request import ImageRequest, check_sweep, random_seed
from clipgen.app.settings import Settings
from clipgen.app.uploads import read_upload
from clipgen.generation.sweep import expand_sweep
from clipgen.sampling_params import SamplingParams

if TYPE_CHECKING:
    from PIL import Image

    from clipgen.generation.prompts import Prompt


def make_request(
    settings: Settings,
    *prompts: Prompt,
    axes: Sequence[tuple[str, Sequence[Any]]] = (),
    num_images: int | None = None,
    outpaint: Image.Image | None = None,
    keep_fraction: float = 0.5,
) -> ImageRequest:
    """Return a request, checked.

    Args:
        settings: the shared settings.
        prompts: one prompt, or both ends of an interpolation.
        axes: sampling parameters to combine.
        num_images: number of images; None takes that of the settings.
        outpaint: image to complete.
        keep_fraction: fraction of its height that is kept.
    """
    seed = settings.first_seed()
    rerank_from = int(settings.rerank_from) or None
    if len(prompts) > 1 or axes:
        # Neither interpolations nor sweeps are reranked.
        rerank_from = None
    request = ImageRequest(
        model=settings.model,
        prompts=prompts,
        sweep=tuple(SamplingParams(**(settings.sampling() | values)) for values in expand_sweep(axes)),
        num_images=int(settings.num_images) if num_images is None else num_images,
        seed=random_seed() if seed is None else seed,
        rerank_from=rerank_from,
        outpaint=outpaint,
        keep_fraction=keep_fraction,
    )
    request.check()
    return request


def text_request(settings: Settings, prompt: str) -> ImageRequest:
    """Return a request for images of a text."""
    return make_request(settings, prompt or "")


def image_request(settings: Settings, path: str | None) -> ImageRequest:
    """Return a request for variations of an uploaded image."""
    return make_request(settings, read_upload(path, "the image prompt"))


def mixture_request(settings: Settings, *terms: Any) -> ImageRequest:
    """Return a request for images of a mixture.

    Args:
        settings: the shared settings.
        terms: text, weight, text, weight, ...; empty texts are left out.
    """
    mixture: dict[str, float] = {}
    for text, weight in zip(terms[::2], terms[1::2]):
        if text and text.strip():
            mixture[text] = mixture.get(text, 0.0) + float(weight)
    if not mixture:
        raise ValueError("a mixture must have at least one text, got none")
    return make_request(settings, mixture)


def interpolation_request(settings: Settings, first: str, second: str, steps: float) -> ImageRequest:
    """Return a request for images that lead from one text to another."""
    return make_request(settings, first or "", second or "", num_images=int(steps))


def completion_request(settings: Settings, path: str | None, keep_fraction: float, prompt: str) -> ImageRequest:
    """Return a request for the lower part of an uploaded image; without a text the image is also the prompt."""
    image = read_upload(path, "the image to complete")
    has_text = bool(prompt and prompt.strip())
    return make_request(settings, prompt if has_text else image, outpaint=image, keep_fraction=keep_fraction)


def sweep_request(settings: Settings, prompt: str, top_k: str, top_p: str, num_images: float) -> ImageRequest:
    """Return a request for all combinations of values of top-k and top-p, which are separated by commas."""
    axes = [("top_k", parse_values("top_k", top_k, int)), ("top_p", parse_values("top_p", top_p, float))]
    # Before the combinations are made, which would take gigabytes for long lists.
    combinations = math.prod(len(values) for _, values in axes)
    check_sweep(combinations, combinations * int(num_images))
    return make_request(settings, prompt or "", axes=axes, num_images=int(num_images))


def parse_values(name: str, text: str, value_type: type) -> list[Any]:
    """Parse ``"100, 300"`` as ``[100, 300]``."""
    try:
        values = [value_type(value) for value in (text or "").split(",")]
    except ValueError:
        raise ValueError(f"{name} must be numbers separated by commas, got {text[:100]!r}") from None
    return list(dict.fromkeys(values))
