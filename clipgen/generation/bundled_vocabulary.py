"""The prompts that the bundled models were trained for, and examples of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from clipgen.data.shapes import ALL_ATTRIBUTES, BACKGROUNDS, COLORS, RADII, SHAPES

if TYPE_CHECKING:
    from clipgen.generation.prompts import Prompt

FILLERS = {"a", "on", "background", "and", "an", "the"}
SHAPES_WORDS = {*FILLERS, *RADII, *COLORS, *SHAPES, *BACKGROUNDS}
# Images of another size are taken for photographs.
SHAPES_SIZE = (32, 32)
ATTRIBUTES = {"shape": SHAPES, "color": COLORS, "size": RADII, "background": BACKGROUNDS}
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


class Examples(NamedTuple):
    """Prompts that show what a model can generate.

    Args:
        prompts: texts.
        mixture: three texts with the weights of their sum; an empty text is left out.
        ends: two texts, between which an interpolation leads.
    """

    prompts: tuple[str, ...]
    mixture: tuple[tuple[str, float], ...]
    ends: tuple[str, str]


# By the name of the bundled model, which is also that of its CLIP; "" for models of photographs of anything.
EXAMPLES = {
    "shapes": Examples(
        prompts=(
            "a large blue ring on a white background",
            "a small red star on a black background",
            "a large green triangle on a gray background",
            "a large yellow circle on a black background",
        ),
        mixture=(
            ("a large blue ring on a white background", 1.0),
            ("a blue circle", -1.0),
            ("a red circle", 1.0),
        ),
        ends=("a large red star on a white background", "a small blue ring on a white background"),
    ),
    "cifar10": Examples(
        prompts=tuple(f"a photo of {name}" for name in ("a horse", "a ship", "an airplane", "a frog")),
        mixture=(("a photo of a dog", 0.5), ("a photo of a horse", 0.5), ("", 1.0)),
        ends=("a photo of an automobile", "a photo of a ship"),
    ),
    "": Examples(
        prompts=(
            "A city bus driving on the city street",
            "A woman is skiing on a white mountain",
            "three plush bears",
            "A train being operated on a train track",
        ),
        mixture=(("a photo of a dog", 0.5), ("a photo of a horse", 0.5), ("", 1.0)),
        ends=("A city bus driving on the city street", "A train being operated on a train track"),
    ),
}


def prompt_warnings(model: str, prompts: Iterable[tuple[str, Prompt]]) -> list[str]:
    """Return one line per prompt that a bundled model was not trained for, followed by a description of the model.

    Args:
        model: name of the bundled model; there are no warnings for other models.
        prompts: names of prompts, and the prompts.
    """
    # The prompts import torch, which the examples need not wait for.
    from clipgen.generation.prompts import texts_of

    if model not in DESCRIPTIONS:
        return []
    unfamiliar = unfamiliar_shape if model == "shapes" else unfamiliar_class
    lines = []
    for name, prompt in prompts:
        lines += [f"The model {reason}: {text!r}" for text in texts_of(prompt) if (reason := unfamiliar(text))]
        if model == "shapes" and isinstance(prompt, Image.Image) and prompt.size != SHAPES_SIZE:
            lines.append(f"The model has never seen a photograph: {name}")
    return [*lines, DESCRIPTIONS[model]] if lines else []


def unfamiliar_shape(text: str) -> str:
    """Return the part of a text that the shapes model has never seen, in words; "" if it knows all of it."""
    words = text_words(text)
    if unknown := unknown_words(words, SHAPES_WORDS):
        return unknown
    for word, following in pairwise([*words, ""]):
        if following == "background" and word in COLORS:
            return f"has never seen a {word} background"
        if following != "background" and word in BACKGROUNDS:
            return f"knows {word!r} only before 'background'"
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
