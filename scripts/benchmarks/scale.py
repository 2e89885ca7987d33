"""Memory and start-up of a training run on many images and ranks, as one process of it would see them."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from clipgen.data.folder import split_files
from clipgen.data.packed_strings import PackedStrings
from clipgen.data.samplers import ResumableSampler
from clipgen.data.shard_order import Position, ShardOrder
from clipgen.data.token_cache import MAX_MAPS, TokenCacheDataset, record_dtype

IMAGES_PER_SHARD = 10_000
BATCH_SIZE = 64
NUM_WORKERS = 8
# The largest folder of single files that is recommended.
MAX_NAMES = 10_000_000


def run_scale(args: argparse.Namespace) -> dict[str, Any]:
    """Measure each number of images, every part in a process of its own."""
    if sys.platform != "linux":
        raise SystemExit(f"benchmark scale must run on Linux, whose /proc it reads, got {sys.platform}")
    parts: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = []
    for images in args.images:
        shards = images // IMAGES_PER_SHARD
        parts += [
            (f"order of {images:.0e} images", measure_order, (images, args.ranks)),
            (f"{shards} tar shards", measure_shards, (shards, args.ranks)),
            (f"{shards} shards of a token cache", measure_cache, (shards, args.scratch)),
        ]
    names = min(max(args.images), MAX_NAMES)
    parts.append((f"names of {names:.0e} files", measure_names, (names,)))
    rows = {}
    for title, function, arguments in parts:
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
    """Return the result of a function, its seconds, and the increase of private and of peak memory, in GiB.

    The seconds of CPU time depend less on other processes.
    """
    import resource

    before = anonymous_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    cpu_start = time.process_time()
    result = function()
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - cpu_start
    increase = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    return result, {
        "seconds": seconds,
        "CPU seconds": cpu_seconds,
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
    seen = sampler.batches * sampler.items_per_step / images
    return row | {"distinct": len(set(items)) / len(items), "share seen per epoch": seen}


def measure_names(count: int) -> dict[str, float]:
    """Store the names of files as a folder does, and hold out two percent of them."""
    names = (f"{i // 1000:07d}/{i:010d}.jpg" for i in range(count))
    sides, row = measured(lambda: split_files(PackedStrings(names), 0.02))
    assert sum(map(len, sides)) == count
    return row


def measure_cache(shards: int, scratch: Path | None) -> dict[str, float]:
    """Open a token cache of sparse files, and then more of its shards than a process keeps mapped."""
    dtype = record_dtype(1, 256, 16384, 512)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        header = shard_header(dtype)
        for number in range(shards):
            with open(f"{folder}/shard-{number:06d}.npy", "wb") as file:
                file.write(header)
                file.truncate(len(header) + IMAGES_PER_SHARD * dtype.itemsize)
        cache, row = measured(lambda: TokenCacheDataset(folder))
        # Random access does this in the long run.
        for number in range(min(shards, MAX_MAPS + 1000)):
            cache.shard(number)
        maps = len(Path("/proc/self/maps").read_text().splitlines())
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    return row | {"maps": maps, "system's limit of maps": limit}


def shard_header(dtype: np.dtype) -> bytes:
    """Return the first bytes of a shard."""
    with tempfile.TemporaryFile() as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (IMAGES_PER_SHARD,)}
        )
        file.seek(0)
        return file.read()


def measure_shards(shards: int, ranks: int) -> dict[str, float]:
    """Compute which share of the images all ranks together see in as many steps as one epoch has."""
    order = ShardOrder(shards, "0", [IMAGES_PER_SHARD] * shards)
    position = Position.start(ranks, NUM_WORKERS)
    _, row = measured(lambda: next(order._segments(position, position.num_readers - 1, None)))
    seen = np.zeros(shards)
    slices = order._slices(0, position.num_readers)
    share = shards * IMAGES_PER_SHARD / position.num_readers
    for reader in range(position.num_readers):
        left = share
        for shard_slice in slices[reader :: position.num_readers]:
            size = IMAGES_PER_SHARD / shard_slice.step
            seen[shard_slice.shard] += min(size, left)
            left = max(left - size, 0)
    return row | {"readers": position.num_readers, "share seen per epoch": seen.sum() / (shards * IMAGES_PER_SHARD)}
