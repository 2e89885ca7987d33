"""What is asked for: a sentence, a picture, a mixture of sentences, or an embedding."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from torch import Tensor

from clipgen.files import read_text

Prompt = str | Mapping[str, float] | Image.Image | Tensor


def describe(prompt: Prompt) -> str:
    """A prompt in words, for file names and metadata."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        terms = " ".join(f"{'-' if weight < 0 else '+'} {abs(weight):g} {text}" for text, weight in prompt.items())
        return terms.removeprefix("+ ")
    return "an image" if isinstance(prompt, Image.Image) else "an embedding"


def parse_mixture(text: str) -> dict[str, float]:
    """``"0.7 a cat + 0.3 a dog"`` -> ``{"a cat": 0.7, "a dog": 0.3}``; a term without a number counts 1.

    Raises:
        ValueError: a term is empty.
    """
    first, *rest = re.split(r"(?:^|\s)([+-])(?:\s|$)", text.strip())
    mixture: dict[str, float] = {}
    for sign, term in [("+", first)] * bool(first or not rest) + list(zip(rest[::2], rest[1::2])):
        weighted = re.fullmatch(r"([+-]?\d*\.?\d+)\s+(.*)", term.strip())
        weight, words = (float(weighted[1]), weighted[2]) if weighted else (1.0, term.strip())
        if not words:
            raise ValueError(f'a mixture must be terms such as "0.7 a cat + 0.3 a dog", got {text!r}')
        mixture[words] = mixture.get(words, 0.0) + (weight if sign == "+" else -weight)
    return mixture


def read_sentences(path: Path) -> list[str]:
    """A sentence a line; empty lines are none."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def check_request(prompt: Prompt, num_images: int, rerank_from: int | None) -> None:
    """Raise ValueError unless the request makes sense."""
    if not isinstance(prompt, (str, Mapping, Image.Image, Tensor)):
        raise TypeError(f"prompt must be a sentence, a mixture, a picture or an embedding, got {prompt!r}")
    texts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Mapping) else ["an image"]
    for text in texts or [""]:
        if not text.strip():
            raise ValueError(f"prompt must not be empty, got {text!r}")
        if any("\ud800" <= character <= "\udfff" for character in text):  # what Python makes of bytes of no text
            raise ValueError(f"prompt must be text in UTF-8, got {text!r}")
    if isinstance(prompt, Mapping) and not (all(map(math.isfinite, prompt.values())) and any(prompt.values())):
        raise ValueError(f"a mixture must have finite weights that are not all 0, got {dict(prompt)}")
    if isinstance(prompt, Tensor) and not prompt.isfinite().all():
        raise ValueError("an embedding must be finite, got NaN or infinity")
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    if rerank_from is not None and rerank_from < num_images:
        raise ValueError(f"rerank_from must be at least num_images ({num_images}), got {rerank_from}")
