"""What clipgen-sample wrote into a picture, read with the suspicion that a stranger's file deserves."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipgen.cli.sampling_args import DTYPES, SETTINGS
from clipgen.data.decoding import UnusableImageError, png_text
from clipgen.files import printable

MAX_STEPS = 1000
MAX_PROMPT = 10_000
MAX_TERMS = 100
MAX_JSON = 1 << 18


@dataclass
class Metadata:
    """What made a picture.

    Args:
        seed: of its draw.
        settings: temperature, top_k, ...
        dtype: of the networks.
        prompt: sentence, or what stands for another prompt; None in a strip between two prompts.
        mixture: sentences with their weights.
        ends: the two prompts of a strip.
        steps: pictures of a strip, else 1.
        complete: whether it completes another picture.
        model: fingerprint of what drew it.
    """

    seed: int
    settings: dict[str, Any]
    dtype: str
    prompt: str | None
    mixture: dict[str, float] | None
    ends: list[Any] | None
    steps: int
    complete: bool
    model: str | None


def read_metadata(path: Path) -> Metadata:
    """Read what made a picture of ``clipgen-sample``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a picture of this command, or a value in it is not what the command writes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no picture {path}")
    try:
        text = png_text(path)
    except UnusableImageError as error:
        raise ValueError(f"{path} is no picture of clipgen-sample: {error}") from error
    try:
        return _parse(text)
    except KeyError as error:
        detail = f"it does not tell its settings ({printable(str(error.args[0]))} is missing)"
        raise ValueError(f"{path} is no picture of clipgen-sample: {detail}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no picture of clipgen-sample: {error}") from error


def _parse(text: dict[str, str]) -> Metadata:
    settings = {name: _number(text, name, kind) for name, (kind, _, _) in SETTINGS.items()}
    ends = _ends(text) if "interpolate" in text else None
    dtype = text.get("dtype", DTYPES[0])
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {_shown(dtype)}")
    return Metadata(
        seed=_number(text, "seed", int),
        settings=settings,
        dtype=dtype,
        prompt=None if ends else _sentence("prompt", text["prompt"]),
        mixture=_mixture("mixture", _json(text, "mixture")) if "mixture" in text else None,
        ends=ends,
        steps=_steps(text) if ends else 1,
        complete="complete" in text,
        model=text.get("model"),
    )


def _json(text: dict[str, str], name: str) -> Any:
    """Parse the JSON of a text chunk."""
    content = text[name]
    if len(content) > MAX_JSON:
        raise ValueError(f"{name} must have at most {MAX_JSON} letters, got {len(content)}")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be JSON, got {_shown(content)}") from error


def _number(text: dict[str, str], name: str, kind: type) -> Any:
    value = _json(text, name)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is int and not whole:
        raise ValueError(f"{name} must be a whole number, got {_shown(value)}")
    if not whole and not isinstance(value, float):
        raise ValueError(f"{name} must be a number, got {_shown(value)}")
    if abs(value) >= 2**63 or not math.isfinite(value):
        raise ValueError(f"{name} must be finite and below 2**63, got {_shown(value)}")
    return value


def _steps(text: dict[str, str]) -> int:
    steps: int = _number(text, "steps", int)
    if not 2 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be in [2, {MAX_STEPS}], got {steps}")
    return steps


def _sentence(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {_shown(value)}")
    if len(value) > MAX_PROMPT:
        raise ValueError(f"{name} must have at most {MAX_PROMPT} letters, got {len(value)}")
    return value


def _mixture(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or not 1 <= len(value) <= MAX_TERMS:
        raise ValueError(f"{name} must be 1 to {MAX_TERMS} sentences with weights, got {_shown(value)}")
    for sentence, weight in value.items():
        _sentence(name, sentence)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) < 1e30:
            raise ValueError(f"{name} must have numbers for weights, got {_shown(weight)}")
    return value


def _ends(text: dict[str, str]) -> list[Any]:
    value = _json(text, "interpolate")
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"interpolate must be two prompts, got {_shown(value)}")
    return [_mixture("interpolate", v) if isinstance(v, dict) else _sentence("interpolate", v) for v in value]


def _shown(value: Any) -> str:
    """Return the beginning of a value; a nested one is not written out."""
    return f"a {type(value).__name__}" if isinstance(value, (list, dict)) else printable(f"{value!r:.60}")
