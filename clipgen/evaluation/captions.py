"""The captions of an evaluation: what is generated, or what the images of a folder should show."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clipgen.data.class_names import MAX_NAMES_BYTES, NAME_LISTS, name_list, parse_published_names
from clipgen.data.decoding import UnusableImageError, png_text
from clipgen.data.shapes import ALL_ATTRIBUTES
from clipgen.evaluation.cub import read_text_folder
from clipgen.generation.prompts import recorded_kind
from clipgen.storage.files import atomic_write, check_size, natural_key, one_line, parse_json, read_text

logger = logging.getLogger(__name__)
MAX_CAPTIONS_BYTES = 512 << 20  # those of COCO's training images are 92 MB
MAX_VALUES = 20_000_000  # three per caption
MAX_SIDECAR_BYTES = 1 << 20  # size of a text file next to an image
LAYOUTS = (
    "lines of a caption, or of FILE, a tab and a caption (.txt); a list, a mapping or COCO's layout (.json); or lines "
    "with file_name and text or caption (.jsonl)"
)


class Caption(NamedTuple):
    """A caption, and the image file that it describes, if known."""

    file: str | None
    text: str


def read_captions(source: str | Path, split: str | None = None) -> list[Caption]:
    """Read captions.

    Args:
        source: ``"shapes"`` for all 288 of the built-in data; a text file with one caption per line, or a file name, a
            tab and a caption; JSON: a list of captions, ``{"file": "caption"}``, or COCO's captions; JSON lines with
            ``file_name`` and ``text`` or ``caption``, as the ``metadata.jsonl`` of an image folder; a folder with a
            text file per image, as of CUB-200-2011.
        split: train, test or all, of a folder with ``train_test_split.txt``. None uses test if it has that file, else
            all.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it does not contain captions, or is too large.
    """
    if source == "shapes":
        return without_files(map(str, ALL_ATTRIBUTES))
    path = Path(source).expanduser()
    if path.is_dir():
        return check_captions(list(starmap(Caption, read_text_folder(path, split))), path)
    if not path.is_file():
        raise FileNotFoundError(f"captions must be 'shapes', an existing file or a folder of text files, got {path}")
    if split is not None:
        raise ValueError(f"split must be given with a folder of text files only, got {split} for {path}")
    check_size(path, MAX_CAPTIONS_BYTES)
    text = read_text(path)
    try:
        captions = parse_captions(text, path.suffix.lower())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"captions cannot be read from {path}: {error}") from error
    return check_captions(captions, path)


def parse_captions(text: str, extension: str) -> list[Caption]:
    """Parse captions in the layout that the extension of their file names."""
    if extension in (".csv", ".tsv"):
        raise ValueError(f"{extension} is not read; it must contain {LAYOUTS}")
    if extension == ".json":
        return captions_from_json(parse_json(text, MAX_VALUES))
    return parse_json_lines(text) if extension in (".jsonl", ".ndjson") else parse_lines(text)


def check_captions(captions: list[Caption], path: Path) -> list[Caption]:
    """Return captions; ValueError if there are none, or an empty one."""
    if not captions:
        raise ValueError(f"captions must be texts, got none in {path}")
    for caption in captions:
        if not caption.text.strip():
            raise ValueError(f"captions must be texts, got an empty one in {path}")
    return captions


def read_classes(source: str | Path) -> list[Caption]:
    """Read class names: a list by its name, ImageNet's and CUB's files, or any source of ``read_captions``."""
    if source in NAME_LISTS:
        return without_files(name_list(str(source)))
    path = Path(source).expanduser()
    if path.is_file():
        names = published_names(path)
        if names is not None:
            return check_captions(without_files(names), path)
    return read_captions(source)


def published_names(path: Path) -> list[str] | None:
    """Return the names in a file of ImageNet, Keras or CUB-200-2011; None if it has another format."""
    if path.stat().st_size > MAX_NAMES_BYTES:
        return None
    try:
        return parse_published_names(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"class names cannot be read from {path}: {error}") from error


def without_files(texts: Iterable[str]) -> list[Caption]:
    """Return captions of which it is not known what file they describe."""
    return [Caption(None, text) for text in texts]


def parse_lines(text: str) -> list[Caption]:
    """Parse one caption per line, all with a file name and a tab before them or all without."""
    captions = []
    for line in filter(str.strip, text.split("\n")):
        if is_json_object(line):
            raise ValueError(f"its lines are JSON objects, which belong in .jsonl; it must contain {LAYOUTS}")
        before_tab, tab, after_tab = line.partition("\t")
        if tab:
            captions.append(Caption(before_tab.strip(), after_tab.strip()))
        else:
            captions.append(Caption(None, line.strip()))
    if len({caption.file is None for caption in captions}) > 1:
        raise ValueError("a file name and a tab must precede every caption, or none")
    return captions


def is_json_object(line: str) -> bool:
    """Return whether a line is a JSON object, and not a caption."""
    if not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(parse_json(line), dict)
    except (ValueError, RecursionError):
        return False


def parse_json_lines(text: str) -> list[Caption]:
    """Parse one JSON object per line: ``file_name``, and ``text`` or ``caption``, as the hub's image folders have."""
    captions = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            captions.append(caption_of_object(parse_json(line), number))
    return captions


def caption_of_object(content: Any, number: int) -> Caption:
    """Return the caption in the object of a line of JSON."""
    if isinstance(content, dict):
        file = content.get("file_name")
        caption = content.get("text", content.get("caption"))
        if isinstance(file, str) and isinstance(caption, str):
            return Caption(file, caption)
    raise ValueError(f"each line must contain file_name and text or caption, got {content!r:.60} in line {number}")


