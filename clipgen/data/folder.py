"""Use any folder of images as a map-style dataset."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import compress, islice
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from clipgen.data.datamodule import ImageDataModule
from clipgen.data.decoding import UnusableImageError, check_header, decode_image
from clipgen.data.folder_listing import FolderListing
from clipgen.data.handover import from_rank_zero
from clipgen.data.indexed import IndexedImages, check_val_fraction
from clipgen.data.packed_strings import PackedStrings
from clipgen.data.skip_counter import SkipCounter
from clipgen.data.transforms import train_transform, val_transform
from clipgen.hashing import hash_files, unit_hash
from clipgen.storage.files import natural_key

logger = logging.getLogger(__name__)

# Decoding this many photos of a megapixel takes about a minute on eight cores.
_MAX_DECODED = 5_000
_NUM_THREADS = 16
_FILES_PER_BLOCK = 10_000


class ImageFolder(IndexedImages):
    """All usable images below a folder, sorted by path; see ``IndexedImages`` for samples and indices.

    Construction checks every file. Up to 5000 files are decoded, so that unusable ones are all known before training;
    of larger folders only the headers are read, which detects empty files, other content and decompression bombs. A
    file that turns out to be broken later is warned about once and replaced by the next usable image.

    Args:
        root: folder, searched with its sub-folders. Hidden files and files that are not named like images are ignored.
            A file without an extension is an image if it has the signature of one.
        image_size: height and width of the images in pixels.
        train: random crop and flip, and the training side of the split; else center crop and the validation side.
        flip: mirror half of the training images.
        val_fraction: fraction of the images held out for validation, in [0, 1). Each image's side of the split depends
            on a hash of its path, so adding files does not move others. At 0 both sides are the whole folder.
        seed: seed of crops and flips.
        labels: return the class of each image from ``augmented_views``: the sub-folder of ``root`` that contains it.
        class_names: sub-folders in the order of their classes. None sorts them, numbers by value (2 before 10).

    Raises:
        FileNotFoundError, NotADirectoryError: ``root`` is not a folder.
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
        usable_files = from_rank_zero(lambda: scan_folder(self.root, self.skip_counter))
        # The process that has scanned the folder has counted them already.
        self.skip_counter.use(len(usable_files) - self.skip_counter.num_used)
        self.labels = labels
        folders = {_class_folder(file) for file in usable_files} - {""}
        self.class_names = class_names or sorted(folders, key=natural_key)
        if labels:
            self._check_classes(usable_files, "one of the training classes" if class_names else "its class")
        train_files, val_files = split_files(usable_files, val_fraction)
        self._held_out = val_files
        self.files = val_files if val_files and not train else train_files

    def _check_classes(self, files: Sequence[str], wanted: str) -> None:
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
        """Return the number of the sub-folder that contains an image; None without ``labels``."""
        return self.class_names.index(_class_folder(self.files[item])) if self.labels else None

    def file_names(self) -> Sequence[str]:
        """Return the paths of the images relative to the folder."""
        return self.files

    def content_id(self) -> str:
        """Return a hash of the bytes of all images."""
        return hash_files(self.root / file for file in self.files)


def scan_folder(root: Path, skip_counter: SkipCounter) -> PackedStrings:
    """Check all images below ``root`` and return the usable ones, relative to it and sorted; count the others.

    Raises:
        FileNotFoundError, NotADirectoryError: ``root`` is not a folder.
        ValueError: nothing in it is usable.
    """
    listing = FolderListing(root)
    for folder, reason in listing.unreadable_folders.items():
        error = UnusableImageError("unreadable", f"the folder cannot be listed: {reason}")
        skip_counter.skip(str(root / folder), error)
    for file in listing.no_extension:
        skip_counter.skip(str(root / file), UnusableImageError("not an image", "the name has no extension"))
    usable = PackedStrings(_usable_images(root, listing.require_images(), skip_counter))
    skip_counter.use(len(usable))
    if not usable:
        raise ValueError(f"{root} must contain a usable image, got {skip_counter}")
    skip_counter.log_summary()
    return usable


def _usable_images(root: Path, candidates: PackedStrings, skip_counter: SkipCounter) -> Iterator[str]:
    """Check files in parallel; yield the usable ones and count the others, in order."""
    check = decode_image if len(candidates) <= _MAX_DECODED else check_header
    names = iter(candidates)
    with ThreadPool(_NUM_THREADS) as pool:
        # In blocks, because a pool keeps all of its arguments and results.
        while block := list(islice(names, _FILES_PER_BLOCK)):
            problems = pool.map(partial(_find_problem, check, root), block, chunksize=16)
            for file, problem in zip(block, problems, strict=True):
                if problem:
                    skip_counter.skip(str(root / file), problem)
                else:
                    yield file


def split_files(
    files: Sequence[str], val_fraction: float, option: str = "data.val_fraction"
) -> tuple[Sequence[str], Sequence[str]]:
    """Split into (training, validation) by a hash of each name; with ``val_fraction`` above 0 neither side is empty.

    The split is independent of the seed, so no run validates on images another run trained on.

    Args:
        files: names of the files.
        val_fraction: fraction of the validation side.
        option: name of the option that contains it, for errors.

    Raises:
        ValueError: ``val_fraction`` is not in [0, 1), or there is only one file to split.
    """
    check_val_fraction(val_fraction, len(files), "usable images", option)
    if val_fraction == 0:
        return files, []
    hashes = np.fromiter(map(unit_hash, files), float, len(files))
    held_out = hashes < val_fraction
    held_out[hashes.argmin()] = True
    held_out[hashes.argmax()] = False
    return PackedStrings(compress(files, ~held_out)), PackedStrings(compress(files, held_out))


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
    """Make the data module of ``data=folder``; arguments as in ``ImageFolder`` and ``ImageDataModule``.

    Validation images come from ``val_root`` if it is set. Else ``val_fraction`` of the images is held out of training;
    0 disables validation.
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
