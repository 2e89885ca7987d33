"""The captions of an evaluation: what is generated, or what the images of a folder should show."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from itertools import cycle, islice, starmap
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clipgen.data.decoding import UnusableImageError, png_text
from clipgen.data.shapes import ALL_ATTRIBUTES
from clipgen.files import natural_key, read_text

logger = logging.getLogger(__name__)
MAX_SIDECAR_BYTES = 1 << 20  # of a text file beside an image


class Caption(NamedTuple):
    """A caption, and the image file that it describes, if known."""

    file: str | None
    text: str


def read_captions(source: str | Path) -> list[Caption]:
    """Read captions.

    Args:
        source: ``"shapes"`` for all 288 of the built-in data; a text file with one caption per line, or a file name, a
            tab and a caption; JSON: a list of captions, ``{"file": "caption"}``, or COCO's captions.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it does not hold captions.
    """
    if source == "shapes":
        return without_files(map(str, ALL_ATTRIBUTES))
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"captions must be 'shapes' or an existing file, got {path}")
    text = read_text(path)
    try:
        captions = parse_json(json.loads(text)) if path.suffix.lower() == ".json" else parse_lines(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"captions cannot be read from {path}: {error}") from error
    if not captions:
        raise ValueError(f"captions must be texts, got none in {path}")
    for caption in captions:
        if not caption.text.strip():
            raise ValueError(f"captions must be texts, got an empty one in {path}")
    return captions


def read_classes(source: str | Path) -> list[Caption]:
    """Read class names: ``"imagenet"``, or any source of ``read_captions``."""
    if source == "imagenet":
        return without_files(imagenet_class_names())
    return read_captions(source)


def imagenet_class_names() -> list[str]:
    """Return the 1000 class names of ILSVRC-2012 in CLIP's wording, in the order of the classes."""
    from open_clip import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def without_files(texts: Iterable[str]) -> list[Caption]:
    """Return captions of which it is not known what file they describe."""
    return [Caption(None, text) for text in texts]


def parse_lines(text: str) -> list[Caption]:
    """Parse one caption per line, all with a file name and a tab before them or all without."""
    captions = []
    for line in filter(str.strip, text.split("\n")):
        before_tab, tab, after_tab = line.partition("\t")
        if tab:
            captions.append(Caption(before_tab.strip(), after_tab.strip()))
        else:
            captions.append(Caption(None, line.strip()))
    if len({caption.file is None for caption in captions}) > 1:
        raise ValueError("a file name and a tab must stand before every caption, or before none")
    return captions


def parse_json(content: Any) -> list[Caption]:
    """Parse a list, a mapping, or COCO's layout."""
    if isinstance(content, list):
        captions = without_files(content)
    elif not isinstance(content, dict):
        raise ValueError(f"it must hold a list, a mapping or COCO's layout, got {content!r:.60}")
    elif "annotations" in content:
        captions = parse_coco(content)
    else:
        captions = list(starmap(Caption, content.items()))
    for caption in captions:
        if not isinstance(caption.text, str):
            raise ValueError(f"each caption must be a text, got {caption.text!r:.60}")
    return captions


def parse_coco(content: Any) -> list[Caption]:
    """Parse COCO's ``captions_*.json``: ``images`` with their files, and ``annotations`` of their ids."""
    files = {}
    for image in content["images"]:
        files[image["id"]] = image["file_name"]
    captions = []
    for annotation in content["annotations"]:
        captions.append(Caption(files[annotation["image_id"]], annotation["caption"]))
    return captions


def select_captions(captions: Sequence[Caption], count: int, seed: int) -> list[Caption]:
    """Return ``count`` captions in the order of the file: a random subset, or all in turn if there are fewer."""
    if count >= len(captions):
        return list(islice(cycle(captions), count))
    subset = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed))[:count]
    return [captions[i] for i in subset.sort().values.tolist()]


# ------------------------------------------------------------------------------------------------- captions of a folder


def captions_of_files(root: Path, files: Sequence[str], captions: Sequence[Caption] | None) -> list[str]:
    """Return the caption of each image of a folder.

    Args:
        root: the folder.
        files: the images, as paths below the folder.
        captions: captions by file name, of which the first of each file is taken; or one per image, in the natural
            order of the file names (2.png before 10.png). None: the prompt in the metadata of each image, as
            ``clipgen-sample`` writes it, or a text file of the same name beside it.

    Raises:
        ValueError: an image has no caption, or the numbers of captions and images differ.
    """
    if captions is None:
        return [embedded_caption(root / file) for file in files]
    if any(file is None for file, _ in captions):
        return captions_by_line(root, files, [text for _, text in captions])
    by_file: dict[str, str] = {}
    for file, text in captions:
        by_file.setdefault(str(file), text)
    for file in files:
        if file not in by_file:
            raise ValueError(f"captions must name every image of {root}, got none for {file}")
    return [by_file[file] for file in files]


def files_by_caption(root: Path, files: Sequence[str], captions: Sequence[Caption]) -> tuple[list[str], list[str]]:
    """Return all captions of the images of a folder, and the image of each.

    Args:
        root: the folder.
        files: the images, as paths below the folder.
        captions: captions by file name; those of other files are left out.

    Raises:
        ValueError: a caption names no file, or an image has no caption.
    """
    if any(file is None for file, _ in captions):
        raise ValueError("all_captions needs captions with file names, got some without")
    # The folder must hold no image without a caption.
    captions_of_files(root, files, captions)
    known = set(files)
    described = [caption for caption in captions if caption.file in known]
    return [str(file) for file, _ in described], [text for _, text in described]


def captions_by_line(root: Path, files: Sequence[str], captions: Sequence[str]) -> list[str]:
    """Return the caption of each image, if captions are in the natural order of the images' names."""
    if len(captions) != len(files):
        raise ValueError(f"captions must be one per image, got {len(captions)} for {len(files)} images in {root}")
    natural_order = sorted(files, key=natural_key)
    warn_of_other_order(root, natural_order, sorted(files))
    by_file = dict(zip(natural_order, captions))
    return [by_file[file] for file in files]


def warn_of_other_order(root: Path, natural: Sequence[str], alphabetical: Sequence[str]) -> None:
    """Log the first line whose image would differ in alphabetical order."""
    for number, (file, other) in enumerate(zip(natural, alphabetical), start=1):
        if file != other:
            logger.warning(
                "captions by line follow the natural order of the images of %s: line %d belongs to %s (in alphabetical "
                "order: %s); write a file name and a tab before each caption to be sure",
                root,
                number,
                file,
                other,
            )
            return


def embedded_caption(path: Path) -> str:
    """Return the caption in a text file beside an image, or the prompt in its PNG metadata."""
    sidecar = path.with_suffix(".txt")
    caption = read_sidecar(sidecar) if sidecar.is_file() else read_prompt(path)
    if not caption:
        raise ValueError(f"captions are needed: neither {path} nor a {sidecar.name} beside it holds one")
    return caption


def read_sidecar(path: Path) -> str:
    """Read a caption from a text file."""
    size = path.stat().st_size
    if size > MAX_SIDECAR_BYTES:
        raise ValueError(f"{path} must hold a caption, got {size} bytes")
    return read_text(path).strip()


def read_prompt(path: Path) -> str:
    """Read the prompt from the metadata of a PNG; empty if it has none."""
    try:
        return str(png_text(path).get("prompt", ""))
    except UnusableImageError as error:
        raise ValueError(f"{path} cannot be used as an image: {error}") from error
