"""Any folder of images as a map-style dataset."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipgen.data.datamodule import ImageDataModule
from clipgen.data.decoding import EXTENSIONS, UnusableImageError, check_header, decode_image
from clipgen.data.parallel import ahead
from clipgen.data.skip_counter import SkipCounter
from clipgen.data.transforms import train_transform, val_transform
from clipgen.hashing import hashed_seed, unit_hash

logger = logging.getLogger(__name__)

# Decoding this many photos of a megapixel takes about a minute on eight cores.
_DECODE_UP_TO = 5_000


class ImageFolder(Dataset[dict[str, Tensor]]):
    """All usable images below a folder, sorted by path; a sample is {"images": (3, image_size, image_size) in [-1, 1]}.
    Item `i` of pass `p` is asked for as `(p, i)`: its crop and flip follow from the seed, the pass and the item alone.
    A plain `i`, as any DataLoader asks, is drawn anew every time.

    Construction checks every file. Up to 5000 files are decoded, so that unusable ones are all known before training;
    of larger folders only the headers are read, which finds empty files, other content and decompression bombs. What
    turns out broken later is warned about once and replaced by the next usable image.

    Args:
        root: folder, searched with its sub-folders; hidden files and files that are not named like images are ignored.
        image_size: side of the square images.
        train: random crop and flip, and the training side of the split; else centre crop and the validation side.
        flip: mirror half of the training images.
        val_fraction: share of the images held out for validation, in [0, 1). Each image's side follows from a hash of
            its path, so adding files does not move others. At 0 there is no split: either side is the whole folder.
        seed: of crops and flips.
        labels: give a cache the class of each image too, which is the sub-folder of `root` that it lies in.
        class_names: the sub-folders in the order of their classes; None: sorted.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is no folder.
        ValueError: an argument is out of range, nothing in the folder is usable, or an image lies in no class.
    """

    counts_passes = True

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
        self.tally = SkipCounter(str(root))
        usable = scan_folder(self.root, self.tally)
        self.labels = labels
        known = set(class_names or [_class(file) for file in usable]) - {""}
        self.class_names = class_names or sorted(known)
        if labels and (stray := [file for file in usable if _class(file) not in known]):
            which = "one of the training classes" if class_names else "its class"
            raise ValueError(f"labels needs each image of {root} in a folder named after {which}, got {stray[0]}")
        rest, self._held_out = map(PackedStrings, split_files(usable, val_fraction))
        self.files = self._held_out if len(self._held_out) and not train else rest

    def held_out(self) -> ImageFolder:
        """Return the validation side of the split, without a second scan; both sides keep one common count."""
        other = copy.copy(self)
        other.files, other.transform = self._held_out, val_transform(self.image_size)
        return other

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor]:
        turn, item = index if isinstance(index, tuple) else (0, index)
        start = range(len(self))[item]  # raises IndexError, which ends a plain for loop
        generator = self._generator(turn, item) if isinstance(index, tuple) else None
        for step in range(len(self)):
            path = self.root / self.files[(start + step) % len(self)]
            try:
                return {"images": self.transform(decode_image(path, image_size=self.image_size), generator)}
            except UnusableImageError as error:
                if self.tally.skip(str(path), error):
                    self.tally.use(-1)
        raise ValueError(f"{self.root} has no usable image left: {self.tally}")

    def views(self, items: Sequence[int], count: int) -> Iterator[tuple[Tensor, int | None]]:
        """``count`` crops of each usable image among ``items``, (count, 3, H, W), and its class where ``labels``;
        1: the centre crop."""
        crop = self.transform if count > 1 else val_transform(self.image_size)

        def load(item: int) -> tuple[Tensor, int | None] | None:
            try:
                image = decode_image(self.root / self.files[item], image_size=self.image_size)
            except UnusableImageError as error:
                self.tally.skip(str(self.root / self.files[item]), error)
                return None
            label = self.class_names.index(_class(self.files[item])) if self.labels else None
            return torch.stack([crop(image, self._generator(turn, item)) for turn in range(count)]), label

        return filter(None, ahead(load, items))

    def _generator(self, turn: int, item: int) -> torch.Generator:
        return torch.Generator().manual_seed(hashed_seed(f"{self.seed} {turn} {item}"))


class PackedStrings:
    """Texts by number, in two blocks of memory: of a list each worker would come to copy every text (a gigabyte for
    eight workers and a million names), since reading one counts a reference in it."""

    def __init__(self, texts: Sequence[str]):
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self.content, self.ends = b"".join(encoded), np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, item: int) -> str:
        place = range(len(self))[item]  # raises IndexError, which ends a plain for loop
        return self.content[self.ends[place] : self.ends[place + 1]].decode("utf-8", "surrogateescape")


def scan_folder(root: Path, tally: SkipCounter) -> list[str]:
    """Check all images below `root` and return the usable ones, relative to it and sorted.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is no folder.
        ValueError: nothing in it is usable.
    """
    candidates = find_images(root)
    check = decode_image if len(candidates) <= _DECODE_UP_TO else check_header
    with ThreadPool(16) as pool:
        problems = pool.map(partial(_problem, check, root), candidates, chunksize=16)
    for file, problem in zip(candidates, problems, strict=True):
        if problem:
            tally.skip(str(root / file), problem)
    usable = [file for file, problem in zip(candidates, problems, strict=True) if not problem]
    tally.use(len(usable))
    if not usable:
        raise ValueError(f"{root} must hold a usable image, got {tally}")
    tally.summary()
    return usable


def find_images(root: Path) -> list[str]:
    """List the files below `root` that are named like images, as sorted POSIX paths relative to it."""
    if not root.exists():
        raise FileNotFoundError(f"root must be an existing folder of images, got {root}")
    if not root.is_dir():
        raise NotADirectoryError(f"root must be a folder of images (for tar shards: data=webdataset), got {root}")
    files, visited = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        # Sorted, and each folder once: links may lead in circles, and then the first name counts.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(folder) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        inside = f"{Path(folder).relative_to(root).as_posix()}/".removeprefix("./")  # a Path for each file takes long
        files += [inside + name for name in names if not name.startswith(".")]
    images = sorted(file for file in files if file.lower().endswith(EXTENSIONS))
    if not images:
        raise ValueError(f"{root} must hold {', '.join(EXTENSIONS)} files, got {len(files)} files of other kinds")
    return images


def split_files(files: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Split into (training, validation) by a hash of each name; with `val_fraction` above 0 neither side is empty. No
    seed has a part in it: what one run trained on, no other run may validate on.

    Raises:
        ValueError: `val_fraction` is not in [0, 1), or there is only one file to split.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}")
    if val_fraction == 0:
        return files, []
    if len(files) < 2:
        raise ValueError(f"val_fraction must be 0 when there is a single usable image, got {val_fraction}")
    position = {file: unit_hash(file) for file in files}
    count = sum(place < val_fraction for place in position.values())
    held_out = set(sorted(files, key=position.__getitem__)[: min(max(count, 1), len(files) - 1)])
    return [file for file in files if file not in held_out], [file for file in files if file in held_out]


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
    """Make the data of a run from a folder of images; arguments as in `ImageFolder` and `ImageDataModule`.

    Validation images come from `val_root` where it is given, else `val_fraction` of the images is held out of
    training; with neither, there is no validation.
    """
    if val_root is not None:
        train = ImageFolder(root, image_size, train=True, flip=flip, seed=seed, labels=labels)
        names = train.class_names if labels else None
        val: ImageFolder | None = ImageFolder(val_root, image_size, train=False, labels=labels, class_names=names)
    else:
        train = ImageFolder(
            root, image_size, train=True, flip=flip, val_fraction=val_fraction, seed=seed, labels=labels
        )
        val = train.held_out() if val_fraction else None
        if val is not None:
            logger.info("%s: %d images for training, %d for validation", root, len(train), len(val))
    return ImageDataModule(train, val, batch_size, num_workers, seed=seed)


def _class(file: str) -> str:
    """The first folder of a relative path, "" where it has none."""
    return file.split("/")[0] if "/" in file else ""


def _problem(check: Callable[[Path], object], root: Path, file: str) -> UnusableImageError | None:
    try:
        check(root / file)
    except UnusableImageError as error:
        return error
    return None
