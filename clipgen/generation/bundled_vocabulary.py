"""The prompts that the bundled models were trained for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

from clipgen.data.shapes import ALL_ATTRIBUTES, BACKGROUNDS, COLORS, RADII, SHAPES

FILLERS = {"a", "on", "background", "and", "an", "the"}
SHAPES_WORDS = {*FILLERS, *RADII, *COLORS, *SHAPES, *BACKGROUNDS}
ATTRIBUTES = {"shape": SHAPES, "color": COLORS, "size": RADII}
# The classes of CIFAR-10.
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DESCRIPTIONS = {
    "shapes": (
        f"This model generates images of 32 x 32 pixels from texts such as {str(ALL_ATTRIBUTES[0])!r}. It has seen the "
        f"sizes {', '.join(RADII)}; the colors {', '.join(COLORS)}; the shapes {', '.join(SHAPES)}; and the "
        f"backgrounds {', '.join(BACKGROUNDS)}; nothing else."
    ),
    "cifar10": (
        "This model generates images of 32 x 32 pixels from texts such as 'a photo of a horse'. It has seen the "
        f"classes {', '.join(CLASSES)}; nothing else."
    ),
}


def prompt_warnings(model: str, texts: Iterable[str], photographs: Iterable[str]) -> list[str]:
    """Return one line per prompt that a bundled model was not trained for, followed by a description of the model.

    Args:
        model: name of the bundled model; there are no warnings for other models.
        texts: text prompts.
        photographs: names of image prompts that are not shapes.
    """
    if model not in DESCRIPTIONS:
        return []
    unfamiliar = unfamiliar_shape if model == "shapes" else unfamiliar_class
    lines = [f"The model {reason}: {text!r}" for text in texts if (reason := unfamiliar(text))]
    if model == "shapes":
        lines += [f"The model has never seen a photograph: {name}" for name in photographs]
    return [*lines, DESCRIPTIONS[model]] if lines else []


def unfamiliar_shape(text: str) -> str:
    """Return the part of a text that the shapes model has never seen, in words; "" if it knows all of it."""
    words = text_words(text)
    if unknown := unknown_words(words, SHAPES_WORDS):
        return unknown
    for word, following in pairwise(words):
        if following == "background" and word in COLORS:
            return f"has never seen a {word} background"
    for attribute, values in ATTRIBUTES.items():
        if len({word for word in words if word in values}) > 1:
            return f"has never seen more than one {attribute} in an image"
    return ""


def unfamiliar_class(text: str) -> str:
    """Return the part of a text that the CIFAR-10 model has never seen, in words; "" if it knows all of it."""
    words = text_words(text)
    if unknown := unknown_words(words, {"a", "an", "the", "photo", "of", "and", *CLASSES}):
        return unknown
    return "has never seen two classes in an image" if len({*words} & {*CLASSES}) > 1 else ""


def text_words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"\w+", text.lower())


def unknown_words(words: list[str], known: set[str]) -> str:
    """Return the unknown words, in a sentence; "" if there are none."""
    unknown = [repr(word) for word in dict.fromkeys(words) if word not in known]
    return f"does not know {', '.join(unknown)}" if unknown else ""
