"""The token cache: code indices and CLIP embeddings of all images, computed once, in memory-mapped shards.

The folder of a cache contains ``manifest.json``, the frozen models as a run folder does, and a folder per split,
``train`` and ``val``. A split's folder contains only ``shard-000000.npy``, ... Each shard is an array of records, one
per image:

- ``indices``: (A, T), of the smallest unsigned type that can store them, for A augmentations of T tokens;
- ``embedding``: (A, E) in fp16;
- ``label``: the class of the image, if the source has classes and they were requested.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipgen.checkpoint.model_folder import codebook_rows
from clipgen.data.datamodule import make_loader
from clipgen.data.handover import from_rank_zero
from clipgen.data.samplers import ResumableSampler, ValidationSampler
from clipgen.storage.files import atomic_write, check_size, one_line, read_json

MANIFEST = "manifest.json"
SPLITS = ("train", "val")
# Keys of the manifest that are known only when all shards exist.
RESULT_KEYS = ("num_tokens", "bytes_per_image", "images", "num_classes")
SIZE_KEYS = ("codebook_size", "num_tokens", "clip_dim")
MAX_MANIFEST_BYTES = 2**25
# Largest number of classes without names, unless there are more images.
MAX_UNNAMED_CLASSES = 2**16
# Largest codebook of a tokenizer whose weights contain no table of codes.
MAX_IMPLICIT_CODEBOOK = 2**20
MAX_LABEL = 2**31 - 1
# Shards that a process keeps mapped; Linux allows 65530 maps.
MAX_MAPS = 10_000


def record_dtype(
    augmentations: int, num_tokens: int, codebook_size: int, clip_dim: int, labels: bool = False
) -> np.dtype:
    """Return the type of one image's record."""
    fields: list[Any] = [
        ("indices", index_dtype(codebook_size), (augmentations, num_tokens)),
        ("embedding", "<f2", (augmentations, clip_dim)),
    ]
    if labels:
        fields.append(("label", "<i4"))
    return np.dtype(fields)


def index_dtype(codebook_size: int) -> np.dtype:
    """Return the smallest type that can store every index."""
    return np.dtype("<u2" if codebook_size <= 2**16 else "<u4")


# ------------------------------------------------------------------------------------------------------------ manifest


def read_manifest(root: str | Path) -> dict[str, Any]:
    """Read the manifest of a complete cache.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: the cache is not complete, or its manifest is damaged.
    """
    path = Path(root).expanduser() / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"no token cache in {root}: there is no {MANIFEST}; make one with `clipgen-encode output={root}`"
        )
    check_size(path, MAX_MANIFEST_BYTES)
    manifest = read_json(path)
    if "images" not in manifest:
        raise ValueError(f"the token cache {root} is not complete; run the same clipgen-encode command to resume it")
    check_manifest(manifest, path)
    check_records(manifest, path)
    return manifest


