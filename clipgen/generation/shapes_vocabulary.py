"""The prompts that the bundled model was trained for: colored shapes of 32 x 32 pixels."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

from clipgen.data.shapes import ALL_ATTRIBUTES, BACKGROUNDS, COLORS, RADII, SHAPES

FILLERS = {"a", "on", "background", "and", "an", "the"}
WORDS = {*FILLERS, *RADII, *COLORS, *SHAPES, *BACKGROUNDS}
ATTRIBUTES = {"shape": SHAPES, "color": COLORS, "size": RADII}
KNOWN = (
    f"This model generates images of 32 x 32 pixels from texts such as {str(ALL_ATTRIBUTES[0])!r}. It has seen the "
    f"sizes {', '.join(RADII)}; the colors {', '.join(COLORS)}; the shapes {', '.join(SHAPES)}; and the backgrounds "
    f"{', '.join(BACKGROUNDS)}; nothing else."
)


def unfamiliar(text: str) -> str:
    """Return what the model has never seen of a text, in words; "" if it knows all of it."""
    words = re.findall(r"\w+", text.lower())
    unknown = [repr(word) for word in dict.fromkeys(words) if word not in WORDS]
    if unknown:
        return f"does not know {', '.join(unknown)}"
    for word, following in pairwise(words):
        if following == "background" and word in COLORS:
            return f"has never seen a {word} background"
    for attribute, values in ATTRIBUTES.items():
        if len({word for word in words if word in values}) > 1:
            return f"has never seen more than one {attribute} in an image"
    return ""


def remarks(texts: Iterable[str], photographs: Iterable[str]) -> list[str]:
    """Return one line per prompt that the model was not trained for, and a line on what it knows if there are any.

    Args:
        texts: text prompts.
        photographs: names of image prompts that are not shapes.
    """
    lines = []
    for text in texts:
        reason = unfamiliar(text)
        if reason:
            lines.append(f"The model {reason}: {text!r}")
    for name in photographs:
        lines.append(f"The model has never seen a photograph: {name}")
    return [*lines, KNOWN] if lines else []
