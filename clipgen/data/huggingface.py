"""Use any dataset with a column of images as a map-style dataset: from the Hugging Face hub, or local Parquet files."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clipgen.data.datamodule import ImageDataModule
from clipgen.data.decoding import UnusableImageError
from clipgen.data.handover import from_rank_zero
from clipgen.data.indexed import IndexedImages, check_val_fraction
from clipgen.data.skip_counter import SkipCounter
from clipgen.data.transforms import train_transform, val_transform
from clipgen.hashing import unit_hash
from clipgen.storage.files import natural_key, one_line

_ROWS_PER_BLOCK = 1_000_000
# As ``webdataset.parse_label`` allows.
_MAX_CLASSES = 2**31
# polars writes the second or the third.
_TEXT_TYPES = ("string", "large_string", "string_view")
# Keys of an encoded image in Parquet files.
_IMAGE_KEYS = {"bytes", "path"}
_MISSING = 'data=huggingface needs the package datasets: pip install "datasets>=5"'


class HuggingFaceImages(IndexedImages):
    """The images in the rows of a table; see ``IndexedImages`` for samples and indices.

    Construction decodes rows until one is usable. Other broken rows are found when they are read.

    Args:
        rows: a ``datasets.Dataset`` whose images are not decoded, as ``load_rows`` returns it, or any sequence of
            dictionaries. An image is ``{"bytes": bytes or None, "path": str or None}``.
        image_size: height and width of the images in pixels.
        train: random crop and flip, and the training side of the split; else center crop and the validation side.
        name: name in log messages.
        image_column: column of the images.
        label_column: column of the classes: numbers, or names that ``class_names`` lists. None uses no classes.
        class_names: names of the classes, if they are known.
        flip: mirror half of the training images.
        val_fraction: fraction of the rows held out for validation, in [0, 1). Each row's side of the split depends on
            a hash of its number, so adding rows does not move others. At 0 both sides are all rows.
        seed: seed of crops and flips.
        root: folder of the files that rows may name instead of containing an image's bytes. None allows no
            files, because the table may be untrusted.

    Raises:
        ValueError: an argument is out of range, or no row is usable.
    """

    def __init__(
        self,
        rows: Any,
        image_size: int,
        train: bool,
        name: str = "rows",
        image_column: str = "image",
        label_column: str | None = None,
        class_names: list[str] | None = None,
        flip: bool = True,
        val_fraction: float = 0.0,
        seed: int = 0,
        root: str | Path | None = None,
    ) -> None:
        self.rows = rows
        self.image_size = image_size
        self.seed = seed
        self.root = None if root is None else Path(root).expanduser().resolve()
        self.image_column = image_column
        self.label_column = label_column
        self.labels = label_column is not None
        self.class_names = class_names
        self.transform = train_transform(image_size, flip) if train else val_transform(image_size)
        self.skip_counter = SkipCounter(name)
        train_rows, self._held_out = split_rows(len(rows), val_fraction)
        self.row_numbers = self._held_out if len(self._held_out) and not train else train_rows
        self.skip_counter.use(len(rows))
        self._check_rows()

    def _check_rows(self) -> None:
        """Raise ValueError if no row of this side is usable."""
        for item in range(len(self)):
            try:
                self._decode(item)
                self.label_of(item)
                return
            except UnusableImageError as error:
                self._skip(item, error)
        counter = self.skip_counter
        raise ValueError(f"{counter.name} must contain a usable image in column {self.image_column}, got {counter}")

    def held_out(self) -> HuggingFaceImages:
        """Return the validation side of the split; both sides share one skip counter."""
        other = copy.copy(self)
        other.row_numbers = self._held_out
        other.transform = val_transform(self.image_size)
        return other

    def __len__(self) -> int:
        return len(self.row_numbers)

    def item_name(self, item: int) -> str:
        """Return the name of the table and the number of the row."""
        return f"{self.skip_counter.name}: row {self.row_numbers[item]}"

    def encoded_image(self, item: int) -> Path | bytes:
        """Return the bytes of an image, or its file if the table only names it.

        Raises:
            UnusableImageError: the row has no image, or names a file outside of the dataset.
        """
        image = self._row(item)[self.image_column] or {}
        if image.get("bytes") is not None:
            content: bytes = image["bytes"]
            return content
        if not image.get("path"):
            raise UnusableImageError("empty", "the row has no image")
        file = Path(image["path"]).resolve()
        if self.root is None or not file.is_relative_to(self.root):
            raise UnusableImageError("unreadable", f"the row names a file outside of the dataset: {image['path']}")
        return file

    def label_of(self, item: int) -> int | None:
        """Return the class of an image; None without ``labels``.

        Raises:
            UnusableImageError: the row has no class, or one that is out of range.
        """
        if self.label_column is None:
            return None
        label = self._row(item)[self.label_column]
        if isinstance(label, str):
            names = self.class_names or []
            label = names.index(label) if label in names else None
        limit = len(self.class_names) if self.class_names else _MAX_CLASSES
        if not isinstance(label, int) or not 0 <= label < limit:
            raise UnusableImageError("without label", f"column {self.label_column} must be a class below {limit}")
        return label

    def file_names(self) -> list[str]:
        """Return the state of the table as ``datasets`` identifies it: it has no files of its own."""
        return [f"{getattr(self.rows, '_fingerprint', '')} {len(self)} rows of {len(self.rows)}"]

    def content_id(self) -> str:
        """Return a hash of the bytes of all images."""
        digest = hashlib.sha256()
        for item in range(len(self)):
            try:
                image = self.encoded_image(item)
                content = image if isinstance(image, bytes) else image.read_bytes()
            except (UnusableImageError, OSError):
                content = b""
            digest.update(len(content).to_bytes(8, "big") + content)
        return digest.hexdigest()[:32]

    def _row(self, item: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[int(self.row_numbers[item])]
        return row


class RowsWithout(Sequence[int]):
    """The row numbers of a table without some of them; only those are in memory.

    Args:
        num_rows: number of rows of the table.
        left_out: the rows that are left out, sorted.
    """

    def __init__(self, num_rows: int, left_out: np.ndarray[Any, Any]):
        self.num_rows = num_rows
        # Number of the other rows before each row that is left out.
        self.rows_before = left_out - np.arange(len(left_out))

    def __len__(self) -> int:
        return self.num_rows - len(self.rows_before)

    def __getitem__(self, index: int) -> int:  # type: ignore[override]
        index = range(len(self))[index]
        return index + int(np.searchsorted(self.rows_before, index, side="right"))


def split_rows(count: int, val_fraction: float) -> tuple[Sequence[int], Sequence[int] | np.ndarray[Any, Any]]:
    """Split row numbers into (training, validation) by a hash of each; with ``val_fraction`` above 0 neither is empty.

    Raises:
        ValueError: ``val_fraction`` is not in [0, 1), or there is only one row to split.
    """
    check_val_fraction(val_fraction, count, "rows")
    if val_fraction == 0:
        return range(count), range(0)
    held_out = from_rank_zero(lambda: rows_to_hold_out(count, val_fraction))
    return RowsWithout(count, held_out), held_out


def rows_to_hold_out(count: int, val_fraction: float) -> np.ndarray[Any, Any]:
    """Return the numbers of the rows whose hash is below a fraction; at least one row, but not all."""
    parts = []
    for start in range(0, count, _ROWS_PER_BLOCK):
        block = range(start, min(start + _ROWS_PER_BLOCK, count))
        hashes = np.fromiter(map(row_hash, block), float, len(block))
        parts.append(start + np.flatnonzero(hashes < val_fraction))
    held_out = np.concatenate(parts)
    if not len(held_out):
        return np.array([min(range(count), key=row_hash)])
    if len(held_out) == count:
        return np.delete(held_out, max(range(count), key=row_hash))
    return held_out


def row_hash(row: int) -> float:
    """Return a number in [0, 1) that decides on which side of the split a row is."""
    return unit_hash(str(row))


# ------------------------------------------------------------------------------------------------------------- loading


def load_rows(
    dataset: str,
    split: str,
    subset: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> Any:
    """Load a split of a dataset as a ``datasets.Dataset``.

    Args:
        dataset: ``OWNER/NAME`` on the hub; Parquet files (a path, globs allowed), whose only split is ``train``; a
            local folder of data files; or a folder written by ``save_to_disk``.
        split: name of the split, or a part of it such as ``train[:90%]``.
        subset: name of the configuration, for datasets that have several.
        revision: branch, tag or commit on the hub.
        cache_dir: folder of the downloads of ``datasets``; None uses one below ``~/.cache/huggingface``.

    Raises:
        ImportError: the package ``datasets`` is missing.
        ValueError: the dataset or the split cannot be loaded, or an option would have no effect.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(_MISSING) from error
    path = Path(dataset).expanduser()
    check_options(dataset, {"subset": subset, "revision": revision})
    try:
        if is_saved_dataset(path):
            return saved_rows(datasets.load_from_disk(str(path)), split)
        options = {"revision": revision, "cache_dir": cache_dir, "split": split}
        if dataset.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=str(path), **options)
        return datasets.load_dataset(str(path) if path.is_dir() else dataset, subset, **options)
    except Exception as error:  # from HTTP, the hub, Arrow or `datasets` itself
        raise ValueError(
            f"data.dataset must be OWNER/NAME of a dataset on the Hugging Face hub, Parquet files or a folder with the "
            f"split {split}, got {dataset}: {one_line(error)}"
        ) from error


