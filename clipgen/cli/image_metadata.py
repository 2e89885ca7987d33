"""Read the metadata that ``clipgen-sample`` writes to PNG files, which are untrusted: every value is checked."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgen.data.decoding import UnusableImageError, png_text
from clipgen.generation.sampling_options import DTYPES, SAMPLING_OPTIONS
from clipgen.storage.files import printable

if TYPE_CHECKING:
    from clipgen.sampling_params import SamplingParams

# Limits on what a file may ask for.
MAX_STEPS = 1000
MAX_PROMPT_LENGTH = 10_000
MAX_MIX_TERMS = 100
MAX_JSON_LENGTH = 1 << 18
MAX_MIX_WEIGHT = 1e30


@dataclass
class ImageMetadata:
    """Settings that generated an image.

    Args:
        seed: seed of the image.
        params: sampling parameters.
        dtype: dtype of the transformer and the decoder.
        prompt: text, or description of another prompt; None for a strip of an interpolation.
        prompt_mix: texts and their weights; None for other prompts.
        ends: the two prompts of an interpolation; None for other images.
        kinds: kind of the prompt or of both ends, of ``PROMPT_KINDS``.
        steps: number of images of a strip, else 1.
        keep_fraction: fraction of another image that was kept; None unless the image completes another one.
        model: fingerprint of the model.
    """

    seed: int
    params: SamplingParams
    dtype: str
    prompt: str | None
    prompt_mix: dict[str, float] | None
    ends: list[Any] | None
    kinds: list[str]
    steps: int
    keep_fraction: float | None
    model: str | None


def read_metadata(path: Path) -> ImageMetadata:
    """Read the metadata of an image.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it was not written by ``clipgen-sample``, or contains a value that the command does not write.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no image {path}")
    try:
        return parse_metadata(png_text(path))
    except KeyError as error:
        reason = f"{printable(str(error.args[0]))} is missing in its metadata"
        raise ValueError(f"{path} is not an image of clipgen-sample: {reason}") from error
    except (UnusableImageError, ValueError) as error:
        raise ValueError(f"{path} is not an image of clipgen-sample: {error}") from error


def parse_metadata(text: dict[str, str]) -> ImageMetadata:
    """Parse and check the text chunks of a PNG file.

    Raises:
        KeyError: an entry is missing.
        ValueError: an entry is not what ``clipgen-sample`` writes.
    """
    from clipgen.sampling_params import SamplingParams

    sampling = {name: parse_number(text, name, option.type) for name, option in SAMPLING_OPTIONS.items()}
    ends = parse_ends(text) if "interpolate" in text else None
    prompt_mix = parse_mix("prompt_mix", parse_entry(text, "prompt_mix")) if "prompt_mix" in text else None
    return ImageMetadata(
        seed=parse_number(text, "seed", int),
        params=SamplingParams(**sampling),
        dtype=parse_dtype(text),
        prompt=None if ends else parse_prompt("prompt", text["prompt"]),
        prompt_mix=prompt_mix,
        ends=ends,
        kinds=parse_kinds(text, ends or [prompt_mix or text["prompt"]]),
        steps=parse_steps(text) if ends else 1,
        keep_fraction=parse_keep_fraction(text),
        model=text.get("model"),
    )


def parse_entry(text: dict[str, str], name: str) -> Any:
    """Parse an entry as JSON.

    Raises:
        KeyError: the entry is missing.
        ValueError: it is not JSON, or is too long.
    """
    content = text[name]
    if len(content) > MAX_JSON_LENGTH:
        raise ValueError(f"{name} must have at most {MAX_JSON_LENGTH} letters, got {len(content)}")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be JSON, got {abbreviate(content)}") from error


