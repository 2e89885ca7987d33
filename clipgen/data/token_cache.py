"""The encoded cache: what stage 2 learns from, computed once. Indices and CLIP embeddings in memory-mapped shards.

A split's folder holds ``shard-000000.npy``, ... and nothing else; each is an array of records, one an image:
``indices`` (A, T) of the smallest unsigned type that holds them, and ``embedding`` (A, E) in fp16, for A augmentations;
where the source has classes and was asked for them, also ``label``.
The folder above holds ``manifest.json``, and the frozen models as a run folder does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipgen.checkpoint.model_folder import codebook_rows
from clipgen.data.samplers import ResumableSampler
from clipgen.data.validation_sampler import ValidationSampler
from clipgen.files import one_line, read_json

MANIFEST = "manifest.json"
SPLITS = ("train", "val")
SIZES = ("codebook_size", "num_tokens", "clip_dim")
MAX_MANIFEST = 2**25  # bytes
MAX_CLASSES = 2**16  # without names, if there are not as many images
MAX_CODES = 2**20  # of a tokenizer without a table of codes
MAX_LABEL = 2**31 - 1  # of a record


def record_dtype(
    augmentations: int, num_tokens: int, codebook_size: int, clip_dim: int, labels: bool = False
) -> np.dtype:
    """The type of one image's record."""
    fields: list[Any] = [
        ("indices", index_type(codebook_size), (augmentations, num_tokens)),
        ("embedding", "<f2", (augmentations, clip_dim)),
    ]
    return np.dtype(fields + [("label", "<i4")] * labels)


def index_type(codebook_size: int) -> np.dtype:
    """Return the smallest type that holds every index."""
    return np.dtype("<u2" if codebook_size <= 2**16 else "<u4")


def read_manifest(root: str | Path) -> dict[str, Any]:
    """What ``clipgen-encode`` wrote about a cache.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is not finished.
    """
    path = Path(root).expanduser() / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no encoded cache in {root}: there is no {MANIFEST}; `clipgen-encode output={root}`")
    if path.stat().st_size > MAX_MANIFEST:
        raise ValueError(f"{path} is damaged: a manifest must have at most {MAX_MANIFEST} bytes")
    try:
        manifest = read_json(path)
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: it is nested too deeply") from error
    if "images" not in manifest:
        raise ValueError(f"the encoded cache {root} is not finished; the same clipgen-encode command goes on with it")
    check_manifest(manifest, path)
    check_records(manifest, path)
    return manifest


def check_manifest(manifest: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless a manifest holds the types and sizes that ``clipgen-encode`` writes."""
    images = manifest["images"]
    if not isinstance(images, dict) or not all(is_count(images.get(split), 0) for split in SPLITS):
        raise ValueError(f"{path} is damaged: images must be the numbers of {' and '.join(SPLITS)}, got {images!r:.60}")
    if images["train"] < 1:
        raise ValueError(f"{path} is damaged: images must have at least one of train, got {images['train']}")
    for name in SIZES:
        if not is_count(manifest.get(name), 1):
            value = manifest.get(name)
            raise ValueError(f"{path} is damaged: {name} must be a whole number of at least 1, got {value!r:.60}")
    for name in ("vqgan", "clip"):
        if not isinstance(manifest.get(name), str):
            raise ValueError(f"{path} is damaged: {name} must be a text, got {manifest.get(name)!r:.60}")
    check_classes(manifest, path)


def check_classes(manifest: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless the classes of a manifest, where it has some, are as many as they can be."""
    names, number = manifest.get("class_names"), manifest.get("num_classes")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path} is damaged: class_names must be a list of texts, got {names!r:.60}")
    if number is None:
        return
    most = len(names) if names else most_classes(sum(manifest["images"][split] for split in SPLITS))
    if not is_count(number, 1) or number > most:
        raise ValueError(f"{path} is damaged: num_classes must be in [1, {most}], got {number!r:.60}")


def most_classes(images: int) -> int:
    """Return how many classes without names a cache of so many images may have."""
    return max(images, MAX_CLASSES)


def is_count(value: Any, least: int) -> bool:
    """Return True for a whole number of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_records(manifest: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless the sizes of a manifest are those of the first records and of the tokenizer beside it."""
    shards = (open_shard(shard) for shard in sorted((path.parent / "train").glob("shard-*.npy")))
    dtype = next((shard.dtype for shard in shards if len(shard)), None)
    rows, size = codebook_rows(path.parent / "vqgan"), manifest["codebook_size"]
    if dtype is not None:
        for name, field in (("num_tokens", "indices"), ("clip_dim", "embedding")):
            held = dtype[field].shape[1]
            if manifest[name] != held:
                raise ValueError(f"{path} is damaged: {name} must be {held}, as in the shards, got {manifest[name]}")
        if dtype["indices"].base != index_type(size):
            raise ValueError(f"{path} is damaged: codebook_size must fit {dtype['indices'].base}, got {size}")
    if rows is not None and size != rows:
        raise ValueError(f"{path} is damaged: codebook_size must be {rows}, as in the tokenizer, got {size}")
    if size > max(rows or 0, MAX_CODES):
        raise ValueError(f"{path} is damaged: codebook_size must be at most {MAX_CODES}, got {size}")