def captions_from_json(content: Any) -> list[Caption]:
    """Parse a list, a mapping, or COCO's layout."""
    if isinstance(content, list):
        captions = without_files(content)
    elif not isinstance(content, dict):
        raise ValueError(f"it must contain a list, a mapping or COCO's layout, got {content!r:.60}")
    elif "annotations" in content:
        captions = parse_coco(content)
    else:
        captions = list(starmap(Caption, content.items()))
    for caption in captions:
        if not isinstance(caption.text, str):
            raise ValueError(f"each caption must be a text, got {caption.text!r:.60}")
    return captions


def parse_coco(content: dict[str, Any]) -> list[Caption]:
    """Parse COCO's ``captions_*.json``: ``images`` with their files, and ``annotations`` of their ids.

    An image has several captions. White space around them, and line breaks in them, are not part of them.
    """
    captions = []
    try:
        files = {image["id"]: image["file_name"] for image in content["images"]}
        for annotation in content["annotations"]:
            captions.append(Caption(files[annotation["image_id"]], annotation["caption"]))
    except (KeyError, TypeError) as error:
        raise ValueError(
            "it must contain COCO's images (id, file_name) and annotations of them (image_id, caption), as "
            f"captions_*.json does, got {one_line(error, 60)}"
        ) from error
    for file, text in captions:
        if not isinstance(file, str) or not isinstance(text, str):
            raise ValueError(f"each caption must be a text of a file, got {text!r:.60} of {file!r:.60}")
    return [Caption(file, " ".join(text.split())) for file, text in captions]


def select_captions(captions: Sequence[Caption], count: int, seed: int) -> list[Caption]:
    """Return ``count`` captions of as many images, one of each, in the order of the file.

    The images, and the caption of each, are drawn with ``seed``. If there are fewer images than ``count``, all of them
    are taken in turn, each time with their next caption. A caption that names no file counts as an image of its own.
    """
    groups = group_captions(captions)
    generator = torch.Generator().manual_seed(seed)
    if count < len(groups):
        subset = torch.randperm(len(groups), generator=generator)[:count]
        groups = [groups[i] for i in subset.sort().values.tolist()]
    first = torch.randint(2**31, (len(groups),), generator=generator).tolist()
    selected = []
    for number in range(count):
        turn, image = divmod(number, len(groups))
        group = groups[image]
        selected.append(group[(first[image] + turn) % len(group)])
    return selected


def write_captions(path: str | Path, captions: Sequence[Caption]) -> None:
    """Write captions as lines that ``read_captions`` reads, with the file name and a tab before each if it is known."""
    lines = []
    for file, text in captions:
        text = " ".join(text.split())
        lines.append(text if file is None else f"{file}\t{text}")
    with atomic_write(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def group_by_image(captions: Sequence[Caption]) -> list[list[str]]:
    """Return the captions of each image, in the order in which the images occur; one without a file is alone."""
    return [[caption.text for caption in group] for group in group_captions(captions)]


def group_captions(captions: Sequence[Caption]) -> list[list[Caption]]:
    """Return captions grouped by image, in the order in which the images occur; one without a file is alone."""
    groups: list[list[Caption]] = []
    by_file: dict[str, list[Caption]] = {}
    for caption in captions:
        if caption.file is None:
            groups.append([caption])
        elif caption.file in by_file:
            by_file[caption.file].append(caption)
        else:
            by_file[caption.file] = [caption]
            groups.append(by_file[caption.file])
    return groups


# ------------------------------------------------------------------------------------------------- captions of a folder


def captions_of_files(root: Path, files: Sequence[str], captions: Sequence[Caption] | None) -> list[str]:
    """Return the caption of each image of a folder.

    Args:
        root: the folder.
        files: the images, as paths below the folder.
        captions: captions by file name, of which the first of each file is taken; or one per image, in the natural
            order of the file names (2.png before 10.png). None uses the prompt in the metadata of each image,
            as ``clipgen-sample`` writes it, or a text file of the same name next to it.

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
    # The folder must contain no image without a caption.
    captions_of_files(root, files, captions)
    known = set(files)
    described_files = []
    texts = []
    for file, text in captions:
        if file in known:
            described_files.append(str(file))
            texts.append(text)
    return described_files, texts


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
    """Return the caption in a text file next to an image, or the prompt in its PNG metadata."""
    sidecar = path.with_suffix(".txt")
    caption = read_sidecar(sidecar) if sidecar.is_file() else read_prompt(path)
    if not caption:
        raise ValueError(f"captions are needed: neither {path} nor a {sidecar.name} next to it contains one")
    return caption


def read_sidecar(path: Path) -> str:
    """Read a caption from a text file."""
    size = path.stat().st_size
    if size > MAX_SIDECAR_BYTES:
        raise ValueError(f"{path} must contain a caption, got {size} bytes")
    return read_text(path).strip()


def read_prompt(path: Path) -> str:
    """Read the prompt from the metadata of a PNG; empty if it has none, or one that is not a text."""
    try:
        text = png_text(path)
    except UnusableImageError as error:
        raise ValueError(f"{path} cannot be used as an image: {error}") from error
    prompt = text.get("prompt", "")
    # The description of an image, a mixture or an embedding does not say what the image should show.
    kind = text.get("prompt_kind") or recorded_kind(prompt, None)
    return prompt if kind == "text" and "prompt_mix" not in text else ""