def parse_number(text: dict[str, str], name: str, number_type: type) -> Any:
    """Parse an entry as a finite number; ``int`` allows whole numbers only.

    Raises:
        KeyError: the entry is missing.
        ValueError: it is not such a number.
    """
    value = parse_entry(text, name)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if number_type is int and not is_whole:
        raise ValueError(f"{name} must be a whole number, got {abbreviate(value)}")
    if not is_whole and not isinstance(value, float):
        raise ValueError(f"{name} must be a number, got {abbreviate(value)}")
    if abs(value) >= 2**63 or not math.isfinite(value):
        raise ValueError(f"{name} must be finite and below 2**63, got {abbreviate(value)}")
    return value


def parse_dtype(text: dict[str, str]) -> str:
    """Return the dtype, which is written only if it is not the default.

    Raises:
        ValueError: it is not one of ``DTYPES``.
    """
    dtype = text.get("dtype", DTYPES[0])
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {abbreviate(dtype)}")
    return dtype


def parse_steps(text: dict[str, str]) -> int:
    """Return the number of images of a strip, in [2, ``MAX_STEPS``].

    Raises:
        KeyError: the entry is missing.
        ValueError: the number is out of range.
    """
    steps: int = parse_number(text, "steps", int)
    if not 2 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be in [2, {MAX_STEPS}], got {steps}")
    return steps


def parse_keep_fraction(text: dict[str, str]) -> float | None:
    """Return the fraction of another image that was kept, in (0, 1); None unless the image completes another one.

    Raises:
        ValueError: the fraction is out of range.
    """
    if "keep_fraction" not in text:
        return None
    fraction: float = parse_number(text, "keep_fraction", float)
    if not 0 < fraction < 1:
        raise ValueError(f"keep_fraction must be in (0, 1), got {fraction}")
    return fraction


def parse_ends(text: dict[str, str]) -> list[Any]:
    """Return the two prompts of an interpolation: texts or mixtures.

    Raises:
        ValueError: the entry is not a pair of prompts.
    """
    value = parse_entry(text, "interpolate")
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"interpolate must be two prompts, got {abbreviate(value)}")
    ends: list[Any] = []
    for end in value:
        parse = parse_mix if isinstance(end, dict) else parse_prompt
        ends.append(parse("interpolate", end))
    return ends


def parse_kinds(text: dict[str, str], prompts: list[Any]) -> list[str]:
    """Return the kind of the prompt, or the kinds of the two ends of an interpolation."""
    from clipgen.generation.prompts import recorded_kind

    kinds: Any = [text.get("prompt_kind")]
    if "interpolate" in text:
        kinds = parse_entry(text, "prompt_kind") if "prompt_kind" in text else [None, None]
        if not isinstance(kinds, list) or len(kinds) != 2:
            raise ValueError(f"prompt_kind must be two kinds, got {abbreviate(kinds)}")
    return [recorded_kind(prompt, kind) for prompt, kind in zip(prompts, kinds, strict=True)]


def parse_prompt(name: str, value: Any) -> str:
    """Return a prompt, which must be a text of at most ``MAX_PROMPT_LENGTH`` characters.

    Raises:
        ValueError: it is not such a text.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {abbreviate(value)}")
    if len(value) > MAX_PROMPT_LENGTH:
        raise ValueError(f"{name} must have at most {MAX_PROMPT_LENGTH} letters, got {len(value)}")
    return value


def parse_mix(name: str, value: Any) -> dict[str, float]:
    """Return a mixture, which must consist of at most ``MAX_MIX_TERMS`` texts with finite weights.

    Raises:
        ValueError: it is not such a mixture.
    """
    if not isinstance(value, dict) or not 1 <= len(value) <= MAX_MIX_TERMS:
        raise ValueError(f"{name} must be 1 to {MAX_MIX_TERMS} texts with weights, got {abbreviate(value)}")
    for text, weight in value.items():
        parse_prompt(name, text)
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not abs(weight) < MAX_MIX_WEIGHT:
            raise ValueError(f"{name} must have numbers for weights, got {abbreviate(weight)}")
    return value


def abbreviate(value: Any) -> str:
    """Return the beginning of a value for an error message; only the type of a list or mapping."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__}"
    return printable(f"{value!r:.60}")
