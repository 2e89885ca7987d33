"""What was measured of a set of images, part by part on disk, so that a killed evaluation goes on where it was.

A folder holds ``identity.json``, which says of what and how, and ``part-000000.npz``, ... with a row an image. Rows are
read in the order of a hash of the images' pixels: no number depends on the order or the batches in which they came.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
from torch import Tensor

from clipgen.files import atomic_write, read_json, write_json
from clipgen.images import check_images, to_bytes

KEY = "key"
IDENTITY = "identity.json"
Columns = dict[str, np.ndarray]
Measuring = Callable[[Tensor, list[str]], Columns]  # images and captions -> a row an image
Advance = Callable[[int], None]
Batch = tuple[Tensor, list[str]]  # images (B, 3, H, W) in [-1, 1], and their captions


class Source(Protocol):
    """Images in pieces, each of which can be read alone."""

    identity: dict[str, Any]
    pieces: list[Any]

    def read(self, piece: Any) -> Iterator[Batch]:
        """The images of a piece, batch by batch."""


@dataclass
class FeatureStore:
    """The folder of a measured set of images."""

    folder: Path

    @property
    def identity(self) -> dict[str, Any]:
        """What was measured, and how."""
        return read_json(self.folder / IDENTITY)

    @property
    def parts(self) -> list[Path]:
        """The files, in order."""
        return sorted(self.folder.glob("part-*.npz"))

    def each(self, column: str) -> Iterator[np.ndarray]:
        """A column part by part, in no order of meaning; parts without images have none."""
        for path in self.parts:
            if len(read_column(path, KEY)):
                yield read_column(path, column)

    def column(self, name: str) -> np.ndarray:
        """A whole column, in the order of the images' hashes."""
        return np.concatenate(list(self.each(name)))[self.order]

    def mapped(self, name: str, scratch: Path) -> np.ndarray:
        """The same in a file without a name, on the disk of a folder: however many images, they need no memory."""
        places, start = np.argsort(self.order), 0
        shape, dtype = (len(places), *(first := next(self.each(name))).shape[1:]), first.dtype
        with tempfile.TemporaryFile(dir=scratch if os.access(scratch, os.W_OK) else None) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and the end of the process later
                os.posix_fallocate(file.fileno(), 0, dtype.itemsize * math.prod(shape))
            found = np.memmap(file, dtype, "w+", shape=shape)
        for part in self.each(name):
            found[places[start : start + len(part)]] = part
            start += len(part)
        return found

    @property
    def order(self) -> np.ndarray:
        """Which row comes first, second, ... by its hash."""
        return np.argsort(np.concatenate(list(self.each(KEY))), kind="stable")

    def columns(self) -> set[str]:
        """What was measured."""
        return set().union(*map(columns_of, self.parts))

    @property
    def complete(self) -> bool:
        """Whether all parts are there."""
        return len(self.parts) == self.identity.get("parts")

    def __len__(self) -> int:
        return sum(len(keys) for keys in self.each(KEY))


def collect(
    folder: Path,
    source: Source,
    measure: Measuring,
    identity: dict[str, Any],
    advance: Advance = lambda count: None,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Measure a source's images; parts that are there already stay.

    Args:
        identity: of what is measured; with the source's own it must be that of the parts in the folder.
        advance: called with a number of images when they are done, found ones included.
        share: (rank, world size): processes share the parts and do not talk; whoever is last finds it ``complete``.
    """
    begin(folder, identity | source.identity | {"parts": len(source.pieces)})
    paths = [folder / f"part-{number:06d}.npz" for number in range(len(source.pieces))]
    try:
        for path, piece in list(zip(paths, source.pieces))[share[0] :: share[1]]:
            if path.is_file():
                advance(len(read_column(path, KEY)))
            else:
                write_part(path, (measured(measure, batch, advance) for batch in source.read(piece)))
    except BaseException:
        if share[1] == 1 and not FeatureStore(folder).parts:  # nothing that other settings could be mixed with
            (folder / IDENTITY).unlink(missing_ok=True)
        raise


def begin(folder: Path, identity: dict[str, Any]) -> None:
    """Write the identity, or make sure that the one which is there is the same.

    Raises:
        ValueError: the folder's parts are of another set of images, or were measured otherwise.
    """
    path, wanted = folder / IDENTITY, json.loads(json.dumps(identity))
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
        return
    check_same(folder, read_json(path), wanted)


def check_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the first difference, where a folder holds another measurement than the wanted one."""
    for key in sorted({*found, *wanted}):
        got, asked = (str(each.get(key))[:200] for each in (found, wanted))
        if found.get(key) != wanted.get(key):
            raise ValueError(f"{folder} was measured with {key}={got}, not {asked}: name another")


def columns_of(path: Path) -> set[str]:
    """The names of a part's columns."""
    with damage_named(path), np.load(path) as part:
        return set(part.files)


def read_column(path: Path, name: str) -> np.ndarray:
    """One column of a part."""
    with damage_named(path), np.load(path) as part:
        column: np.ndarray = part[name]
        return column


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Raise ValueError with the way out where a part cannot be read."""
    try:
        yield
    except (BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and it is measured again") from error


def measured(measure: Measuring, batch: Batch, advance: Advance) -> Columns:
    """A batch's rows, with the keys of its images."""
    images, captions = batch
    check_images(images)
    if not images.isfinite().all():
        bad = int((~images.flatten(1).isfinite().all(1)).nonzero()[0])
        about = f" of {captions[bad]!r}" if captions else ""
        raise ValueError(f"images must be finite, got NaN or infinity in an image{about}")
    pixels = to_bytes(images)
    columns = measure(pixels.float() / 127.5 - 1, captions) | {KEY: keys(pixels)}
    advance(len(images))
    return columns


def keys(pixels: Tensor) -> np.ndarray:
    """A hash (B,) of each image's bytes."""
    digests = [hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest() for image in pixels.cpu()]
    return np.frombuffer(b"".join(digests), np.uint64)


def write_part(path: Path, batches: Iterable[Columns]) -> None:
    """Write a part, whole or not at all."""
    found = list(batches)
    columns = {name: np.concatenate([batch[name] for batch in found]) for name in (found[0] if found else ())}
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(file, **(columns or {KEY: np.empty(0, np.uint64)}))  # type: ignore[arg-type]
