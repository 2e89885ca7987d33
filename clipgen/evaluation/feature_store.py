"""On-disk store of per-image features and scores, written in parts so that an interrupted evaluation can resume.

A folder contains ``identity.json``, which identifies the images and the measurements, and ``part-000000.npz``, ...
with one row per image. Rows are read in the order of a hash of the images' pixels, so that no result depends on the
order or on the batches in which the images came.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from clipgen.checkpoint.safe_load import check_archive
from clipgen.data.byte_images import unpack
from clipgen.images import check_images, to_bytes
from clipgen.storage.files import atomic_write, one_line
from clipgen.storage.resumable_store import ResumableStore

KEY_COLUMN = "key"
IDENTITY_FILE = "identity.json"
Columns = dict[str, np.ndarray]  # name -> (B, ...), one row per image
MeasureFn = Callable[[Tensor, list[str]], Columns]  # images and captions -> one row per image
Advance = Callable[[int], None]  # receives a number of finished images
ImageBatch = tuple[Tensor, list[str]]  # images (B, 3, H, W) in [-1, 1], and their captions


class Source(Protocol):
    """Images in chunks, each of which can be read independently."""

    identity: dict[str, Any]
    chunks: list[Any]

    def read(self, chunk: Any) -> Iterator[ImageBatch]:
        """Yield the images of a chunk, batch by batch."""


@dataclass
class FeatureStore:
    """The folder in which a set of images was measured."""

    folder: Path

    @property
    def parts(self) -> list[Path]:
        """The part files that exist, in order."""
        return sorted(self.folder.glob("part-*.npz"))

    def read_identity(self) -> dict[str, Any]:
        """Read the identity of the images and the measurements."""
        return ResumableStore(self.folder, IDENTITY_FILE).read_identity()

    def is_complete(self) -> bool:
        """Return whether all parts exist."""
        return len(self.parts) == self.read_identity().get("parts")

    def column_names(self) -> set[str]:
        """Return the names of the columns of all parts."""
        names: set[str] = set()
        for path in self.parts:
            names |= read_column_names(path)
        return names

    def iter_column(self, name: str) -> Iterator[np.ndarray]:
        """Yield a column part by part, in an arbitrary order of rows. Parts without images are skipped."""
        for path in self.parts:
            if len(read_column(path, KEY_COLUMN)):
                yield read_column(path, name)

    def column(self, name: str) -> np.ndarray:
        """Return a column in the order of the images' hashes."""
        return np.concatenate(list(self.iter_column(name)))[self.sort_order()]

    def memmap_column(self, name: str, scratch: Path) -> np.ndarray:
        """Return the same array as ``column``, memory-mapped from a temporary file, for large sets.

        Args:
            name: name of the column.
            scratch: folder on the disk that takes the temporary file, which has no name.
        """
        destination = np.argsort(self.sort_order())
        first_part = next(self.iter_column(name))
        rows = create_memmap((len(destination), *first_part.shape[1:]), first_part.dtype, scratch)
        start = 0
        for part in self.iter_column(name):
            rows[destination[start : start + len(part)]] = part
            start += len(part)
        return rows

    def sort_order(self) -> np.ndarray:
        """Return the row numbers, sorted by the hash of the image; reads the keys of all parts."""
        return np.argsort(np.concatenate(list(self.iter_column(KEY_COLUMN))), kind="stable")

    def __len__(self) -> int:
        return sum(len(keys) for keys in self.iter_column(KEY_COLUMN))


