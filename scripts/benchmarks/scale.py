"""Memory and start-up of a training on many images and ranks, as one process of it would see them."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from clipgen.data import token_cache
from clipgen.data.folder import PackedStrings
from clipgen.data.samplers import ResumableSampler
from clipgen.data.shard_order import Position, Segment, ShardOrder
from clipgen.data.token_cache import TokenCacheDataset, record_dtype

IMAGES_PER_SHARD = 10_000
BATCH_SIZE = 64
NUM_WORKERS = 8
# Limits of what is really written; the columns say how much that was.
MAX_NAMES = 2_000_000
MAX_CACHE_SHARDS = 20_000


def run_scale(args: argparse.Namespace) -> dict[str, Any]:
    """Measure each number of images, every part in a process of its own (on Linux)."""
    rows = {}
    for images in args.images:
        shards = images // IMAGES_PER_SHARD
        parts: dict[str, tuple[Callable[..., Any], Any]] = {
            "order of an epoch": (measure_order, (images, args.ranks)),
            "names of files": (measure_names, (min(images, MAX_NAMES),)),
            "token cache": (measure_cache, (min(shards, MAX_CACHE_SHARDS), args.scratch)),
            "tar shards": (measure_shards, (shards, args.ranks)),
        }
        for name, (function, arguments) in parts.items():
            title = f"{images:.0e} images, {name}"
            rows[title] = in_fork(function, *arguments)
            print_row(title, rows[title])
    return {"ranks": args.ranks, "rows": rows}


def print_row(title: str, row: dict[str, float]) -> None:
    """Print one measurement; the parts have different columns."""
    values = [f"{column} {value:.4g}" for column, value in row.items()]
    print(f"| {title} | {' | '.join(values)} |", flush=True)


def in_fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a copy of this process, which has its own peak memory and imports nothing again."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def measured(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return the result of a function, its seconds, and the increase of private and of peak memory, in GiB."""
    before = anonymous_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    increase = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    return result, {
        "seconds": seconds,
        "GiB held": (anonymous_memory() - before) / 2**20,
        "GiB peak": increase / 2**20,
    }


def anonymous_memory() -> int:
    """Return the memory of this process that is not backed by files, in KiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


class Numbers(Dataset[int]):
    """A dataset with a length."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def measure_order(images: int, ranks: int) -> dict[str, float]:
    """Iterate over a thousand batches of the last rank."""
    sampler = ResumableSampler(Numbers(images), BATCH_SIZE, seed=0, rank=ranks - 1, world_size=ranks)
    items, row = measured(lambda: list(islice(sampler, 1000 * BATCH_SIZE)))
    return row | {"distinct": len(set(items)) / len(items)}


def measure_names(count: int) -> dict[str, float]:
    """Store the names of files, and read a thousand of them."""
    names, row = measured(lambda: PackedStrings(f"{i // 1000:07d}/{i:010d}.jpg" for i in range(count)))
    for i in range(0, count, count // 1000):
        assert names[i].endswith(f"{i:010d}.jpg")
    return {"names": count} | row


def measure_cache(shards: int, scratch: Path | None) -> dict[str, float]:
    """Open a token cache of sparse files and read a hundred random batches."""
    dtype = record_dtype(1, 256, 16384, 512)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        header = shard_header(dtype)
        for number in range(shards):
            with open(f"{folder}/shard-{number:06d}.npy", "wb") as file:
                file.write(header)
                file.truncate(len(header) + IMAGES_PER_SHARD * dtype.itemsize)
        cache, row = measured(lambda: TokenCacheDataset(folder))
        rng = np.random.default_rng(0)
        start = time.perf_counter()
        for _ in range(100):
            cache._gather("indices", *random_records(cache, rng), np.zeros(BATCH_SIZE, np.int64))
        per_batch = (time.perf_counter() - start) / 100
        maps = len(Path("/proc/self/maps").read_text().splitlines())
    return {"shards": shards} | row | {"s/batch": per_batch, "maps": maps, "maps limit": token_cache.MAX_MAPS}


def shard_header(dtype: np.dtype) -> bytes:
    """Return the first bytes of a shard."""
    with tempfile.TemporaryFile() as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (IMAGES_PER_SHARD,)}
        )
        file.seek(0)
        return file.read()


def random_records(cache: TokenCacheDataset, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the shard and the row of random records."""
    return cache._locate(rng.integers(0, len(cache), BATCH_SIZE))


def measure_shards(shards: int, ranks: int) -> dict[str, float]:
    """Compute which share of the images all ranks together see in as many steps as one epoch has."""
    start = time.perf_counter()
    order = ShardOrder(shards, "0", [IMAGES_PER_SHARD] * shards)
    position = Position.start(ranks, NUM_WORKERS)
    segments = next(order._segments(position, position.num_readers - 1, None))
    first_seconds = time.perf_counter() - start
    seen = np.zeros(shards)
    pieces = order._pieces(0, position.num_readers)
    share = shards * IMAGES_PER_SHARD / position.num_readers
    for reader in range(position.num_readers):
        left = share
        for piece in pieces[reader :: position.num_readers]:
            size = IMAGES_PER_SHARD / piece.num_parts
            seen[piece.shard] += min(size, left)
            left = max(left - size, 0)
    assert isinstance(segments, Segment)
    return {
        "shards": shards,
        "readers": position.num_readers,
        "seconds": first_seconds,
        "share seen per epoch": seen.sum() / (shards * IMAGES_PER_SHARD),
    }
