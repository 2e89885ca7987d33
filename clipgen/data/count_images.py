"""How many images a data set holds, without reading them."""

from __future__ import annotations

import tarfile
from contextlib import suppress
from typing import Any, NamedTuple


class Count(NamedTuple):
    """Number of images in a data set."""

    images: int
    shards: int = 0  # above 0: estimated from the first of so many

    def __str__(self) -> str:
        return (
            f"about {self.images} in {self.shards} shards (estimated from the first)"
            if self.shards
            else f"{self.images}"
        )


def count_images(dataset: Any) -> Count | None:
    """Return the size of a data set; None if there is no data set, or if it can only be known by reading it all."""
    from torch.utils.data import IterableDataset

    if dataset is None:
        return None
    if not isinstance(dataset, IterableDataset):
        return Count(len(dataset))
    return count_shards(getattr(dataset, "urls", []))


def count_shards(urls: list[str]) -> Count | None:
    """Estimate the images in tar shards by those in the first; None if it is not a local file."""
    from clipgen.data.decoding import EXTENSIONS
    from clipgen.data.urls import is_remote

    if not urls or is_remote(urls[0]):
        return None
    samples = set()
    with suppress(OSError, tarfile.TarError), tarfile.open(urls[0]) as shard:  # of a shard that breaks off, the rest
        for member in shard:
            if member.name.lower().endswith(EXTENSIONS):
                samples.add(member.name.rpartition("/")[2].partition(".")[0])
    return Count(len(samples) * len(urls), len(urls))
