"""Running CLIP and VQ-GAN once over a data source, into the cache that ``data.encoded`` reads."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import clipgen
from clipgen.checkpoint import model_folder
from clipgen.checkpoint.safe_load import State, below
from clipgen.clip import FrozenCLIP, find_folder
from clipgen.data.chunks import Batch, pieces, read, source_files
from clipgen.data.token_cache import MANIFEST, SPLITS, open_shard, record_dtype
from clipgen.files import atomic_write, read_json, write_json
from clipgen.models.config import AutoencoderConfig, QuantizerConfig, as_config, model_settings
from clipgen.run_folder import save_frozen
from clipgen.vqgan import OPTIONAL_PARTS, VQGAN

logger = logging.getLogger(__name__)


def encode(
    root: str | Path,
    data: Any,
    vqgan: VQGAN,
    clip: FrozenCLIP,
    settings: dict[str, Any],
    *,
    augmentations: int = 1,
    shard_size: int = 10_000,
    batch_size: int = 64,
    rank: int = 0,
    world_size: int = 1,
    advance: Callable[[int], None] = lambda count: None,
) -> bool:
    """Encode the training and validation images of a data module; what is there already stays.

    Each shard is a function of the settings alone and appears whole or not at all: killed at any moment and called
    again, the cache ends with the same bytes. Processes share the shards by rank and do not talk.

    Args:
        root: folder of the cache. data: ``ImageDataModule``. settings: what identifies the source, for the manifest.
        augmentations: crops and flips of each training image; 1 is the centre crop. Validation has that alone.
        shard_size: images in a shard; tar files are taken as they are. batch_size: images at a time.
        advance: called with a number of images when they are done, found ones included.

    Returns:
        Whether the cache is whole now; else other processes have not finished.

    Raises:
        ValueError: the folder holds a cache made with other settings, or the images do not suit the models.
    """
    root = Path(root)
    manifest = manifest_of(settings, data, vqgan, clip, augmentations, shard_size)
    begin(root, manifest, vqgan, clip)
    every = []
    for split, dataset, views in (("train", data.train, augmentations), ("val", data.val, 1)):
        if dataset is None:
            continue
        parts = pieces(dataset, shard_size)
        paths = [root / split / f"shard-{i:06d}.npy" for i in range(len(parts))]
        for path, part in list(zip(paths, parts))[rank::world_size]:
            if path.is_file():
                advance(len(open_shard(path)))
            else:
                encode_shard(path, counted(read(dataset, part, views, batch_size), advance), vqgan, clip)
        every += paths
    if whole := all(path.is_file() for path in every):  # asked at the end: whoever is last finishes
        finish(root, manifest)
    return whole


def manifest_of(
    settings: dict[str, Any], data: Any, vqgan: VQGAN, clip: FrozenCLIP, augmentations: int, shard_size: int
) -> dict[str, Any]:
    """What decides the bytes of a cache, and so identifies it."""
    manifest = settings | {
        "clipgen": clipgen.__version__,
        "vqgan": vqgan_identity(vqgan),
        "clip": clip_identity(clip.model_name, clip.pretrained),
        "codebook_size": vqgan.codebook_size,
        "clip_dim": clip.embed_dim,
        "augmentations": augmentations,
        "shard_size": shard_size,
    }
    if names := [name for dataset in (data.train, data.val) for name in source_files(dataset)]:
        manifest["files"] = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    if getattr(data.train, "labels", False) and data.train.class_names:
        manifest["class_names"] = data.train.class_names
    return manifest


def counted(batches: Iterator[Batch], advance: Callable[[int], None]) -> Iterator[Batch]:
    """The same batches, each told when the next is asked for."""
    for batch in batches:
        yield batch
        advance(len(batch[0]))


@torch.inference_mode()
def encode_shard(path: Path, batches: Iterator[Batch], vqgan: VQGAN, clip: FrozenCLIP) -> None:
    """Write one shard."""
    start, rows = time.perf_counter(), []
    for images, labels in batches:
        flat = images.flatten(0, 1).to(vqgan.device)
        indices = vqgan.encode(flat).flatten(1).cpu().numpy()
        embedding = clip.encode_image(flat).cpu().numpy()
        labelled = labels[0] is not None
        kind = record_dtype(images.shape[1], indices.shape[1], vqgan.codebook_size, embedding.shape[1], labelled)
        row = np.empty(len(images), kind)
        if labelled:
            row["label"] = labels
        row["indices"] = indices.reshape(row["indices"].shape)
        row["embedding"] = embedding.reshape(row["embedding"].shape)
        rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = np.concatenate(rows) if rows else np.empty(0, record_dtype(1, 1, vqgan.codebook_size, 1))
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.save(file, found)
    seconds = time.perf_counter() - start
    logger.info("%s: %d images, %.0f a second", path, len(found), len(found) / seconds)


def begin(root: Path, manifest: dict[str, Any], vqgan: VQGAN, clip: FrozenCLIP) -> None:
    """Write the manifest and the frozen models, or make sure that those which are there are the same."""
    path = root / MANIFEST
    for patience in (1, 2, 4, 8, 0):
        if path.is_file():
            return check_cache(root, read_json(path), manifest)
        try:
            root.mkdir(parents=True, exist_ok=True)
            save_frozen(root, vqgan, clip)
            return write_json(path, manifest)
        except OSError as error:  # another process may be writing the same
            if not patience or error.errno not in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):
                raise
            time.sleep(patience)


def check_cache(root: Path, found: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Raise ValueError, naming the first difference, where a cache was made with other settings."""
    if other := [key for key in manifest if found.get(key) != json.loads(json.dumps(manifest[key]))]:
        key = other[0]
        raise ValueError(
            f"{root} holds a cache made with {key}={found.get(key)}, not {manifest[key]}; give another output"
        )


