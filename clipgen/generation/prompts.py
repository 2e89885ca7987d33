"""Prompts: texts, images, mixtures of texts, and CLIP embeddings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from clipgen.sampling_params import check_num_images
from clipgen.storage.files import decode_text

Prompt = str | Mapping[str, float] | Image.Image | Tensor

# What ``describe`` returns for prompts that have no text.
IMAGE_PROMPT = "an image"
EMBEDDING_PROMPT = "an embedding"
# Pattern of the weight of a text in a mixture, and of a word that may be meant as one, such as "0,7" or "70%".
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
LIKE_A_NUMBER = r"[+-]?\d*[.,/]?\d+[\d.,/]*(?:[eE][+-]?\d+)?[%:*]?"
# What ``prompt_kind`` returns, and images record as ``prompt_kind``.
PROMPT_KINDS = ("text", "mixture", "image", "embedding")
# Bytes of a file of prompts.
MAX_FILE_BYTES = 16 << 20


def describe(prompt: Prompt) -> str:
    """Return a prompt in words, for file names and metadata."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        terms = []
        for text, weight in prompt.items():
            sign = "-" if weight < 0 else "+"
            terms.append(f"{sign} {abs(weight):g} {text}")
        return " ".join(terms).removeprefix("+ ")
    return IMAGE_PROMPT if isinstance(prompt, Image.Image) else EMBEDDING_PROMPT


def texts_of(prompt: Prompt) -> list[str]:
    """Return the text of a prompt, or all texts of a mixture; an image has no texts."""
    if isinstance(prompt, str):
        return [prompt]
    return list(prompt) if isinstance(prompt, Mapping) else []


def prompt_kind(prompt: Prompt) -> str:
    """Return the kind of a prompt, one of ``PROMPT_KINDS``."""
    if isinstance(prompt, str):
        return "text"
    if isinstance(prompt, Mapping):
        return "mixture"
    return "image" if isinstance(prompt, Image.Image) else "embedding"


def recorded_kind(prompt: Any, kind: str | None) -> str:
    """Return the kind of a prompt that an image records; images of older versions record only its description.

    Args:
        prompt: text or description, or a mixture.
        kind: recorded kind; None if there is none.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind is None:
        kind = {IMAGE_PROMPT: "image", EMBEDDING_PROMPT: "embedding"}.get(prompt) if isinstance(prompt, str) else None
        return kind or prompt_kind(prompt)
    if kind not in PROMPT_KINDS:
        raise ValueError(f"prompt_kind must be one of {', '.join(PROMPT_KINDS)}, got {kind!r:.60}")
    return kind


def parse_mixture(text: str) -> dict[str, float]:
    """Parse ``"0.7 a cat + 0.3 a dog"`` as ``{"a cat": 0.7, "a dog": 0.3}``; the default weight is 1.

    Raises:
        ValueError: a term is empty, or its weight is not a number.
    """
    # Texts and the signs between them alternate: ["0.7 a cat", "+", "0.3 a dog"].
    tokens = re.split(r"(?:^|\s)([+-])(?:\s|$)", text.strip())
    starts_with_sign = len(tokens) > 1 and not tokens[0]
    tokens = tokens[1:] if starts_with_sign else ["+", *tokens]
    mixture: dict[str, float] = {}
    for sign, term in zip(tokens[::2], tokens[1::2]):
        weight, words = parse_term(term.strip())
        if not words:
            raise ValueError(f'a mixture must be terms such as "0.7 a cat + 0.3 a dog", got {text!r}')
        mixture[words] = mixture.get(words, 0.0) + (weight if sign == "+" else -weight)
    return mixture


def parse_term(term: str) -> tuple[float, str]:
    """Parse ``"0.7 a cat"`` as ``(0.7, "a cat")``; the default weight is 1.

    Raises:
        ValueError: the term begins like a number that is not one, as in ``"0,7 a cat"``.
    """
    match = re.fullmatch(rf"({NUMBER})\s+(.*)", term)
    if match:
        return float(match[1]), match[2]
    if re.match(rf"{LIKE_A_NUMBER}(\s|$)", term):
        raise ValueError(
            f'a term of a mixture must be a number with a decimal point and a text, as in "0.7 a cat", got {term!r}: '
            "put a weight before the text if the text itself begins with digits"
        )
    return 1.0, term


def read_prompts(path: Path) -> list[str]:
    """Read a file with one prompt per line; empty lines are skipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is too large, or is not text.
    """
    with path.open("rb") as file:
        # A pipe of the shell is allowed, a device without an end is not.
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{path} must contain at most {MAX_FILE_BYTES} bytes of prompts")
    lines = [line.strip() for line in decode_text(content, path).splitlines()]
    return [line for line in lines if line]


def check_request(prompt: Prompt, num_images: int, rerank_from: int | None) -> None:
    """Check a prompt, and the number of images to generate for it.

    Raises:
        TypeError: the prompt is not a text, mixture, image or embedding.
        ValueError: the prompt is empty or not finite, or a number is out of range.
    """
    check_prompt(prompt)
    check_num_images(num_images, rerank_from)


def check_prompt(prompt: Prompt) -> None:
    """Raise TypeError or ValueError if a prompt cannot be embedded."""
    if isinstance(prompt, str):
        check_text(prompt)
    elif isinstance(prompt, Mapping):
        check_mixture(prompt)
    elif isinstance(prompt, Tensor):
        if not prompt.isfinite().all():
            raise ValueError("an embedding must be finite, got NaN or infinity")
    elif not isinstance(prompt, Image.Image):
        raise TypeError(f"prompt must be a text, a mixture, an image or an embedding, got {prompt!r}")


def check_text(text: str) -> None:
    """Raise ValueError if a text is empty or cannot be encoded."""
    if not text.strip():
        raise ValueError(f"prompt must not be empty, got {text!r}")
    # Python decodes bytes of the command line that are not UTF-8 to lone surrogates.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"prompt must be text in UTF-8, got {text!r}")


def check_mixture(mixture: Mapping[str, float]) -> None:
    """Raise ValueError if a mixture has an empty text, or weights that are not finite or all 0."""
    if not mixture:
        raise ValueError("prompt must not be empty, got {}")
    for text in mixture:
        check_text(text)
    weights = mixture.values()
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise ValueError(f"a mixture must have finite weights that are not all 0, got {dict(mixture)}")
