"""Precompute the token cache: run CLIP and the VQ-GAN once over all images of a data source."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import clipgen
from clipgen.checkpoint import clip_folder
from clipgen.clip import FrozenCLIP, find_folder
from clipgen.data.chunks import Batch, iter_batches
from clipgen.data.source import Chunk, ImageSource, require_source
from clipgen.data.token_cache import (
    MANIFEST,
    MAX_LABEL,
    RESULT_KEYS,
    SPLITS,
    first_record_dtype,
    max_classes,
    open_shard,
    open_split,
    record_dtype,
    write_shard,
)
from clipgen.frozen_models import save_frozen
from clipgen.hashing import hash_lines
from clipgen.storage.atomic_folder import clear_leftovers
from clipgen.storage.links import refuse_links
from clipgen.storage.resumable_store import ResumableStore
from clipgen.tokenizer_identity import vqgan_identity
from clipgen.vqgan import VQGAN

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardPlan:
    """Images of one shard of the cache.

    Args:
        source: source of the images.
        chunk: the images of the source that belong to the shard.
        num_views: number of augmentations of each image.
    """

    source: ImageSource
    chunk: Chunk
    num_views: int


def write_token_cache(
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
    """Encode the images of a data module into a token cache; return False if other processes have not finished.

    Each shard depends only on the settings and is written atomically, so an interrupted run can be restarted and
    produces identical bytes. Processes share the shards by rank, without communication.

    Args:
        root: folder of the cache.
        data: an ``ImageDataModule`` whose datasets implement ``ImageSource``.
        vqgan: computes the indices.
        clip: computes the embeddings.
        settings: description of the source, stored in the manifest.
        augmentations: number of random crops and flips of each training image; 1 takes the center crop, as validation.
        shard_size: images per shard. A tar file of a webdataset becomes one shard, regardless of its size.
        batch_size: images encoded at a time.
        rank: number of this process.
        world_size: number of processes that share the work.
        advance: called with the number of images done since the last call, including those in existing shards.

    Raises:
        ValueError: the folder contains another cache or a link that leaves it, or the models cannot encode the images.
        FileExistsError: the folder contains a model.
    """
    refuse_links(Path(root))
    identity = cache_identity(settings, data, vqgan, clip, augmentations, shard_size)
    store = ResumableStore(Path(root), MANIFEST, RESULT_KEYS)
    store.open(identity, lambda: save_models(store.folder, vqgan, clip))
    write = partial(encode_plan, vqgan=vqgan, clip=clip, batch_size=batch_size, advance=advance)

    def count_existing(path: Path) -> None:
        advance(len(open_shard(path)))

    plans = plan_shards(store.folder, data, shard_size, augmentations)
    store.write_missing(plans, write, count_existing, rank=rank, world_size=world_size)
    return finish_if_complete(store, plans, identity)


def encode_plan(
    path: Path, plan: ShardPlan, *, vqgan: VQGAN, clip: FrozenCLIP, batch_size: int, advance: Callable[[int], None]
) -> None:
    """Encode the images of a planned shard and write it; see ``write_token_cache``."""
    batches = iter_batches(plan.source, plan.chunk, plan.num_views, batch_size)
    encode_shard(path, report_progress(batches, advance), vqgan, clip)


def save_models(root: Path, vqgan: VQGAN, clip: FrozenCLIP) -> None:
    """Write the frozen models to the folder of a new cache.

    Raises:
        FileExistsError: the folder contains a trained model, whose tokenizer would be replaced.
    """
    for name in ("checkpoints", "transformer"):
        if (root / name).exists():
            raise FileExistsError(f"output must not contain a model, got {root} with {name}/: choose another output")
    save_frozen(root, vqgan, clip)


def cache_identity(
    settings: dict[str, Any], data: Any, vqgan: VQGAN, clip: FrozenCLIP, augmentations: int, shard_size: int
) -> dict[str, Any]:
    """Return everything that determines the bytes of a cache."""
    identity = settings | {
        "clipgen": clipgen.__version__,
        "vqgan": vqgan_identity(vqgan),
        "clip": clip_identity(clip.model_name, clip.pretrained),
        "codebook_size": vqgan.codebook_size,
        "clip_dim": clip.embed_dim,
        "augmentations": augmentations,
        "shard_size": shard_size,
    }
    train = require_source(data.train)
    files = [train.file_names()]
    if data.val is not None:
        files.append(require_source(data.val).file_names())
    if any(map(len, files)):
        identity["files"] = hash_lines(chain.from_iterable(files))
    if train.labels and train.class_names:
        identity["class_names"] = train.class_names
    return identity


def plan_shards(root: Path, data: Any, shard_size: int, augmentations: int) -> dict[Path, ShardPlan]:
    """Return the shards of both splits: the file of each, and the images that it contains."""
    plans = {}
    for split, source, num_views in (("train", data.train, augmentations), ("val", data.val, 1)):
        if source is None:
            continue
        for number, chunk in enumerate(source.split_into_chunks(shard_size)):
            plans[root / split / f"shard-{number:06d}.npy"] = ShardPlan(source, chunk, num_views)
    return plans


def report_progress(batches: Iterator[Batch], advance: Callable[[int], None]) -> Iterator[Batch]:
    """Yield the batches, reporting each to ``advance`` once it has been consumed."""
    for batch in batches:
        yield batch
        advance(len(batch[0]))


@torch.inference_mode()
def encode_shard(path: Path, batches: Iterator[Batch], vqgan: VQGAN, clip: FrozenCLIP) -> None:
    """Encode the images of one shard and write it."""
    start = time.perf_counter()
    record_batches = [encode_batch(path, images, labels, vqgan, clip) for images, labels in batches]
    if record_batches:
        records = np.concatenate(record_batches)
    else:
        records = np.empty(0, record_dtype(1, 1, vqgan.codebook_size, 1))
    write_shard(path, records)
    seconds = time.perf_counter() - start
    logger.info("%s: %d images, %.0f img/s", path, len(records), len(records) / seconds)


def encode_batch(
    path: Path, images: Tensor, labels: list[int | None], vqgan: VQGAN, clip: FrozenCLIP
) -> np.ndarray[Any, Any]:
    """Return the records (B,) of images (B, A, 3, H, W) with A augmentations each.

    Args:
        path: shard that the records are for, named in errors.
        images: images in [-1, 1].
        labels: classes of the B images, or B times None.
        vqgan: computes the indices.
        clip: computes the embeddings.
    """
    flat_images = images.flatten(0, 1).to(vqgan.device)
    indices = vqgan.encode(flat_images).flatten(1).cpu().numpy()
    embedding = clip.encode_image(flat_images).cpu().numpy()
    has_labels = labels[0] is not None
    check_encoded(path, indices, embedding, labels if has_labels else [], vqgan.codebook_size)
    dtype = record_dtype(images.shape[1], indices.shape[1], vqgan.codebook_size, embedding.shape[1], has_labels)
    records = np.empty(len(images), dtype)
    records["indices"] = indices.reshape(records["indices"].shape)
    records["embedding"] = embedding.reshape(records["embedding"].shape)
    if has_labels:
        records["label"] = labels
    return records


def check_encoded(
    path: Path, indices: np.ndarray, embedding: np.ndarray, labels: list[Any], codebook_size: int
) -> None:
    """Raise ValueError, naming the shard, if a value cannot be trained on, or does not fit into a record."""
    if indices.min() < 0 or indices.max() >= codebook_size:
        raise ValueError(f"indices of {path} must be in [0, {codebook_size}), got {indices.min()} to {indices.max()}")
    if not np.isfinite(embedding.astype("<f2")).all():
        raise ValueError(
            f"CLIP embeddings of {path} must be finite, got NaN or infinity; check the weights of the CLIP model"
        )
    for label in labels:
        if not 0 <= label <= MAX_LABEL:
            raise ValueError(f"labels of {path} must be in [0, {MAX_LABEL}], got {str(label)[:40]}")


def finish_if_complete(store: ResumableStore, plans: Collection[Path], identity: dict[str, Any]) -> bool:
    """Complete the manifest of a cache if all shards exist; return whether they do."""
    if not store.is_complete(plans):
        return False
    remove_leftovers(store.folder)
    # A generator keeps one shard mapped at a time; the system limits the number of maps.
    num_images = {split: sum(map(len, open_split(store.folder / split))) for split in SPLITS}
    if not num_images["train"]:
        raise ValueError(f"the source of {store.folder} must contain a usable image, got none")
    dtype = first_record_dtype(open_split(store.folder / "train"))
    assert dtype is not None
    results = {
        "num_tokens": dtype["indices"].shape[1],
        "bytes_per_image": dtype.itemsize,
        "images": num_images,
    }
    if "label" in (dtype.names or ()):
        results["num_classes"] = count_classes(store.folder, sum(num_images.values()), identity.get("class_names"))
    store.add_results(identity, results)
    return True


def remove_leftovers(root: Path) -> None:
    """Remove the partial files of interrupted processes. Once all shards exist, no process writes any more."""
    for shard in root.glob("*/.shard-*.partial"):
        shard.unlink(missing_ok=True)
    for tokenizer in root.glob(".vqgan-*"):
        shutil.rmtree(tokenizer, ignore_errors=True)
    for part in ("vqgan", "clip"):
        clear_leftovers(root / part)


def count_classes(root: Path, num_images: int, names: list[str] | None) -> int:
    """Return the number of classes of a cache: the number of names, or one more than the largest label."""
    shards = chain.from_iterable(open_split(root / split) for split in SPLITS)
    largest_label = max(int(shard["label"].max()) for shard in shards if len(shard))
    if names:
        if largest_label >= len(names):
            raise ValueError(
                f"the labels of {root} must be below {len(names)}, the number of class names, got {largest_label}"
            )
        return len(names)
    limit = max_classes(num_images)
    if largest_label >= limit:
        raise ValueError(
            f"the labels of {root} must be below {limit}, got {largest_label}; number the classes from 0, or name them "
            "in data.class_names"
        )
    return largest_label + 1


def clip_identity(model_name: str, pretrained: str | None) -> str:
    """Return a hash of the weights of a CLIP that is a local file or folder, else its model name and tag."""
    folder = find_folder(model_name)
    if folder:
        weights_file = clip_folder.weights_file(folder)
    else:
        weights_file = Path(pretrained or "").expanduser()
    if not weights_file.is_file():
        return f"{model_name} {pretrained}"
    file_digest = hashlib.sha256(weights_file.read_bytes()).digest()
    return hashlib.sha256(file_digest).hexdigest()[:16]