def finish(root: Path, manifest: dict[str, Any]) -> None:
    """Complete the manifest with what was found."""
    clear_away(root)
    shards = {split: [open_shard(path) for path in sorted((root / split).glob("shard-*.npy"))] for split in SPLITS}
    images = {split: sum(map(len, found)) for split, found in shards.items()}
    if not images["train"]:
        raise ValueError(f"the source of {root} must hold a usable image, got none")
    kind = next(shard.dtype for shard in shards["train"] if len(shard))
    found = {"num_tokens": kind["indices"].shape[1], "bytes_per_image": kind.itemsize, "images": images}
    if "label" in (kind.names or ()):
        found["num_classes"] = count_classes(root, [*shards["train"], *shards["val"]], manifest.get("class_names"))
    write_json(root / MANIFEST, manifest | found)


def clear_away(root: Path) -> None:
    """Remove the parts of shards and of the tokenizer that killed processes left: when all shards are there, nobody
    writes either any more."""
    for shard in root.glob("*/.shard-*.partial"):
        shard.unlink(missing_ok=True)
    for tokenizer in root.glob(".vqgan-*"):
        shutil.rmtree(tokenizer, ignore_errors=True)


def count_classes(root: Path, shards: list[np.ndarray], names: list[str] | None) -> int:
    """How many classes a cache has: as many as there are names, or as its largest label needs."""
    largest = max(int(shard["label"].max()) for shard in shards if len(shard))
    if names and largest >= len(names):
        raise ValueError(f"the labels of {root} must be below {len(names)}, the number of class names, got {largest}")
    return len(names) if names else largest + 1


# ----------------------------------------------------------------------------------------------------- which models


def vqgan_identity(vqgan: VQGAN) -> str:
    """A hash of what decides a tokenizer's indices, the same for all files that hold it."""
    return identity(vqgan.hparams, vqgan.active_model.state_dict())


def saved_identity(path: str | Path) -> str:
    """``vqgan_identity`` of a file or folder, without building the network."""
    arguments, state = model_folder.load(path, "VQGAN")
    prefix = next((p for p in ("ema.module.", "autoencoder.") if any(k.startswith(p) for k in state)), "")
    return identity(arguments, {k: v for k, v in below(prefix, state).items() if not k.startswith(OPTIONAL_PARTS)})


def identity(arguments: Mapping[str, Any], state: State) -> str:
    """A hash of a tokenizer's arguments and weights, but for its count of idle codes."""
    weights = model_folder.fingerprint(
        {name: tensor for name, tensor in state.items() if name != "quantize.batches_since_use"}
    )
    settings = {
        "autoencoder": model_settings(as_config(AutoencoderConfig, arguments["autoencoder"])),
        "quantizer": model_settings(as_config(QuantizerConfig, arguments["quantizer"])),
    }
    return hashlib.sha256((json.dumps(settings) + weights).encode()).hexdigest()[:16]


def clip_identity(model_name: str, pretrained: str | None) -> str:
    """A CLIP's name and tag; for folders and files a hash of the weights."""
    if folder := find_folder(model_name):
        files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pth"))
    else:
        files = [file for file in [Path(pretrained or "").expanduser()] if file.is_file()]
    weights = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    return hashlib.sha256(weights).hexdigest()[:16] if files else f"{model_name} {pretrained}"
