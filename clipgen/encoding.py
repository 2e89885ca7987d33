"""Running CLIP and VQ-GAN once over a data source, into the cache that ``data.encoded`` reads."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import clipgen
from clipgen.clip import FrozenCLIP, find_folder
from clipgen.data.encoded import MANIFEST, SPLITS, open_shard, read_json, record
from clipgen.data.shards import ImageShards
from clipgen.frozen import save_frozen
from clipgen.vqgan import VQGAN
from clipgen.weights import checkpoint as files
from clipgen.weights.safe import State, below

logger = logging.getLogger(__name__)
Batch = tuple[Tensor, list["int | None"]]  # images (B, A, 3, H, W), classes


def encode(
    root: str | Path, data: Any, vqgan: VQGAN, clip: FrozenCLIP, settings: dict[str, Any], *, augmentations: int = 1,
    shard_size: int = 10_000, batch_size: int = 64, rank: int = 0, world_size: int = 1,
) -> bool:  # fmt: skip
    """Encode the training and validation images of a data module; what is there already stays.

    Each shard is a function of the settings alone and appears whole or not at all: killed at any moment and called
    again, the cache ends with the same bytes. Processes share the shards by rank and do not talk.

    Args:
        root: folder of the cache. data: ``ImageData``. settings: what identifies the source, for the manifest.
        augmentations: crops and flips of each training image; 1 is the centre crop. Validation has that alone.
        shard_size: images in a shard; tar files are taken as they are. batch_size: images at a time.

    Returns:
        Whether the cache is whole now; else other processes have not finished.

    Raises:
        ValueError: the folder holds a cache made with other settings, or the images do not suit the models.
    """
    root = Path(root)
    splits = {"train": (data.train, augmentations), "val": (data.val, 1)}
    manifest = settings | {
        "clipgen": clipgen.__version__, "vqgan": vqgan_identity(vqgan.tokenizer.state_dict()),
        "clip": clip_identity(clip.model_name, clip.pretrained), "codebook_size": vqgan.codebook_size,
        "clip_dim": clip.embed_dim, "augmentations": augmentations, "shard_size": shard_size,
    }  # fmt: skip
    if names := [name for dataset in (data.train, data.val) for name in names_of(dataset)]:
        manifest["files"] = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    if getattr(data.train, "labels", False) and data.train.class_names:
        manifest["class_names"] = data.train.class_names
    begin(root, manifest, vqgan, clip)
    whole = True
    for split, (dataset, views) in splits.items():
        if dataset is None:
            continue
        parts = pieces(dataset, shard_size)
        paths = [root / split / f"shard-{i:06d}.npy" for i in range(len(parts))]
        for path, part in list(zip(paths, parts))[rank::world_size]:
            if not path.is_file():
                encode_shard(path, read(dataset, part, views, batch_size), vqgan, clip)
        whole = whole and all(path.is_file() for path in paths)
    if whole:
        finish(root, manifest)
    return whole


def names_of(dataset: Any) -> list[str]:
    """The files that a dataset reads, in order: shards are numbered by them."""
    return [*getattr(dataset, "files", ()), *getattr(dataset, "urls", ())]


def pieces(dataset: Any, size: int) -> list[Any]:
    """What becomes one shard each: the tar files of a stream; runs of ``size`` items of anything else."""
    if isinstance(dataset, ImageShards):
        return dataset.urls
    return [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]


def read(dataset: Any, piece: Any, views: int, batch_size: int) -> Iterator[Batch]:
    """Batches (B, A, 3, H, W) of the usable images of a piece, in order, with their B classes where there are some."""
    images = dataset.views(piece, views)
    while batch := list(islice(images, max(batch_size // views, 1))):
        pictures, labels = zip(*batch)
        yield torch.stack(pictures), list(labels)


@torch.inference_mode()
def encode_shard(path: Path, batches: Iterator[Batch], vqgan: VQGAN, clip: FrozenCLIP) -> None:
    """Write one shard."""
    start, rows = time.perf_counter(), []
    for images, labels in batches:
        flat = images.flatten(0, 1).to(vqgan.device)
        indices = vqgan.encode(flat).flatten(1).cpu().numpy()
        embedding = clip.encode_image(flat).cpu().numpy()
        labelled = labels[0] is not None
        kind = record(images.shape[1], indices.shape[1], vqgan.codebook_size, embedding.shape[1], labelled)
        row = np.empty(len(images), kind)
        if labelled:
            row["label"] = labels
        row["indices"] = indices.reshape(row["indices"].shape)
        row["embedding"] = embedding.reshape(row["embedding"].shape)
        rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = np.concatenate(rows) if rows else np.empty(0, record(1, 1, vqgan.codebook_size, 1))
    with files.whole_file(path) as partial, partial.open("wb") as file:
        np.save(file, found)
    seconds = time.perf_counter() - start
    logger.info("%s: %d images, %.0f a second", path, len(found), len(found) / seconds)


def begin(root: Path, manifest: dict[str, Any], vqgan: VQGAN, clip: FrozenCLIP) -> None:
    """Write the manifest and the frozen models, or make sure that those which are there are the same."""
    path = root / MANIFEST
    if path.is_file():
        found = read_json(path)
        if other := [key for key in manifest if found.get(key) != json.loads(json.dumps(manifest[key]))]:
            key = other[0]
            raise ValueError(
                f"{root} holds a cache made with {key}={found.get(key)}, not {manifest[key]}; give another output"
            )
        return
    root.mkdir(parents=True, exist_ok=True)
    save_frozen(root, vqgan, clip)
    write_manifest(path, manifest)


def finish(root: Path, manifest: dict[str, Any]) -> None:
    """Complete the manifest with what was found."""
    shards = {split: [open_shard(path) for path in sorted((root / split).glob("shard-*.npy"))] for split in SPLITS}
    images = {split: sum(map(len, found)) for split, found in shards.items()}
    if not images["train"]:
        raise ValueError(f"the source of {root} must hold a usable image, got none")
    kind = next(shard.dtype for shard in shards["train"] if len(shard))
    found = {"num_tokens": kind["indices"].shape[1], "bytes_per_image": kind.itemsize, "images": images}
    if "label" in (kind.names or ()):
        found["num_classes"] = count_classes(root, manifest.get("class_names"))
    write_manifest(root / MANIFEST, manifest | found)


def count_classes(root: Path, names: list[str] | None) -> int:
    """How many classes a cache has: as many as there are names, or as its largest label needs."""
    shards = [open_shard(path) for split in SPLITS for path in (root / split).glob("shard-*.npy")]
    largest = max(int(shard["label"].max()) for shard in shards if len(shard))
    if names and largest >= len(names):
        raise ValueError(f"the labels of {root} must be below {len(names)}, the number of class names, got {largest}")
    return len(names) if names else largest + 1


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    with files.whole_file(path) as partial:
        partial.write_text(json.dumps(manifest, indent=2) + "\n")


def share() -> tuple[int, int]:
    """(rank, world_size) of this process, by torchrun, or by a SLURM array or step."""
    for rank, size, first in (("RANK", "WORLD_SIZE", ""), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT",
                              "SLURM_ARRAY_TASK_MIN"), ("SLURM_PROCID", "SLURM_NTASKS", "")):  # fmt: skip
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]) - int(os.environ.get(first, 0)), int(os.environ[size])
    return 0, 1


# ----------------------------------------------------------------------------------------------------- which models


def vqgan_identity(state: State) -> str:
    """A hash of what decides a tokenizer's indices, the same for all files that hold it."""
    return files.fingerprint({name: tensor for name, tensor in state.items() if name != "quantize.idle"})


def saved_identity(path: str | Path) -> str:
    """``vqgan_identity`` of a file or folder, without building the network."""
    _, state = files.load(path, "VQGAN")
    prefix = next((p for p in ("ema.module.", "autoencoder.") if any(k.startswith(p) for k in state)), "")
    tokenizer = below(prefix, state)
    return vqgan_identity({k: v for k, v in tokenizer.items() if not k.startswith(("discriminator.", "lpips."))})


def clip_identity(model_name: str, pretrained: str | None) -> str:
    """A CLIP's name and tag; for folders and files a hash of the weights."""
    folder = find_folder(model_name)
    weights = folder / "open_clip_model.safetensors" if folder else Path(pretrained or "").expanduser()
    if weights.is_file():
        return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    return f"{model_name} {pretrained}"
