"""Webdataset shards, tar files of images, as an iterable dataset."""

from __future__ import annotations

import json
import os
import random
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.gopen import gopen
from webdataset.handlers import reraise_exception
from webdataset.tariterators import group_by_keys, tar_file_iterator
from webdataset.utils import pytorch_worker_info

from clipgen.data.datamodule import ImageDataModule
from clipgen.data.decoding import EXTENSIONS, UnusableImageError, decode_image
from clipgen.data.parallel import ahead
from clipgen.data.skip_counter import SkipCounter
from clipgen.data.transforms import train_transform, val_transform
from clipgen.data.urls import expand_urls, is_remote
from clipgen.files import read_text
from clipgen.hashing import hashed_seed

# This many unusable images in a row mean that the source is wrong.
_PATIENCE = 1_000
# After so many images a worker's stream begins anew: a resume late in a training reads no more than these again.
_STRETCH = 100_000


class ImageShards(IterableDataset[dict[str, Any]]):
    """Stream of the images in tar shards; a sample is {"images": (3, image_size, image_size) in [-1, 1]}.

    Training draws a shard at random, with replacement, reads it, and goes on without end; each rank and worker has
    its own random order, so that nobody runs dry before the others. Validation reads every image once, split between
    ranks and workers by shard where there are enough of them, else by image.

    Construction looks at local shards: each must be a tar file, and one of them must hold a usable image. What is
    broken is skipped, warned about once and counted: a corrupt image, whose place in training the next one takes, or
    the rest of a shard that breaks off. Training raises ValueError when no shard holds an image, or when 1000 images on
    end are unusable.

    Args:
        urls: paths, http(s) URLs and `pipe:` commands, with braces (`train-{000000..000009}.tar`); paths also with
            `*`, `?`, `[...]`. A list, or one string separated by commas; a string that is one command is not separated.
        image_size: side of the square images.
        train: endless and shuffled, with random crop and flip; else every image once, with centre crop.
        flip: mirror half of the training images.
        shuffle: size of the buffer, of undecoded images, that training shuffles in.
        labels: add "label", the integer in the sample's `.cls` file; a sample without one is then unusable.
        seed: of the choice of shards and of the shuffling.
        class_names: what the labels stand for, where it is known.

    Raises:
        FileNotFoundError: a local shard does not exist, or nothing matches a pattern.
        ValueError: an argument is out of range, a local shard is not a tar file, or no image in them is usable.
    """

    def __init__(
        self,
        urls: str | list[str],
        image_size: int,
        train: bool,
        flip: bool = True,
        shuffle: int = 1000,
        labels: bool = False,
        seed: int = 0,
        class_names: list[str] | None = None,
    ) -> None:
        if shuffle < 0:
            raise ValueError(f"shuffle must be at least 0, got {shuffle}")
        self.image_size, self.train, self.shuffle, self.labels, self.seed = image_size, train, shuffle, labels, seed
        self.transform = train_transform(image_size, flip) if train else val_transform(image_size)
        self.tally = SkipCounter(urls if isinstance(urls, str) else ", ".join(urls))
        self.urls, self.class_names = expand_urls(urls), class_names
        self._epoch = 0
        self._had = (0, 0)  # batches of this epoch before a resume, and images in a batch
        self._check()

    def _check(self) -> None:
        """Raise ValueError if a local shard is not a tar file, or if all shards are local and no image is usable."""
        local = [url for url in self.urls if not is_remote(url)]
        for url in local:
            if not tarfile.is_tarfile(url):
                raise ValueError(f"{url} must be a tar file, got {os.path.getsize(url)} bytes that are none")
        samples = chain.from_iterable(map(self._read, local))
        if len(local) == len(self.urls) and not any(map(self._decode, samples)):
            raise ValueError(f"{self.tally.name} must hold a usable image, got {self.tally}")
        self.tally.restart()

    def resume(self, epoch: int, batches: int, batch_size: int) -> None:
        """Let training begin where a run stood: of its shards some are read again, and nothing is decoded."""
        self._epoch, self._had = epoch, (batches, batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._train() if self.train else self._validate()

    def views(self, url: str, count: int) -> Iterator[tuple[Tensor, int | None]]:
        """``count`` crops of each usable image of one shard, in order, (count, 3, H, W), 1: the centre crop; and its
        class where ``labels``."""
        crop = self.transform if count > 1 else val_transform(self.image_size)

        def load(numbered: tuple[int, dict[str, Any]]) -> tuple[Tensor, int | None] | None:
            number, sample = numbered
            if (decoded := self._decode(sample)) is None:
                return None
            seeds = [f"{self.seed} {os.path.basename(url)} {turn} {number}" for turn in range(count)]
            generators = [torch.Generator().manual_seed(hashed_seed(seed)) for seed in seeds]
            return torch.stack([crop(decoded[0], generator) for generator in generators]), decoded[1]

        return filter(None, ahead(load, enumerate(self._read(url))))

    def _train(self) -> Iterator[dict[str, Any]]:
        rank, _, worker, workers = pytorch_worker_info()
        info = get_worker_info()
        base = info.seed - worker if info else 0  # a new one for every iterator, also where workers start afresh
        (batches, batch_size), self._had = self._had, (0, 0)
        turn = (worker + batches) % workers  # workers take turns, batch by batch: a resume goes on with the next one's
        name = f"{self.seed} {rank} {turn} {self._epoch} {base}"
        self._epoch += 1
        return self._stretches(name, len(range(turn, batches, workers)) * batch_size)

    def _stretches(self, name: str, begin: int) -> Iterator[dict[str, Any]]:
        """The stream of a name from its n-th crop on."""
        first, had = divmod(begin, _STRETCH)
        for number in count(first):
            yield from islice(self._crops(random.Random(f"{name} {number}"), had), _STRETCH - had)
            had = 0

    def _crops(self, rng: random.Random, begin: int) -> Iterator[dict[str, Any]]:
        """A stretch from its n-th crop on. An unusable image leaves its crop to the next usable one, so that a resume
        need not decode what it passes by."""
        stream = wds.shuffle(self.shuffle, rng=rng)(self._resample(rng))
        seeds: list[int] = []  # of the crops that the next usable image gives
        for sample, seed in islice(((sample, rng.getrandbits(48)) for sample in stream), begin, None):
            seeds.append(seed)
            if decoded := self._decode(sample):
                yield from (self._sample(*decoded, torch.Generator().manual_seed(seed)) for seed in seeds)
                seeds.clear()
            elif len(seeds) == _PATIENCE:
                raise ValueError(
                    f"{self.tally.name} must hold usable images, got {_PATIENCE} others on end: {self.tally}"
                )

    def _resample(self, rng: random.Random) -> Iterator[dict[str, Any]]:
        barren: set[str] = set()
        while len(barren) < len(set(self.urls)):
            url = rng.choice(self.urls)
            barren.add(url)
            for sample in self._read(url):
                barren.discard(url)
                yield sample
        raise ValueError(f"{self.tally.name} must hold images, got {len(self.urls)} shards without any: {self.tally}")

    def _validate(self) -> Iterator[dict[str, Any]]:
        rank, world_size, worker, num_workers = pytorch_worker_info()
        part, parts = rank * num_workers + worker, world_size * num_workers
        by_shard = len(self.urls) >= parts
        samples = chain.from_iterable(map(self._read, self.urls[part::parts] if by_shard else self.urls))
        self.tally.restart()
        mine = samples if by_shard else islice(samples, part, None, parts)
        yield from (self._sample(*decoded) for decoded in map(self._decode, mine) if decoded)
        if get_worker_info() is None:  # else only the main process knows when the last worker has finished
            self.tally.summary()

    def _read(self, url: str) -> Iterator[dict[str, Any]]:
        """Yield the samples of a shard that have an image, as webdataset groups them: "__key__", "jpg", "cls", ..."""
        samples = group_by_keys(self._files(url), handler=lambda error: self._broken(url, error))
        return (sample for sample in samples if _image_key(sample))

    def _files(self, url: str) -> Iterator[dict[str, Any]]:
        stream = None
        try:
            stream = gopen(url) if is_remote(url) else open(url, "rb")  # noqa: SIM115, closed below
            for file in tar_file_iterator(stream, handler=reraise_exception):
                yield {**file, "__url__": url}
        except Exception as error:  # whatever went wrong, the files before it are good and the other shards may be
            self._broken(url, error)
        finally:
            with suppress(OSError):  # a command whose output is not read to the end fails
                if stream:
                    stream.close()

    def _broken(self, url: str, error: Exception) -> bool:
        self.tally.skip(url, UnusableImageError("broken shard", f"what came before is used; {error}"))
        return True

    def _decode(self, sample: dict[str, Any]) -> tuple[Image.Image, int | None] | None:
        """The picture, and its class where ``labels``; None where it is unusable, which is told."""
        try:
            image = decode_image(sample[_image_key(sample)], image_size=self.image_size)
            return image, _label(sample) if self.labels else None
        except UnusableImageError as error:
            self.tally.skip(_name(sample), error)
            return None

    def _sample(self, image: Image.Image, label: int | None, generator: Any = None) -> dict[str, Any]:
        self.tally.use()
        return {"images": self.transform(image, generator)} | ({} if label is None else {"label": label})


def shard_data(
    train_urls: str | list[str],
    val_urls: str | list[str] | None,
    image_size: int,
    batch_size: int,
    num_workers: int = 0,
    flip: bool = True,
    shuffle: int = 1000,
    seed: int = 0,
    labels: bool = False,
    class_names: str | None = None,
) -> ImageDataModule:
    """Make the data of a run from shards; arguments as in `ImageShards` and `ImageDataModule`. `val_urls` may be None.

    `class_names` is a file that `read_names` reads: what the numbers in the `.cls` files stand for.
    """
    names = read_names(class_names) if class_names else None
    train = ImageShards(
        train_urls, image_size, train=True, flip=flip, shuffle=shuffle, labels=labels, seed=seed, class_names=names
    )
    val = ImageShards(val_urls, image_size, train=False, labels=labels) if val_urls else None
    return ImageDataModule(train, val, batch_size, num_workers, seed=seed)


def read_names(path: str | Path) -> list[str]:
    """Names of classes from a file: a JSON list, or a name a line.

    Raises:
        ValueError: the file holds neither.
    """
    text = read_text(Path(path).expanduser())
    try:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        names = json.loads(text) if str(path).endswith(".json") else lines
    except ValueError as error:
        raise ValueError(f"{path} must hold a JSON list of class names: {error}") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} must hold a list of class names, got {text[:60]!r}")
    return names


def _image_key(sample: dict[str, Any]) -> str:
    """Find the image in a sample: "jpg" rather than "seg.png", else the first that is named like an image, else ""."""
    keys = [key for key in sample if f".{key}".endswith(EXTENSIONS)]
    return min(keys, key=lambda key: key.count("."), default="")


def _name(sample: dict[str, Any]) -> str:
    return f"{sample['__url__']}: {sample['__key__']}.{_image_key(sample)}"


def _label(sample: dict[str, Any]) -> int:
    try:
        if (label := int(sample["cls"])) < 0:
            raise ValueError(f"must be at least 0, got {label}")
        return label
    except (KeyError, ValueError) as error:
        raise UnusableImageError("without label", f"{type(error).__name__} {error}") from error