def open_shard(path: Path) -> np.ndarray:
    """The memory map of a shard's records; ValueError with its name where it is damaged."""
    try:
        found: Any = np.load(path, mmap_mode="r") if path.is_file() else None
        check_shard(found)
    except OSError:
        raise
    except Exception as error:  # a damaged header raises anything from TokenError to OverflowError
        raise ValueError(
            f"{path} is damaged ({one_line(error)}): delete it, and clipgen-encode makes it again"
        ) from error
    # numpy's map keeps the file open, torch's does not: of hundreds of shards a process could not open the rest
    content = torch.from_file(str(path), size=found.offset + found.nbytes, dtype=torch.uint8).numpy()
    records: np.ndarray = content[found.offset :].view(found.dtype)
    records.flags.writeable = False
    return records


def check_shard(shard: Any) -> None:
    """Raise ValueError unless an array consists of records as ``record_dtype`` makes them."""
    if not isinstance(shard, np.memmap) or shard.ndim != 1:
        raise ValueError("it holds no row of records")
    fields = shard.dtype.fields or {}
    kinds = {name: (field[0].base.str, len(field[0].shape)) for name, field in fields.items()}
    label = {"label": ("<i4", 0)} if "label" in kinds else {}
    if kinds not in [{"indices": (kind, 2), "embedding": ("<f2", 2)} | label for kind in ("<u2", "<u4")]:
        raise ValueError(f"its records must hold indices and embedding, got {shard.dtype!s:.100}")
    if not all(shard.dtype[name].shape[0] for name in ("indices", "embedding")):
        raise ValueError("its records hold no augmentation")


def class_names(manifest: dict[str, Any], root: str | Path) -> list[str]:
    """The classes of a cache's images by name; by number where the source knew no names.

    Raises:
        ValueError: it was made without classes.
    """
    if "num_classes" not in manifest:
        raise ValueError(f"the encoded cache {root} holds no labels: make one with `clipgen-encode data.labels=true`")
    return manifest.get("class_names") or [str(number) for number in range(manifest["num_classes"])]


