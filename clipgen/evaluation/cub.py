"""Captions of CUB-200-2011 (Wah et al. 2011) as they are distributed (Reed et al. 2016, arXiv:1605.05395).

The captions are a folder with one text file per image, ten captions in ten lines: ``text_c10/001.Black_footed_Albatross
/Black_Footed_Albatross_0046_18.txt``. ``images.txt`` (number and path) and ``train_test_split.txt`` (number, and 1 for
training) come with the images.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from clipgen.storage.files import check_size, natural_key, read_text

logger = logging.getLogger(__name__)
SPLITS = ("train", "test", "all")
TEXT_FOLDERS = ("text_c10", "text")
INDEX = "images.txt"
SPLIT_FILE = "train_test_split.txt"
MAX_INDEX_BYTES = 16 << 20
MAX_TEXT_BYTES = 1 << 20  # size of the captions of an image
IMAGE_SUFFIX = ".jpg"


def read_text_folder(folder: Path, split: str | None = None) -> list[tuple[str, str]]:
    """Read a folder of text files, one per image with one caption per line.

    Args:
        folder: the text files, or a folder with them in ``text_c10`` or ``text``. ``images.txt`` and
            ``train_test_split.txt`` are read from it or from the folder above it.
        split: train, test or all. None uses test if there is ``train_test_split.txt``, else all.

    Returns:
        Pairs of image file (as in ``images.txt``) and caption, all captions of an image consecutively.

    Raises:
        ValueError: a file is missing, damaged or too large.
    """
    texts = next((folder / name for name in TEXT_FOLDERS if (folder / name).is_dir()), folder)
    index = find_index(texts, folder, INDEX)
    if index:
        images = select_split(read_index(index), find_index(texts, folder, SPLIT_FILE), split, index)
        require_text_files(texts, images)
    else:
        if split in ("train", "test"):
            raise ValueError(f"split {split} needs {INDEX} and {SPLIT_FILE} in {folder}, got none")
        images = find_texts(texts)
    captions = []
    for image in images:
        for text in read_lines(text_file(texts, image)):
            captions.append((image, text))
    return captions


def find_index(texts: Path, folder: Path, name: str) -> Path | None:
    """Return the path of an index file in the folder, in that of the texts or above it; None if there is none."""
    places = [place / name for place in (folder, texts, texts.resolve().parent)]
    return next((place for place in places if place.is_file()), None)


def find_texts(texts: Path) -> list[str]:
    """Return the images that the text files below a folder describe, in natural order."""
    images = []
    for path in texts.glob("**/*.txt"):
        if path.name not in (INDEX, SPLIT_FILE) and path.is_file():
            images.append(path.relative_to(texts).with_suffix(IMAGE_SUFFIX).as_posix())
    return sorted(images, key=natural_key)


def read_numbered(path: Path) -> dict[str, str]:
    """Read lines of a number and a value, as in ``images.txt``."""
    check_size(path, MAX_INDEX_BYTES)
    values: dict[str, str] = {}
    for line in filter(str.strip, read_text(path).split("\n")):
        number, _, value = line.strip().partition(" ")
        if not (number.isdecimal() and value) or number in values:
            raise ValueError(f"{path} must contain a new number and a value in each line, got {line!r:.80}")
        values[number] = value
    return values


def read_index(path: Path) -> dict[str, str]:
    """Read ``images.txt``: paths by number.

    Raises:
        ValueError: a path leads out of the folder.
    """
    images = read_numbered(path)
    for image in images.values():
        parts = PurePosixPath(image).parts
        if "\\" in image or "\0" in image or image.startswith("/") or ".." in parts or ":" in parts[0]:
            raise ValueError(f"{path} must contain paths below its folder, got {image!r:.80}")
    return images


def select_split(images: dict[str, str], split_file: Path | None, split: str | None, index: Path) -> list[str]:
    """Return the images of a split, in the order of ``images.txt``."""
    if split == "all" or (split is None and split_file is None):
        return list(images.values())
    if split_file is None:
        raise ValueError(f"split {split} needs {SPLIT_FILE} next to {index}, got none")
    flags = read_numbered(split_file)
    for number in images:
        if flags.get(number) not in ("0", "1"):
            raise ValueError(f"{split_file} must contain 0 or 1 for image {number}, got {flags.get(number)!r:.40}")
    if split is None:
        logger.info("The images of the test split of %s are used; --split all uses all", split_file)
    wanted = "1" if split == "train" else "0"
    return [image for number, image in images.items() if flags[number] == wanted]


def text_file(texts: Path, image: str) -> Path:
    """Return the file of an image's captions."""
    return texts / PurePosixPath(image).with_suffix(".txt")


def require_text_files(texts: Path, images: list[str]) -> None:
    """Raise ValueError if images have no text file."""
    missing = [image for image in images if not text_file(texts, image).is_file()]
    if missing:
        raise ValueError(
            f"{texts} must contain a text file per image, got none for {len(missing)} of {len(images)}, such as "
            f"{missing[0]!r:.100}"
        )


def read_lines(path: Path) -> Iterator[str]:
    """Yield the captions of an image."""
    check_size(path, MAX_TEXT_BYTES)
    # The published files contain replacement characters where letters were lost.
    captions = [line.replace("\ufffd", " ").strip() for line in read_text(path).split("\n")]
    if not any(captions):
        raise ValueError(f"{path} must contain captions, got none")
    yield from filter(None, captions)
