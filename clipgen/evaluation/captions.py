"""The sentences of an evaluation: which pictures are asked for, or what the pictures of a folder should show."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clipgen.data.decoding import UnusableImageError, png_text
from clipgen.data.shapes import ALL_ATTRIBUTES
from clipgen.files import natural_key, read_text

logger = logging.getLogger(__name__)
LONGEST = 1 << 20  # bytes of a text file beside a picture
Caption = tuple[str | None, str]  # of which file, where that is known; and the sentence


def read_captions(source: str | Path) -> list[Caption]:
    """Read sentences.

    Args:
        source: ``"shapes"``, all 288 of the embedded data; a text file, a sentence a line, or a file name, a tab and a
            sentence; JSON: a list of sentences, ``{"file": "sentence"}``, or COCO's captions.

    Raises:
        FileNotFoundError, ValueError: no such file, or nothing in it.
    """
    if source == "shapes":
        return [(None, str(attributes)) for attributes in ALL_ATTRIBUTES]
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"captions must be 'shapes' or an existing file, got {path}")
    text = read_text(path)
    try:
        found = from_json(json.loads(text)) if path.suffix.lower() == ".json" else from_lines(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"captions cannot be read from {path}: {error}") from error
    if not found or not all(caption.strip() for _, caption in found):
        raise ValueError(f"captions must be sentences, got {'an empty one' if found else 'none'} in {path}")
    return found


def from_lines(text: str) -> list[Caption]:
    """A sentence a line, each with a file name and a tab before it or all without."""
    rows = [line.partition("\t") for line in text.split("\n") if line.strip()]
    if len({tab for _, tab, _ in rows}) > 1:
        raise ValueError("a file name and a tab must stand before every sentence, or before none")
    return [(name.strip(), caption.strip()) if tab else (None, name.strip()) for name, tab, caption in rows]


def from_json(content: Any) -> list[Caption]:
    """A list, a mapping, or COCO's layout."""
    if isinstance(content, list):
        found: list[tuple[str | None, Any]] = [(None, caption) for caption in content]
    elif not isinstance(content, dict):
        raise ValueError(f"it must hold a list, a mapping or COCO's layout, got {content!r:.60}")
    elif "annotations" in content:
        files = {image["id"]: image["file_name"] for image in content["images"]}
        found = [(files[row["image_id"]], row["caption"]) for row in content["annotations"]]
    else:
        found = list(content.items())
    if other := [caption for _, caption in found if not isinstance(caption, str)]:
        raise ValueError(f"each sentence must be a text, got {other[0]!r:.60}")
    return found


def choose(captions: Sequence[str], count: int, seed: int) -> list[str]:
    """``count`` sentences: all in turn where there are fewer, else a random part, in the order of the file."""
    if count >= len(captions):
        return [captions[i % len(captions)] for i in range(count)]
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed))[:count]
    return [captions[i] for i in order.sort().values.tolist()]


def captions_of(root: Path, files: Sequence[str], captions: Sequence[Caption] | None) -> list[str]:
    """Return the sentence of each picture of a folder.

    Args:
        captions: sentences by file name, else one for each picture, in the order in which people number files (2.png
            before 10.png). None: what the pictures themselves hold (``clipgen-sample`` writes it into them), or text
            files of the same name beside them.

    Raises:
        ValueError: a picture has no sentence, or there are more or fewer sentences than pictures.
    """
    if captions is None:
        return [own_caption(root / file) for file in files]
    if any(name is None for name, _ in captions):
        return captions_by_line(root, files, [caption for _, caption in captions])
    first = {str(name): caption for name, caption in reversed(captions)}
    if missing := [file for file in files if file not in first]:
        raise ValueError(f"captions must name every picture of {root}, got none for {missing[0]}")
    return [first[file] for file in files]


def captions_by_line(root: Path, files: Sequence[str], captions: Sequence[str]) -> list[str]:
    """Return the sentence of each picture, where sentences stand in the natural order of the pictures' names."""
    if len(captions) != len(files):
        raise ValueError(f"captions must be one a picture, got {len(captions)} for {len(files)} pictures in {root}")
    ordered = sorted(files, key=natural_key)
    if ordered != sorted(files):
        place = next(i for i, (file, other) in enumerate(zip(ordered, sorted(files))) if file != other)
        logger.warning(
            "captions by line meet the pictures of %s as people number them: line %d is of %s (by letters: %s); "
            "a file name and a tab before each sentence settle it",
            root,
            place + 1,
            ordered[place],
            sorted(files)[place],
        )
    of_file = dict(zip(ordered, captions))
    return [of_file[file] for file in files]


def own_caption(path: Path) -> str:
    """Return what a picture, or a text file beside it, says that it shows."""
    beside = path.with_suffix(".txt")
    if beside.is_file():
        if (size := beside.stat().st_size) > LONGEST:
            raise ValueError(f"{beside} must be a sentence, got {size} bytes")
        prompt = read_text(beside).strip()
    else:
        try:
            prompt = png_text(path).get("prompt", "")
        except UnusableImageError as error:
            raise ValueError(f"{path} cannot be used as an image: {error}") from error
    if not prompt:
        raise ValueError(f"captions are needed: {path} holds none, and no {beside.name} beside it does")
    return str(prompt)