def folder_of_files(dataset: str, cache_dir: str | None) -> Path:
    """Return the folder whose files the rows of a dataset may name: its own, or that of downloads."""
    from huggingface_hub.constants import HF_HOME

    path = Path(dataset).expanduser()
    if path.is_dir():
        return path
    if dataset.endswith(".parquet"):
        return path.parent
    return Path(cache_dir or HF_HOME)


def check_options(dataset: str, options: dict[str, str | None]) -> None:
    """Raise ValueError if a subset or a revision is given that local files do not have."""
    path = Path(dataset).expanduser()
    has_subset = not (dataset.endswith(".parquet") or is_saved_dataset(path))
    has_revision = has_subset and not path.is_dir()
    for name, applies in (("subset", has_subset), ("revision", has_revision)):
        if options[name] is not None and not applies:
            raise ValueError(f"data.{name} must be null, because {dataset} has none, got {options[name]}")


def is_saved_dataset(path: Path) -> bool:
    """Return whether ``save_to_disk`` wrote a folder, with one split or several."""
    return is_saved_table(path) or (path / "dataset_dict.json").is_file()


def is_saved_table(path: Path) -> bool:
    """Return whether ``save_to_disk`` wrote a single split to a folder."""
    return (path / "state.json").is_file()


def saved_rows(saved: Any, split: str) -> Any:
    """Return a split of what ``save_to_disk`` wrote; a single split is called ``train``, or by its own name.

    Raises:
        KeyError, ValueError: there is no such split.
    """
    if isinstance(saved, dict):
        return saved[split]
    names = {"train", str(saved.split or "train")}
    if split not in names:
        raise ValueError(f"the folder contains a single split, so data.split must be {' or '.join(sorted(names))}")
    return saved