def collect(
    folder: Path,
    source: Source,
    measure: MeasureFn,
    identity: dict[str, Any],
    advance: Advance = lambda count: None,
    *,
    rank: int = 0,
    world_size: int = 1,
    shared: bool = False,
) -> None:
    """Measure the images of a source; parts that exist are kept.

    Args:
        folder: folder of the store.
        source: the images.
        measure: function that returns the columns of a batch.
        identity: what is measured; together with the source's own it must equal that of the folder.
        advance: called with the number of images when they are done, including those that were done before.
        rank: number of this process. Processes share the parts without communication.
        world_size: number of processes.
        shared: other evaluations may use the folder at the same time, so its identity stays after an error.
    """
    parts = {folder / f"part-{number:06d}.npz": chunk for number, chunk in enumerate(source.chunks)}

    def write(path: Path, chunk: Any) -> None:
        write_part(path, (measure_batch(measure, batch, advance) for batch in source.read(chunk)))

    def count_existing(path: Path) -> None:
        advance(len(read_column(path, KEY_COLUMN)))

    store = ResumableStore(folder, IDENTITY_FILE)
    store.open(identity | source.identity | {"parts": len(parts)})
    try:
        store.write_missing(parts, write, count_existing, rank=rank, world_size=world_size)
    except BaseException:
        # Without a part there is nothing that other settings could be mixed with.
        if world_size == 1 and not shared and not FeatureStore(folder).parts:
            store.identity_path.unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------------------------------------------------- part files


def read_column_names(path: Path) -> set[str]:
    """Return the names of a part's columns."""
    with damage_errors(path), open_part(path) as part:
        return set(part.files)


def read_column(path: Path, name: str) -> np.ndarray:
    """Read one column of a part."""
    with damage_errors(path), open_part(path) as part:
        column: np.ndarray = part[name]
        return column


def open_part(path: Path) -> Any:
    """Open a part and check that no column claims more bytes than it has: ``write_part`` does not compress."""
    check_archive(path)
    part = np.load(path)
    for record in part.zip.infolist():
        with part.zip.open(record) as file:
            check_array_size(file, record.file_size)
    return part


def check_array_size(file: Any, size: int) -> None:
    """Raise ValueError if the header of a stored array claims more than its ``size`` bytes."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    claimed = math.prod(shape) * dtype.itemsize
    if claimed > size:
        raise ValueError(f"a column claims {claimed} bytes of {size}")


@contextmanager
def damage_errors(path: Path) -> Iterator[None]:
    """Raise a ValueError that names the file and what to do if a part cannot be read."""
    try:
        yield
    except OSError:
        raise
    # Damaged bytes raise exceptions of any type.
    except Exception as error:
        raise ValueError(f"{path} is damaged ({one_line(error)}): delete it, and it will be measured again") from error


def measure_batch(measure: MeasureFn, batch: ImageBatch, advance: Advance) -> Columns:
    """Return the columns of a batch, with the keys of its images. Images are rounded to 8 bits, as in a file."""
    images, captions = batch
    check_images(images)
    require_finite(images, captions)
    pixels = to_bytes(images)
    columns = measure(unpack(pixels), captions)
    columns[KEY_COLUMN] = pixel_hashes(pixels)
    advance(len(images))
    return columns


def require_finite(images: Tensor, captions: list[str]) -> None:
    """Raise ValueError, with the caption, if one of the images (B, 3, H, W) contains NaN or infinity."""
    finite = images.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        caption = f" of {captions[first]!r}" if captions else ""
        raise ValueError(f"images must be finite, got NaN or infinity in an image{caption}")


def pixel_hashes(pixels: Tensor) -> np.ndarray:
    """Return a hash (B,) of the bytes of each image."""
    digests = [hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest() for image in pixels.cpu()]
    return np.frombuffer(b"".join(digests), np.uint64)


def write_part(path: Path, batches: Iterable[Columns]) -> None:
    """Write a part atomically."""
    values: dict[str, list[np.ndarray]] = {KEY_COLUMN: [np.empty(0, np.uint64)]}
    for batch in batches:
        for name, column in batch.items():
            values.setdefault(name, []).append(column)
    columns = {name: np.concatenate(parts) for name, parts in values.items()}
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(file, **columns)  # type: ignore[arg-type]


def create_memmap(shape: tuple[int, ...], dtype: np.dtype, scratch: Path) -> np.ndarray:
    """Return an array in a temporary file below ``scratch``, or in the system's folder if that is read-only."""
    with tempfile.TemporaryFile(dir=scratch if os.access(scratch, os.W_OK) else None) as file:
        # Reserve the space: a full disk is an error here, but ends the process when a page is written later.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, dtype.itemsize * math.prod(shape))
        return np.memmap(file, dtype, "w+", shape=shape)