class TokenCacheDataset(Dataset[dict[str, Tensor]]):
    """A split of a cache, by random access: ``{"indices": (T,) int64, "condition": (E,) unit norm}``.

    Item ``i`` of pass ``p`` through the data is asked for as ``(p, i)``, as ``TokenCacheDataModule`` does: passes take the
    augmentations in turn, each image beginning at another one. A plain ``i`` is of the first pass.

    Args:
        num_classes: if given, ``condition`` is the one-hot class (num_classes,) instead.
        codebook_size: bound of the indices; None does not check them.
    """

    counts_passes = True

    def __init__(self, folder: str | Path, num_classes: int | None = None, codebook_size: int | None = None):
        lengths: dict[Path, int] = {}
        dtype: np.dtype | None = None
        for file in sorted(Path(folder).glob("shard-*.npy")):
            shard = open_shard(file)
            if not len(shard):  # one without images knows no sizes
                continue
            lengths[file] = len(shard)
            dtype = dtype or shard.dtype
            if shard.dtype != dtype:
                raise ValueError(f"{file} must hold records of {dtype}, as the other shards, got {shard.dtype}")
        if not lengths:
            raise FileNotFoundError(f"no shards of an encoded cache in {folder}")
        self.files = list(lengths)
        self.ends = np.cumsum(list(lengths.values()))
        self.num_classes, self.codebook_size = num_classes, codebook_size

    @cached_property
    def shards(self) -> list[np.ndarray]:
        """The memory maps, opened in the process that reads them."""
        return [open_shard(file) for file in self.files]

    def __getstate__(self) -> dict[str, Any]:  # a worker opens its own
        return {key: value for key, value in self.__dict__.items() if key != "shards"}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.batch([index]).items()}

    def __getitems__(self, indices: Sequence[Any]) -> list[dict[str, Tensor]]:  # DataLoader asks for whole batches here
        found = self.batch(indices)
        return [{name: value[row] for name, value in found.items()} for row in range(len(indices))]

    def batch(self, indices: Sequence[Any]) -> dict[str, Tensor]:
        """Many items at once: ``{"indices": (B, T), "condition": (B, E)}``."""
        asked = np.asarray(indices)
        turn, item = asked.T if asked.ndim == 2 else (0, asked)
        if outside := [int(i) for i in (item.min(), item.max()) if not 0 <= i < len(self)]:
            raise IndexError(f"index must be in [0, {len(self)}), got {outside[0]}")
        shard = np.searchsorted(self.ends, item, side="right")
        row = item - np.where(shard > 0, self.ends[shard - 1], 0)
        first = self.shards[0]
        view = (turn + item) % first.dtype["indices"].shape[0]
        condition = "embedding" if self.num_classes is None else "label"
        found = {}
        for name in ("indices", condition):
            kind = first.dtype[name]
            found[name] = np.empty((len(item), *kind.shape[1:]), kind.base)
            for number in np.unique(shard):
                here = shard == number
                place = (row[here], view[here]) if kind.shape else row[here]
                found[name][here] = self.shards[number][name][place]
        self._check(found, shard)
        return {
            "indices": torch.from_numpy(found["indices"].astype(np.int64)),
            "condition": self._condition(torch.from_numpy(found[condition])),
        }

    def embeddings(self, count: int = 10_000) -> Tensor:
        """What images are conditioned on, (N, E): all of them, or about ``count``, evenly spread; for a ``EmbeddingProjector``."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        found: Tensor = self.batch(range(0, len(self), max(len(self) // count, 1)))["condition"]
        return found

    def _check(self, found: dict[str, np.ndarray], shard: np.ndarray) -> None:
        """Raise ValueError, naming the shard, if a record holds what no model can be trained on."""
        for name, bound in (("indices", self.codebook_size), ("label", self.num_classes)):
            if bound is None or name not in found:
                continue
            wrong = (found[name] < 0) | (found[name] >= bound)
            if wrong.any():
                value = found[name][wrong][0]
                self._refuse(shard, wrong, f"{name} must be in [0, {bound}), got {value}")
        if "embedding" in found:
            wrong = ~np.isfinite(found["embedding"])
            if wrong.any():
                self._refuse(shard, wrong, "embeddings must be finite, got NaN or infinity")

    def _refuse(self, shard: np.ndarray, wrong: np.ndarray, reason: str) -> None:
        row = int(np.argwhere(wrong)[0][0])
        file = self.files[shard[row]]
        raise ValueError(f"{file} is damaged ({reason}): delete it, and clipgen-encode makes it again")

    def _condition(self, found: Tensor) -> Tensor:
        if self.num_classes is None:
            return F.normalize(found.float(), dim=-1)  # fp16 rounds the length too
        return F.one_hot(found.long(), self.num_classes).float()


class TokenCacheDataModule(pl.LightningDataModule):
    """The data of ``data=cached``: batches of ``TokenCacheDataset.batch``.

    Args:
        root: the cache, as ``clipgen-encode`` leaves it.
        batch_size: images in a batch, on each device. num_workers: processes that read; 0 reads in the main one.
        seed: of the order.
        conditioning: what ``condition`` of a batch is. ``"clip"``: the images' CLIP embeddings; ``"class"``: their
            one-hot classes (B, num_classes).

    Raises:
        ValueError: an argument is out of range, or a cache without classes is asked for them.
    """

    def __init__(
        self, root: str | Path, batch_size: int, num_workers: int = 0, seed: int = 0, conditioning: str = "clip"
    ):
        super().__init__()
        self.root, self.batch_size, self.num_workers, self.seed = Path(root).expanduser(), batch_size, num_workers, seed
        self.manifest = read_manifest(self.root)
        if conditioning not in ("clip", "class"):
            raise ValueError(f"conditioning must be 'clip' or 'class', got {conditioning!r}")
        classes = len(class_names(self.manifest, self.root)) if conditioning == "class" else None
        splits = [name for name in SPLITS if self.manifest["images"][name]]
        codes = self.manifest["codebook_size"]
        self.datasets = {name: TokenCacheDataset(self.root / name, classes, codes) for name in splits}
        for name, dataset in self.datasets.items():
            if len(dataset) != (count := self.manifest["images"][name]):
                raise ValueError(
                    f"{self.root / name} must hold {count} images, as the manifest says, got {len(dataset)}"
                )
        if batch_size < 1 or batch_size > len(self.datasets["train"]):
            raise ValueError(f"batch_size must be in [1, {len(self.datasets['train'])}], got {batch_size}")

    def train_dataloader(self) -> DataLoader[Any]:
        dataset = self.datasets["train"]
        order = ResumableSampler.for_trainer(self.trainer, dataset, self.batch_size, self.seed)
        return self._loader(dataset, sampler=order, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if "val" not in self.datasets:
            return []
        dataset = self.datasets["val"]
        return self._loader(dataset, sampler=ValidationSampler.for_trainer(self.trainer, dataset, self.batch_size))

    def _loader(self, dataset: TokenCacheDataset, **options: Any) -> DataLoader[Any]:
        collate: Any = as_is
        return DataLoader(
            Batches(dataset),
            self.batch_size,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )


class Batches(Dataset[Any]):
    """A split in whole batches, which need no collation."""

    def __init__(self, dataset: TokenCacheDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[Any]) -> dict[str, Tensor]:
        return self.dataset.batch(indices)


def as_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """``Batches`` are whole: there is nothing to collate."""
    return batch