def image_column_of(rows: Any, column: str | None) -> str:
    """Return the column of images; None chooses the only one.

    Raises:
        ValueError: the column does not exist, or the table has several columns of images.
    """
    if column is not None:
        return require_column(rows, column, "data.image_column")
    columns = [name for name, feature in rows.features.items() if holds_images(feature)]
    if len(columns) != 1:
        names = ", ".join(columns or rows.column_names)
        raise ValueError(f"data.image_column must name the column of images, one of {names}, got null")
    return columns[0]


def holds_images(feature: Any) -> bool:
    """Return whether a column contains images, decoded by ``datasets`` or as Parquet files store them."""
    return type(feature).__name__ == "Image" or (isinstance(feature, dict) and set(feature) == _IMAGE_KEYS)


def require_column(rows: Any, column: str, key: str) -> str:
    """Return the column, or raise ValueError if the table does not have it."""
    if column not in rows.column_names:
        raise ValueError(f"{key} must be one of {', '.join(rows.column_names)}, got {column}")
    return column


def class_names_of(rows: Any, column: str) -> list[str] | None:
    """Return the names of the classes in a column; None if it contains numbers without names."""
    feature = rows.features[column]
    names = getattr(feature, "names", None)
    if names is None and getattr(feature, "dtype", None) in _TEXT_TYPES:
        names = sorted((name for name in rows.unique(column) if name is not None), key=natural_key)
    return names


def encoded_rows(rows: Any, columns: Sequence[str]) -> Any:
    """Return the rows with their image column, not decoded, and their label column, without any other.

    The first of ``columns`` is that of the images.
    """
    from datasets import Image

    return rows.select_columns(list(columns)).cast_column(columns[0], Image(decode=False))


def huggingface_data(
    dataset: str,
    image_size: int,
    batch_size: int,
    num_workers: int = 0,
    split: str = "train",
    val_split: str | None = None,
    val_fraction: float = 0.02,
    subset: str | None = None,
    image_column: str | None = None,
    label_column: str = "label",
    flip: bool = True,
    seed: int = 0,
    labels: bool = False,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> ImageDataModule:
    """Make the data module of ``data=huggingface``; arguments as in ``load_rows``, ``HuggingFaceImages`` and
    ``ImageDataModule``.

    Validation images come from ``val_split`` if it is set. Else ``val_fraction`` of the rows is held out of training,
    and at 0 nothing is validated.
    """
    if val_split is not None and is_saved_table(Path(dataset).expanduser()):
        raise ValueError(
            f"data.val_split must be null, because {dataset} contains a single split: use data.val_fraction"
        )
    load = partial(load_rows, dataset, subset=subset, revision=revision, cache_dir=cache_dir)
    rows = load(split)
    image_column = image_column_of(rows, image_column)
    if labels:
        require_column(rows, label_column, "data.label_column")
    open_split = partial(
        open_rows,
        image_size=image_size,
        image_column=image_column,
        label_column=label_column if labels else None,
        class_names=class_names_of(rows, label_column) if labels else None,
        flip=flip,
        seed=seed,
        root=folder_of_files(dataset, cache_dir),
    )
    val: HuggingFaceImages | None
    if val_split is not None:
        train = open_split(rows, train=True, name=f"{dataset} {split}")
        val = open_split(load(val_split), train=False, name=f"{dataset} {val_split}")
    else:
        train = open_split(rows, train=True, name=f"{dataset} {split}", val_fraction=val_fraction)
        val = train.held_out() if val_fraction else None
    return ImageDataModule(train, val, batch_size, num_workers, seed=seed)


def open_rows(rows: Any, *, image_column: str, label_column: str | None, **settings: Any) -> HuggingFaceImages:
    """Return the images of a table, which are not decoded until they are read; see ``HuggingFaceImages``."""
    columns = [image_column] if label_column is None else [image_column, label_column]
    rows = encoded_rows(rows, columns)
    return HuggingFaceImages(rows, image_column=image_column, label_column=label_column, **settings)
