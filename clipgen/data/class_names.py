"""Names of classes, from lists and from the files in which ImageNet and CUB-200-2011 distribute them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipgen.storage.files import check_size, parse_json, read_text

MAX_NAMES_BYTES = 16 << 20
NAME_LISTS = ("imagenet", "imagenet-torchvision")
SYNSET_LINE = re.compile(r"(n\d{8})\s+(\S.*)")  # ImageNet's LOC_synset_mapping.txt: n01440764 tench, Tinca tinca
CUB_LINE = re.compile(r"(\d+) \d{3}\.(\S+)")  # CUB's classes.txt: 1 001.Black_footed_Albatross


def name_list(name: str) -> list[str]:
    """Return a list of ``NAME_LISTS``: the 1000 class names of ILSVRC-2012, in the order of their synsets.

    ``"imagenet"`` has the wording of CLIP's authors, ``"imagenet-torchvision"`` that of torchvision's weights.
    """
    if name == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def read_names(path: str | Path) -> list[str]:
    """Read the names of classes from a file, in the order of the classes.

    Args:
        path: a JSON list, one name per line, ImageNet's ``LOC_synset_mapping.txt`` or Keras's
            ``imagenet_class_index.json``, or ``classes.txt`` of CUB-200-2011.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file contains none of them.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"class names must be in a file, got {path}")
    check_size(path, MAX_NAMES_BYTES)
    text = read_text(path)
    try:
        names = parse_published_names(text)
        if names is None:
            names = parse_json(text) if path.suffix == ".json" else non_empty_lines(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must contain a list of class names: {error}") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"{path} must contain a list of class names, got {text[:60]!r}")
    return names


def parse_published_names(text: str) -> list[str] | None:
    """Parse the files of ImageNet, Keras and CUB-200-2011; None if a text is none of them.

    Raises:
        ValueError: the text is one of them, but damaged.
    """
    if text.lstrip().startswith("{"):
        return parse_keras(parse_json(text))
    lines = non_empty_lines(text)
    if lines and SYNSET_LINE.fullmatch(lines[0]):
        return parse_synsets(lines)
    if lines and CUB_LINE.fullmatch(lines[0]):
        return parse_cub_classes(lines)
    return None


def non_empty_lines(text: str) -> list[str]:
    """Return the lines of a text that are not empty, without white space around them."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def parse_synsets(lines: Sequence[str]) -> list[str]:
    """Return the first name of each synset, in the order of the synsets, which is that of torchvision's classes."""
    names: dict[str, str] = {}
    for line in lines:
        match = SYNSET_LINE.fullmatch(line)
        if not match:
            raise ValueError(f"each line must be a synset and its names, got {line!r:.80}")
        if match[1] in names:
            raise ValueError(f"each synset must occur once, got {match[1]} twice")
        names[match[1]] = match[2].split(",")[0].strip()
    return [names[synset] for synset in sorted(names)]


def parse_cub_classes(lines: Sequence[str]) -> list[str]:
    """Return the names of CUB's classes, which are numbered from 1."""
    names = []
    for number, line in enumerate(lines, start=1):
        match = CUB_LINE.fullmatch(line)
        if not match or int(match[1]) != number:
            raise ValueError(f"line {number} must be '{number} {number:03d}.NAME', got {line!r:.80}")
        names.append(match[2].replace("_", " "))
    return names


def parse_keras(content: Any) -> list[str] | None:
    """Return the names of ``{"0": ["n01440764", "tench"], ...}``, as they are; None for another mapping."""
    entries = list(content.values())
    if not entries or not all(isinstance(entry, list) and len(entry) == 2 for entry in entries):
        return None
    names = []
    for number in range(len(entries)):
        if str(number) not in content:
            raise ValueError(f"classes must be numbered from 0, got none with number {number}")
        name = content[str(number)][1]
        if not isinstance(name, str):
            raise ValueError(f"each class must be a pair of synset and name, got {name!r:.40}")
        names.append(name)
    return names
