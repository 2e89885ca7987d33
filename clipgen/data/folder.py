"""Use any folder of images as a map-style dataset."""

from __future__ import annotations

import copy
import errno
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO, Any

import numpy as np

from clipgen.data.datamodule import ImageDataModule
from clipgen.data.decoding import (
    EXTENSIONS,
    UNREADABLE_EXTENSIONS,
    UnusableImageError,
    check_header,
    decode_image,
    has_extension,
    looks_like_image,
    read_start,
)
from clipgen.data.handover import from_first_process
from clipgen.data.indexed import IndexedImages
from clipgen.data.skip_counter import SkipCounter
from clipgen.data.transforms import train_transform, val_transform
from clipgen.hashing import hash_files, unit_hash
from clipgen.storage.files import natural_key

logger = logging.getLogger(__name__)

# Decoding this many photos of a megapixel takes about a minute on eight cores.
_MAX_DECODED = 5_000
_NUM_THREADS = 16
# Bytes of the names of files that are kept in memory.
_MAX_IN_MEMORY = 1 << 26


class ImageFolder(IndexedImages):
    """All usable images below a folder, sorted by path; see `IndexedImages` for samples and indices.

    Construction checks every file. Up to 5000 files are decoded, so that unusable ones are all known before training;
    of larger folders only the headers are read, which detects empty files, other content and decompression bombs. A
    file that turns out to be broken later is warned about once and replaced by the next usable image.

    Args:
        root: folder, searched with its sub-folders. Hidden files and files that are not named like images are ignored.
            A file without an extension is an image if its first bytes say so.
        image_size: height and width of the images in pixels.
        train: random crop and flip, and the training side of the split; else center crop and the validation side.
        flip: mirror half of the training images.
        val_fraction: fraction of the images held out for validation, in [0, 1). Each image's side of the split depends
            on a hash of its path, so adding files does not move others. At 0 both sides are the whole folder.
        seed: seed of crops and flips.
        labels: return the class of each image from `augmented_views`: the sub-folder of `root` that contains it.
        class_names: sub-folders in the order of their classes. None sorts them, numbers by value (2 before 10).

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is not a folder.
        ValueError: an argument is out of range, nothing in the folder is usable, or an image belongs to no class.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        train: bool,
        flip: bool = True,
        val_fraction: float = 0.0,
        seed: int = 0,
        labels: bool = False,
        class_names: list[str] | None = None,
    ) -> None:
        self.root = Path(root).expanduser()
        self.seed = seed
        self.image_size = image_size
        self.transform = train_transform(image_size, flip) if train else val_transform(image_size)
        self.skip_counter = SkipCounter(str(root))
        usable_files = from_first_process(lambda: scan_folder(self.root, self.skip_counter))
        # The process that has scanned the folder has counted them already.
        self.skip_counter.use(len(usable_files) - self.skip_counter.num_used)
        self.labels = labels
        folders = {_class_folder(file) for file in usable_files} - {""}
        self.class_names = class_names or sorted(folders, key=natural_key)
        if labels:
            self._check_classes(usable_files, "one of the training classes" if class_names else "its class")
        train_files, val_files = split_files(usable_files, val_fraction)
        self._held_out = PackedStrings(val_files)
        self.files = self._held_out if val_files and not train else PackedStrings(train_files)

    def _check_classes(self, files: list[str], wanted: str) -> None:
        """Raise ValueError unless each file is in the folder of a class."""
        folders = set(self.class_names)
        for file in files:
            if _class_folder(file) not in folders:
                raise ValueError(f"labels needs each image of {self.root} in a folder named after {wanted}, got {file}")

    def held_out(self) -> ImageFolder:
        """Return the validation side of the split without scanning again; both sides share one skip counter."""
        other = copy.copy(self)
        other.files = self._held_out
        other.transform = val_transform(self.image_size)
        return other

    def __len__(self) -> int:
        return len(self.files)

    def item_name(self, item: int) -> str:
        """Return the path of an image."""
        return str(self.root / self.files[item])

    def encoded_image(self, item: int) -> Path:
        """Return the path of an image."""
        return self.root / self.files[item]

    def label_of(self, item: int) -> int | None:
        """Return the number of the sub-folder that contains an image; None without `labels`."""
        return self.class_names.index(_class_folder(self.files[item])) if self.labels else None

    def file_names(self) -> Sequence[str]:
        """Return the paths of the images relative to the folder."""
        return list(self.files)

    def content_id(self) -> str:
        """Return a hash of the bytes of all images."""
        return hash_files(self.root / file for file in self.files)


class PackedStrings(Sequence[str]):
    """A list of strings stored in two arrays, which are in a temporary file if they are large.

    Reading a Python list changes reference counts, so forked workers would gradually copy all of it (about 1 GB for 8
    workers and a million names). The pages of a mapped file are shared, and the system can drop them.
    """

    def __init__(self, strings: Iterable[str]):
        with tempfile.TemporaryFile() as content, tempfile.TemporaryFile() as ends:
            end = 0
            ends.write(end.to_bytes(8, "little"))
            for string in strings:
                end += content.write(string.encode("utf-8", "surrogateescape"))
                ends.write(end.to_bytes(8, "little"))
            self.content = mapped(content, np.uint8)
            self.ends = mapped(ends, np.dtype("<i8"))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        # Indexing a range raises IndexError past the end, which ends a plain for loop.
        index = range(len(self))[index]
        return self.content[self.ends[index] : self.ends[index + 1]].tobytes().decode("utf-8", "surrogateescape")


def mapped(file: IO[bytes], dtype: Any) -> np.ndarray:
    """Return the content of a file: memory-mapped if it is large, else read."""
    file.flush()
    size = file.tell()
    if size > _MAX_IN_MEMORY:
        return np.memmap(file, dtype, "r")
    file.seek(0)
    return np.frombuffer(file.read(), dtype)


@dataclass
class FolderListing:
    """Files below a folder, as POSIX paths relative to it.

    Args:
        images: files that are named like images, or have no extension and begin like an image; not sorted.
        no_extension: files without an extension that are not images.
        unreadable_folders: folders that cannot be listed, each with the reason.
        num_others: number of files of other types.
    """

    images: list[str] = field(default_factory=list)
    no_extension: list[str] = field(default_factory=list)
    unreadable_folders: dict[str, str] = field(default_factory=dict)
    num_others: int = 0

    def add(self, root: Path, file: str, name: str) -> None:
        """Add a file to the list of its type.

        Args:
            root: the folder that is listed.
            file: path relative to ``root``.
            name: last part of the path.
        """
        if name.lower().endswith((*EXTENSIONS, *UNREADABLE_EXTENSIONS)):
            self.images.append(file)
        elif has_extension(name):
            self.num_others += 1
        elif looks_like_image(read_start(root / file)):
            self.images.append(file)
        else:
            self.no_extension.append(file)

    def sorted_images(self, root: Path) -> list[str]:
        """Return the images in order.

        Raises:
            ValueError: there are no images.
        """
        if not self.images:
            got = f"{self.num_others + len(self.no_extension)} files of other types"
            if self.unreadable_folders:
                got += f" and {len(self.unreadable_folders)} folders that cannot be listed"
            raise ValueError(f"{root} must hold {', '.join(EXTENSIONS)} files, got {got}")
        return sorted(self.images)


def scan_folder(root: Path, skip_counter: SkipCounter) -> list[str]:
    """Check all images below `root` and return the usable ones, relative to it and sorted; count the others.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is not a folder.
        ValueError: nothing in it is usable.
    """
    listing = list_files(root)
    for folder, reason in listing.unreadable_folders.items():
        error = UnusableImageError("unreadable", f"the folder cannot be listed: {reason}")
        skip_counter.skip(str(root / folder), error)
    for file in listing.no_extension:
        skip_counter.skip(str(root / file), UnusableImageError("not an image", "the name has no extension"))
    usable = _usable_images(root, listing.sorted_images(root), skip_counter)
    skip_counter.use(len(usable))
    if not usable:
        raise ValueError(f"{root} must hold a usable image, got {skip_counter}")
    skip_counter.log_summary()
    return usable


def _usable_images(root: Path, candidates: list[str], skip_counter: SkipCounter) -> list[str]:
    """Check files in parallel; return the usable ones and count the others, in order."""
    check = decode_image if len(candidates) <= _MAX_DECODED else check_header
    with ThreadPool(_NUM_THREADS) as pool:
        problems = pool.map(partial(_find_problem, check, root), candidates, chunksize=16)
    usable = []
    for file, problem in zip(candidates, problems, strict=True):
        if problem:
            skip_counter.skip(str(root / file), problem)
        else:
            usable.append(file)
    return usable


def find_images(root: Path) -> list[str]:
    """List the images below `root`, as sorted POSIX paths relative to it; see `FolderListing`.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is not a folder.
        PermissionError: a folder cannot be listed.
        ValueError: there are no images.
    """
    listing = list_files(root)
    for folder, reason in listing.unreadable_folders.items():
        raise PermissionError(errno.EACCES, f"the folder cannot be listed ({reason})", str(root / folder))
    return listing.sorted_images(root)


def list_files(root: Path) -> FolderListing:
    """List the files below `root`, except hidden ones.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is not a folder.
    """
    if not root.exists():
        raise FileNotFoundError(f"root must be an existing folder of images, got {root}")
    if not root.is_dir():
        raise NotADirectoryError(f"root must be a folder of images (for tar shards: data=webdataset), got {root}")
    listing = FolderListing()
    visited = set()

    def on_error(error: OSError) -> None:
        listing.unreadable_folders[os.path.relpath(error.filename, root)] = error.strerror or str(error)

    for folder, folders, names in os.walk(root, onerror=on_error, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # Links may lead in circles, so each folder is visited only once, under its first name.
        real_path = os.path.realpath(folder)
        if real_path in visited:
            folders.clear()
            continue
        visited.add(real_path)
        # Strings are joined, because making a Path for each file is slow.
        prefix = f"{Path(folder).relative_to(root).as_posix()}/".removeprefix("./")
        for name in names:
            if not name.startswith("."):
                listing.add(root, prefix + name, name)
    return listing


def split_files(files: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Split into (training, validation) by a hash of each name; with `val_fraction` above 0 neither side is empty.

    The split is independent of the seed, so no run validates on images another run trained on.

    Raises:
        ValueError: `val_fraction` is not in [0, 1), or there is only one file to split.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}")
    if val_fraction == 0:
        return files, []
    if len(files) < 2:
        raise ValueError(f"val_fraction must be 0 when there is a single usable image, got {val_fraction}")
    train: list[str] = []
    val: list[str] = []
    for file in files:
        side = val if unit_hash(file) < val_fraction else train
        side.append(file)
    if not val:
        val.append(min(train, key=unit_hash))
        train.remove(val[0])
    if not train:
        train.append(max(val, key=unit_hash))
        val.remove(train[0])
    return train, val


def folder_data(
    root: str | Path,
    image_size: int,
    batch_size: int,
    num_workers: int = 0,
    val_root: str | Path | None = None,
    val_fraction: float = 0.02,
    flip: bool = True,
    seed: int = 0,
    labels: bool = False,
) -> ImageDataModule:
    """Make the data module of `data=folder`; arguments as in `ImageFolder` and `ImageDataModule`.

    Validation images come from `val_root` if it is set. Else `val_fraction` of the images is held out of training, and
    at 0 there is no validation.
    """
    val: ImageFolder | None
    if val_root is not None:
        train = ImageFolder(root, image_size, train=True, flip=flip, seed=seed, labels=labels)
        class_names = train.class_names if labels else None
        val = ImageFolder(val_root, image_size, train=False, labels=labels, class_names=class_names)
    else:
        train = ImageFolder(
            root, image_size, train=True, flip=flip, val_fraction=val_fraction, seed=seed, labels=labels
        )
        val = train.held_out() if val_fraction else None
        if val is not None:
            logger.info("%s: %d images for training, %d for validation", root, len(train), len(val))
    return ImageDataModule(train, val, batch_size, num_workers, seed=seed)


def _class_folder(file: str) -> str:
    """Return the first folder of a relative path, or "" if it has none."""
    return file.split("/")[0] if "/" in file else ""


def _find_problem(check: Callable[[Path], object], root: Path, file: str) -> UnusableImageError | None:
    try:
        check(root / file)
    except UnusableImageError as error:
        return error
    return None