def check_manifest(manifest: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless a manifest contains the types and sizes that ``clipgen-encode`` writes."""
    images = manifest["images"]
    if not isinstance(images, dict) or not all(is_whole_number(images.get(split), 0) for split in SPLITS):
        raise ValueError(f"{path} is damaged: images must be the numbers of {' and '.join(SPLITS)}, got {images!r:.60}")
    if images["train"] < 1:
        raise ValueError(f"{path} is damaged: the number of train images must be at least 1, got {images['train']}")
    for name in SIZE_KEYS:
        size = manifest.get(name)
        if not is_whole_number(size, 1):
            raise ValueError(f"{path} is damaged: {name} must be a whole number of at least 1, got {size!r:.60}")
    for name in ("vqgan", "clip"):
        identity = manifest.get(name)
        if not isinstance(identity, str):
            raise ValueError(f"{path} is damaged: {name} must be a string, got {identity!r:.60}")
    check_classes(manifest, path)


def check_classes(manifest: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless the number and the names of the classes in a manifest are possible."""
    names = manifest.get("class_names")
    is_list_of_strings = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if names is not None and not is_list_of_strings:
        raise ValueError(f"{path} is damaged: class_names must be a list of strings, got {names!r:.60}")
    num_classes = manifest.get("num_classes")
    if num_classes is None:
        return
    limit = len(names) if names else max_classes(sum(manifest["images"][split] for split in SPLITS))
    if not is_whole_number(num_classes, 1) or num_classes > limit:
        raise ValueError(f"{path} is damaged: num_classes must be in [1, {limit}], got {num_classes!r:.60}")


def max_classes(num_images: int) -> int:
    """Return the largest number of classes without names that a cache of this many images may have."""
    return max(num_images, MAX_UNNAMED_CLASSES)


def is_whole_number(value: Any, minimum: int) -> bool:
    """Return whether a value is a whole number of at least ``minimum``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def check_records(manifest: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless the sizes of a manifest match the first records and the tokenizer in its folder."""
    codebook_size = manifest["codebook_size"]
    dtype = first_record_dtype(open_split(path.parent / "train"))
    if dtype is not None:
        for name, field in (("num_tokens", "indices"), ("clip_dim", "embedding")):
            size = dtype[field].shape[1]
            if manifest[name] != size:
                raise ValueError(f"{path} is damaged: {name} must be {size}, as in the shards, got {manifest[name]}")
        stored_dtype = dtype["indices"].base
        if stored_dtype != index_dtype(codebook_size):
            raise ValueError(f"{path} is damaged: codebook_size must fit {stored_dtype}, got {codebook_size}")
    rows = codebook_rows(path.parent / "vqgan")
    if rows is not None and codebook_size != rows:
        raise ValueError(f"{path} is damaged: codebook_size must be {rows}, as in the tokenizer, got {codebook_size}")
    if codebook_size > max(rows or 0, MAX_IMPLICIT_CODEBOOK):
        raise ValueError(
            f"{path} is damaged: codebook_size must be at most {MAX_IMPLICIT_CODEBOOK}, got {codebook_size}"
        )


def first_record_dtype(shards: Iterable[np.ndarray]) -> np.dtype | None:
    """Return the type of the records of the first shard with images, or None if there is none."""
    for shard in shards:
        # An empty shard was written without knowing the sizes of the others.
        if len(shard):
            return shard.dtype
    return None


def class_names_of(manifest: dict[str, Any], root: str | Path) -> list[str]:
    """Return the names of the classes of a cache; their numbers if the source had no names.

    Raises:
        ValueError: the cache contains no classes.
    """
    if "num_classes" not in manifest:
        raise ValueError(f"the token cache {root} contains no labels; make one with `clipgen-encode data.labels=true`")
    return manifest.get("class_names") or [str(number) for number in range(manifest["num_classes"])]


# -------------------------------------------------------------------------------------------------------------- shards


def write_shard(path: Path, records: np.ndarray) -> None:
    """Write records (N,) atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.save(file, records)


def open_split(folder: Path) -> Iterator[np.ndarray]:
    """Memory-map the shards of a split, in order."""
    return map(open_shard, shard_files(folder))


def shard_files(folder: Path) -> list[Path]:
    """Return the files of the shards of a split, in order."""
    return sorted(folder.glob("shard-*.npy"))


def open_shard(path: Path) -> np.ndarray:
    """Memory-map the records (N,) of a shard, read-only.

    Raises:
        ValueError: the shard is damaged; the message names it.
    """
    try:
        array: Any = np.load(path, mmap_mode="r") if path.is_file() else None
        check_shard(array)
    except OSError:
        raise
    except Exception as error:
        # A damaged header raises anything from TokenError to OverflowError.
        raise damaged_shard(path, one_line(error)) from error
    # numpy's memory map keeps the file open, and a process may not open hundreds of files; torch's map does not.
    content = torch.from_file(str(path), size=array.offset + array.nbytes, dtype=torch.uint8).numpy()
    records: np.ndarray = content[array.offset :].view(array.dtype)
    records.flags.writeable = False
    return records


def damaged_shard(path: Path, reason: str) -> ValueError:
    """Return the error for a shard that cannot be used."""
    return ValueError(f"{path} is damaged ({reason}); delete it and run clipgen-encode again")


def check_shard(array: Any) -> None:
    """Raise ValueError unless an array consists of records as ``record_dtype`` describes them."""
    if not isinstance(array, np.memmap) or array.ndim != 1:
        raise ValueError("it contains no list of records")
    fields = array.dtype.fields or {}
    layout = {name: (field[0].base.str, len(field[0].shape)) for name, field in fields.items()}
    label = {"label": ("<i4", 0)} if "label" in layout else {}
    if layout not in [{"indices": (dtype, 2), "embedding": ("<f2", 2)} | label for dtype in ("<u2", "<u4")]:
        raise ValueError(f"its records must contain indices and embedding, got {array.dtype!s:.100}")
    if not all(array.dtype[name].shape[0] for name in ("indices", "embedding")):
        raise ValueError("its records contain no augmentation")


# ------------------------------------------------------------------------------------------------------------- dataset


class TokenCacheDataset(Dataset[dict[str, Tensor]]):
    """One split of a cache: ``{"indices": (T,) int64, "condition": (E,) unit norm}``.

    Index ``(epoch, i)`` selects the augmentation of image ``i`` for that epoch, cycling from a per-image offset; a
    plain ``i`` means epoch 0.

    Args:
        folder: folder of the split.
        num_classes: if set, ``condition`` is the one-hot class (num_classes,) instead of the CLIP embedding.
        codebook_size: bound of the indices; None does not check them.

    Raises:
        FileNotFoundError: the folder contains no images.
        ValueError: a shard is damaged, or differs in type from the others.
    """

    supports_epoch_index = True

    def __init__(self, folder: str | Path, num_classes: int | None = None, codebook_size: int | None = None):
        self.num_classes = num_classes
        self.codebook_size = codebook_size
        self.files, lengths, self.dtype = from_rank_zero(lambda: check_shards(Path(folder)))
        self.ends = np.cumsum(lengths)
        self.starts = self.ends - lengths
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()

    def shard(self, number: int) -> np.ndarray:
        """Return the memory map of a shard; up to ``MAX_MAPS`` are kept, because the system limits their number."""
        records = self._open.pop(number, None)
        if records is None:
            records = open_shard(self.files[number])
        self._open[number] = records
        if len(self._open) > MAX_MAPS:
            self._open.popitem(last=False)
        return records

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the memory maps, so that each worker opens its own."""
        return {**self.__dict__, "_open": OrderedDict()}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Any]) -> list[dict[str, Tensor]]:
        """Return many samples; DataLoader calls this with the indices of a batch."""
        batch = self.batch(indices)
        samples: list[dict[str, Tensor]] = []
        for i in range(len(indices)):
            samples.append({name: values[i] for name, values in batch.items()})
        return samples

    def batch(self, indices: Sequence[Any]) -> dict[str, Tensor]:
        """Return a batch: ``{"indices": (B, T) int64, "condition": (B, E)}``.

        Raises:
            IndexError: an index is out of range.
            ValueError: a shard is damaged.
        """
        epochs, items = split_epochs(indices)
        shard_numbers, rows = self._locate(items)
        views = (epochs + items) % self.dtype["indices"].shape[0]
        tokens = self._gather("indices", shard_numbers, rows, views)
        self._check_range("indices", tokens, self.codebook_size, shard_numbers)
        if self.num_classes is None:
            embeddings = self._gather("embedding", shard_numbers, rows, views)
            self._check_finite(embeddings, shard_numbers)
            # fp16 also rounds the norm.
            condition = F.normalize(torch.from_numpy(embeddings).float(), dim=-1)
        else:
            labels = self._gather("label", shard_numbers, rows, views)
            self._check_range("label", labels, self.num_classes, shard_numbers)
            condition = F.one_hot(torch.from_numpy(labels).long(), self.num_classes).float()
        return {"indices": torch.from_numpy(tokens.astype(np.int64)), "condition": condition}

    def embeddings(self, count: int = 10_000) -> Tensor:
        """Return the conditions (N, E) of about ``count`` evenly spaced images, for ``EmbeddingProjector``.

        Raises:
            ValueError: ``count`` is below 1, or a shard is damaged.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        return self.batch(range(0, len(self), max(len(self) // count, 1)))["condition"]

    def _locate(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard number and the row in the shard of each item, both (B,)."""
        for item in (items.min(), items.max()):
            if not 0 <= item < len(self):
                raise IndexError(f"index must be in [0, {len(self)}), got {item}")
        shard_numbers = np.searchsorted(self.ends, items, side="right")
        return shard_numbers, items - self.starts[shard_numbers]

    def _gather(self, field: str, shard_numbers: np.ndarray, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Read one field of many records: (B, ...). Fields with an augmentation axis are indexed by ``views``."""
        dtype = self.dtype[field]
        values = np.empty((len(rows), *dtype.shape[1:]), dtype.base)
        for number in np.unique(shard_numbers):
            in_shard = shard_numbers == number
            shard_values = self.shard(int(number))[field]
            if dtype.shape:
                values[in_shard] = shard_values[rows[in_shard], views[in_shard]]
            else:
                values[in_shard] = shard_values[rows[in_shard]]
        return values

    def _check_range(self, name: str, values: np.ndarray, limit: int | None, shard_numbers: np.ndarray) -> None:
        """Raise ValueError, naming the shard, unless all values are in [0, limit)."""
        if limit is None:
            return
        is_wrong = (values < 0) | (values >= limit)
        if is_wrong.any():
            reason = f"{name} must be in [0, {limit}), got {values[is_wrong][0]}"
            raise damaged_shard(self._file_of_first(is_wrong, shard_numbers), reason)

    def _check_finite(self, embeddings: np.ndarray, shard_numbers: np.ndarray) -> None:
        """Raise ValueError, naming the shard, unless all embeddings are finite."""
        is_wrong = ~np.isfinite(embeddings)
        if is_wrong.any():
            reason = "embeddings must be finite, got NaN or infinity"
            raise damaged_shard(self._file_of_first(is_wrong, shard_numbers), reason)

    def _file_of_first(self, is_wrong: np.ndarray, shard_numbers: np.ndarray) -> Path:
        """Return the shard of the first sample with a wrong value."""
        sample = int(np.argwhere(is_wrong)[0][0])
        return self.files[shard_numbers[sample]]


def check_shards(folder: Path) -> tuple[list[Path], list[int], np.dtype]:
    """Return the shards of a split that contain images, their numbers of records, and the type of the records.

    Raises:
        FileNotFoundError: the folder contains no images.
        ValueError: a shard is damaged, or differs in type from the others.
    """
    files: list[Path] = []
    lengths: list[int] = []
    dtype: np.dtype | None = None
    for file in shard_files(folder):
        shard = open_shard(file)
        # An empty shard was written without knowing the sizes of the others.
        if not len(shard):
            continue
        dtype = dtype or shard.dtype
        if shard.dtype != dtype:
            raise ValueError(f"{file} must contain records of {dtype}, as the other shards, got {shard.dtype}")
        files.append(file)
        lengths.append(len(shard))
    if dtype is None:
        raise FileNotFoundError(f"no shards of a token cache in {folder}")
    return files, lengths, dtype


def split_epochs(indices: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Split indices ``(epoch, item)`` into epochs (B,) and items (B,); plain items are those of epoch 0."""
    array = np.asarray(indices)
    if array.ndim == 2:
        return array[:, 0], array[:, 1]
    return np.zeros_like(array), array


class TokenCacheDataModule(pl.LightningDataModule):
    """The data module of ``data=cached``: batches of ``TokenCacheDataset.batch``.

    Args:
        root: folder of the cache, as written by ``clipgen-encode``.
        batch_size: images per batch on each device.
        num_workers: number of processes that read; 0 reads in the main process.
        seed: seed of the order.
        conditioning: what ``condition`` of a batch is. ``"clip"``: the CLIP embeddings of the images (B, E);
            ``"class"``: their one-hot classes (B, num_classes).

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: an argument is out of range, or the cache is damaged, not complete or without classes.
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        conditioning: str = "clip",
    ):
        super().__init__()
        if conditioning not in ("clip", "class"):
            raise ValueError(f"conditioning must be 'clip' or 'class', got {conditioning!r}")
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.manifest = read_manifest(self.root)
        num_classes = len(class_names_of(self.manifest, self.root)) if conditioning == "class" else None
        self.train = self._open_split("train", num_classes)
        self.val = self._open_split("val", num_classes) if self.manifest["images"]["val"] else None
        if batch_size < 1 or batch_size > len(self.train):
            raise ValueError(f"data.batch_size must be in [1, {len(self.train)}], got {batch_size}")

    def _open_split(self, split: str, num_classes: int | None) -> TokenCacheDataset:
        dataset = TokenCacheDataset(self.root / split, num_classes, self.manifest["codebook_size"])
        expected = self.manifest["images"][split]
        if len(dataset) != expected:
            raise ValueError(
                f"{self.root / split} must contain {expected} images, as the manifest says, got {len(dataset)}"
            )
        return dataset

    def train_dataloader(self) -> DataLoader[Any]:
        """Make the loader of shuffled, full batches."""
        sampler = ResumableSampler.for_trainer(self.trainer, self.train, self.batch_size, self.seed)
        return self._loader(self.train, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Make the loader of all validation images in order; [] if there are none."""
        if self.val is None:
            return []
        sampler = ValidationSampler.for_trainer(self.trainer, self.val, self.batch_size)
        return self._loader(self.val, sampler=sampler)

    def _loader(self, dataset: TokenCacheDataset, **options: Any) -> DataLoader[Any]:
        batches = BatchedDataset(dataset)
        return make_loader(batches, self.batch_size, self.num_workers, collate_fn=no_collate, **options)


class BatchedDataset(Dataset[Any]):
    """A split of a cache that returns whole batches to a DataLoader, which is much faster than collating samples."""

    def __init__(self, dataset: TokenCacheDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[Any]) -> dict[str, Tensor]:
        """Return a batch."""
        return self.dataset.batch(indices)


def no_collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch of a ``BatchedDataset`` as it is."""
    return batch
