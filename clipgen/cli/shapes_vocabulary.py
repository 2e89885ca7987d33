"""What the bundled model knows: it draws coloured shapes of 32 x 32 pixels, whatever it is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

from clipgen.data.shapes import ALL_ATTRIBUTES, BACKGROUNDS, COLORS, RADII, SHAPES

FILLERS = {"a", "on", "background", "and", "an", "the"}
WORDS = {*FILLERS, *RADII, *COLORS, *SHAPES, *BACKGROUNDS}
KNOWN = (
    f"This model draws images of 32 x 32 pixels of sentences such as {str(ALL_ATTRIBUTES[0])!r}. It has seen the sizes "
    f"{', '.join(RADII)}; the colors {', '.join(COLORS)}; the shapes {', '.join(SHAPES)}; and the backgrounds "
    f"{', '.join(BACKGROUNDS)}; nothing else."
)


def unfamiliar(sentence: str) -> str:
    """Return what in a sentence the model has never seen, in words; "" if there is nothing."""
    words = re.findall(r"\w+", sentence.lower())
    if unknown := [word for word in words if word not in WORDS]:
        return f"does not know {', '.join(map(repr, dict.fromkeys(unknown)))}"
    grounds = [before for before, word in pairwise(words) if word == "background"]
    if unseen := [ground for ground in grounds if ground in COLORS]:
        return f"has never seen a {unseen[0]} background"
    for name, kind in (("shape", SHAPES), ("color", COLORS), ("size", RADII)):
        if len({word for word in words if word in kind}) > 1:
            return f"has never seen more than one {name} in an image"
    return ""


def remarks(sentences: Iterable[str], photographs: Iterable[str]) -> list[str]:
    """Return a line for each request that is beyond the model, and what it knows if there are any.

    Args:
        sentences: prompts. photographs: names of images that are not of the model's own kind.
    """
    lines = [f"The model {reason}: {text!r}" for text in sentences if (reason := unfamiliar(text))]
    lines += [f"The model has never seen a photograph: {name}" for name in photographs]
    return [*lines, KNOWN] if lines else []
