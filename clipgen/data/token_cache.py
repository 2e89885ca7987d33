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

from clipgen.data.samplers import ResumableSampler
from clipgen.files import read_json

MANIFEST = "manifest.json"
SPLITS = ("train", "val")


def record_dtype(
    augmentations: int, num_tokens: int, codebook_size: int, clip_dim: int, labels: bool = False
) -> np.dtype:
    """The type of one image's record."""
    kind = "<u2" if codebook_size <= 2**16 else "<u4"
    fields: list[Any] = [
        ("indices", kind, (augmentations, num_tokens)),
        ("embedding", "<f2", (augmentations, clip_dim)),
    ]
    return np.dtype(fields + [("label", "<i4")] * labels)


def read_manifest(root: str | Path) -> dict[str, Any]:
    """What ``clipgen-encode`` wrote about a cache.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is not finished.
    """
    path = Path(root).expanduser() / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no encoded cache in {root}: there is no {MANIFEST}; `clipgen-encode output={root}`")
    manifest = read_json(path)
    if "images" not in manifest:
        raise ValueError(f"the encoded cache {root} is not finished; the same clipgen-encode command goes on with it")
    return manifest


def open_shard(path: Path) -> np.ndarray:
    """The memory map of a shard's records; ValueError with its name where it is damaged."""
    try:
        found = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and clipgen-encode makes it again") from error
    # numpy's map keeps the file open, torch's does not: of hundreds of shards a process could not open the rest
    content = torch.from_file(str(path), size=found.offset + found.nbytes, dtype=torch.uint8).numpy()
    records: np.ndarray = content[found.offset :].view(found.dtype)
    records.flags.writeable = False
    return records


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
        num_classes: where given, ``condition`` is the one-hot class (num_classes,) instead.
    """

    counts_passes = True

    def __init__(self, folder: str | Path, num_classes: int | None = None):
        found = sorted(Path(folder).glob("shard-*.npy"))
        lengths = {file: len(open_shard(file)) for file in found}
        self.files = [file for file in found if lengths[file]]  # one without images knows no sizes
        if not self.files:
            raise FileNotFoundError(f"no shards of an encoded cache in {folder}")
        self.ends = np.cumsum([lengths[file] for file in self.files])
        self.num_classes = num_classes

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
        self.datasets = {name: TokenCacheDataset(self.root / name, classes) for name in splits}
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
        return self._loader(self.datasets["val"]) if "val" in self.datasets else []

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
