"""Use webdataset shards, tar files of images, as an iterable dataset."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.gopen import gopen
from webdataset.utils import pytorch_worker_info

from clipgen.data.class_names import read_names
from clipgen.data.datamodule import ImageDataModule
from clipgen.data.decoding import UnusableImageError, decode_image
from clipgen.data.parallel import parallel_map
from clipgen.data.skip_counter import SkipCounter
from clipgen.data.source import ImageCount, Views
from clipgen.data.tar_reader import Member, Sample, count_samples, group_samples, is_tar, read_members
from clipgen.data.transforms import train_transform, val_transform
from clipgen.data.urls import expand_urls, is_remote
from clipgen.hashing import hash_files, hashed_seed

# So many consecutive unusable images mean that the source is wrong.
_MAX_CONSECUTIVE_SKIPS = 1_000
# Each worker's stream is reseeded after so many images, which bounds what must be read again on resume.
_SEGMENT_IMAGES = 100_000
# Limit of the shuffle buffer, however large the images are.
_SHUFFLE_BYTES = 1 << 29
# The shuffle buffer starts to yield when it holds so many samples.
_SHUFFLE_START = 100


class ImageShards(IterableDataset[dict[str, Any]]):
    """Stream of the images in tar shards; a sample is {"images": (3, image_size, image_size) in [-1, 1]}.

    Training chooses shards at random, with replacement, and never ends. Each rank and worker has its own random order,
    so that none runs out of images before the others. Validation reads every image once; the images are split between
    ranks and workers by shard if there are enough shards, else by image.

    Construction checks local shards: each must be a tar file, and one of them must hold a usable image. Broken content
    is skipped, warned about once and counted: a corrupt image, which the next one replaces in training, or the rest of
    a shard after the position at which it is damaged. Training raises ValueError if no shard holds an image, or if 1000
    consecutive images are unusable.

    Args:
        urls: paths, http(s) URLs and `pipe:` commands, with braces (`train-{000000..000009}.tar`); paths also with
            `*`, `?`, `[...]`. A list, or one string separated by commas; a string that is one command is not separated.
        image_size: height and width of the images in pixels.
        train: endless and shuffled, with random crop and flip; else every image once, with center crop.
        flip: mirror half of the training images.
        shuffle: size of the training's shuffle buffer, in undecoded images.
        labels: add "label", the integer in the sample's `.cls` file; a sample without a label is then unusable.
        seed: seed of the choice of shards, of the shuffling and of the crops.
        class_names: names of the classes, if they are known.

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
        self.image_size = image_size
        self.train = train
        self.shuffle = shuffle
        self.labels = labels
        self.seed = seed
        self.class_names = class_names
        self.transform = train_transform(image_size, flip) if train else val_transform(image_size)
        self.skip_counter = SkipCounter(urls if isinstance(urls, str) else ", ".join(urls))
        self.urls = expand_urls(urls)
        self._epoch = 0
        # Set by a resume: batches of this epoch that the run has had already, and their size.
        self._batches_done = 0
        self._batch_size = 0
        self._check_shards()

    def _check_shards(self) -> None:
        """Raise ValueError if a local shard is not a tar file, or if all shards are local and no image is usable."""
        local_urls = [url for url in self.urls if not is_remote(url)]
        for url in local_urls:
            if not is_tar(Path(url)):
                raise ValueError(f"{url} must be a tar file, got {os.path.getsize(url)} bytes of another type")
        samples = chain.from_iterable(map(self._read_shard, local_urls))
        all_local = len(local_urls) == len(self.urls)
        if all_local and not any(map(self._decode, samples)):
            raise ValueError(f"{self.skip_counter.name} must hold a usable image, got {self.skip_counter}")
        self.skip_counter.restart()

    def resume(self, epoch: int, batches: int, batch_size: int) -> None:
        """Start the next iteration after `batches` batches of an epoch.

        Some shards are read again for this, but no images are decoded.
        """
        self._epoch = epoch
        self._batches_done = batches
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._training_samples() if self.train else self._validation_samples()

    # ---------------------------------------------------------------------------------------------- as an ImageSource

    def split_into_chunks(self, size: int) -> list[str]:
        """Return the shards; `size` has no effect."""
        return self.urls

    def augmented_views(self, chunk: str, num_views: int) -> Iterator[Views]:
        """Yield `num_views` crops (num_views, 3, H, W) of each usable image, and its class; see `ImageSource`."""
        crop = self.transform if num_views > 1 else val_transform(self.image_size)
        shard_name = os.path.basename(chunk)

        def load(numbered_sample: tuple[int, Sample]) -> Views | None:
            number, sample = numbered_sample
            decoded = self._decode(sample)
            if decoded is None:
                return None
            image, label = decoded
            crops: list[Tensor] = []
            for view in range(num_views):
                seed = hashed_seed(f"{self.seed} {shard_name} {view} {number}")
                crops.append(crop(image, torch.Generator().manual_seed(seed)))
            return torch.stack(crops), label

        def image_bytes(numbered_sample: tuple[int, Sample]) -> int:
            return len(numbered_sample[1].image)

        return filter(None, parallel_map(load, enumerate(self._read_shard(chunk)), image_bytes))

    def file_names(self) -> list[str]:
        """Return the URLs of the shards."""
        return self.urls

    def content_id(self) -> str:
        """Return a hash of the bytes of all shards."""
        return hash_files(map(Path, self.urls))

    def count_images(self) -> ImageCount | None:
        """Return an estimate from the first shard; None if it is not a local file."""
        return estimate_images(self.urls)

    # ------------------------------------------------------------------------------------------------------- training

    def _training_samples(self) -> Iterator[dict[str, Any]]:
        """Return the endless stream of this rank and worker, from where the run stands."""
        rank, _, worker, num_workers = pytorch_worker_info()
        info = get_worker_info()
        # Differs between iterators, also if workers are started again for each epoch.
        base_seed = info.seed - worker if info else 0
        # Workers deliver batches in turn, and worker 0 delivers the first batch after a resume. So it continues the
        # stream of the worker whose turn it would have been, and so on.
        stream_worker = (worker + self._batches_done) % num_workers
        # Stream i has delivered the batches i, i + num_workers, i + 2 num_workers, ...
        batches_of_stream = len(range(stream_worker, self._batches_done, num_workers))
        name = f"{self.seed} {rank} {stream_worker} {self._epoch} {base_seed}"
        start = batches_of_stream * self._batch_size
        self._epoch += 1
        self._batches_done = 0
        return self._stream(name, start)

    def _stream(self, name: str, start: int) -> Iterator[dict[str, Any]]:
        """Yield the samples of a stream from number `start` on.

        A stream is a sequence of segments of `_SEGMENT_IMAGES` samples, each with its own seed, so that only the
        segment in which a resumed run stands has to be read again.
        """
        first_segment, offset = divmod(start, _SEGMENT_IMAGES)
        for segment in count(first_segment):
            samples = self._segment(random.Random(f"{name} {segment}"), offset)
            yield from islice(samples, _SEGMENT_IMAGES - offset)
            offset = 0

    def _segment(self, rng: random.Random, offset: int) -> Iterator[dict[str, Any]]:
        """Yield the samples of an endless segment from number `offset` on.

        Every file of the shards, usable or not, gives one sample: an unusable image is replaced by another crop of the
        next usable one. So the number of a sample is known without decoding, and a resume decodes nothing that it
        skips.
        """
        # Each file gets its crop's seed, also the skipped ones: the random state must not depend on the offset.
        seeded = ((sample, rng.getrandbits(48)) for sample in shuffled(self._random_samples(rng), self.shuffle, rng))
        pending_seeds: list[int] = []
        for sample, seed in islice(seeded, offset, None):
            pending_seeds.append(seed)
            decoded = self._decode(sample)
            if decoded:
                for crop_seed in pending_seeds:
                    yield self._make_sample(*decoded, torch.Generator().manual_seed(crop_seed))
                pending_seeds.clear()
            elif len(pending_seeds) == _MAX_CONSECUTIVE_SKIPS:
                raise ValueError(
                    f"{self.skip_counter.name} must hold usable images, got {_MAX_CONSECUTIVE_SKIPS} consecutive "
                    f"unusable ones: {self.skip_counter}"
                )

    def _random_samples(self, rng: random.Random) -> Iterator[Sample]:
        """Yield the samples of shards that are chosen at random, without end."""
        empty_shards: set[str] = set()
        num_shards = len(set(self.urls))
        while len(empty_shards) < num_shards:
            url = rng.choice(self.urls)
            empty_shards.add(url)
            for sample in self._read_shard(url):
                empty_shards.discard(url)
                yield sample
        raise ValueError(
            f"{self.skip_counter.name} must hold images, got {len(self.urls)} shards without any: {self.skip_counter}"
        )

    # ----------------------------------------------------------------------------------------------------- validation

    def _validation_samples(self) -> Iterator[dict[str, Any]]:
        rank, world_size, worker, num_workers = pytorch_worker_info()
        self.skip_counter.restart()
        for sample in self._share_of_samples(rank * num_workers + worker, world_size * num_workers):
            decoded = self._decode(sample)
            if decoded:
                yield self._make_sample(*decoded)
        # With workers, only the main process knows when the last one has finished.
        if get_worker_info() is None:
            self.skip_counter.log_summary()

    def _share_of_samples(self, reader: int, num_readers: int) -> Iterator[Sample]:
        """Return the samples of one of several readers: whole shards if there are enough, else every n-th sample."""
        if len(self.urls) >= num_readers:
            return chain.from_iterable(map(self._read_shard, self.urls[reader::num_readers]))
        all_samples = chain.from_iterable(map(self._read_shard, self.urls))
        return islice(all_samples, reader, None, num_readers)

    # -------------------------------------------------------------------------------------------------------- reading

    def _read_shard(self, url: str) -> Iterator[Sample]:
        return group_samples(self._members(url), url, self.skip_counter)

    def _members(self, url: str) -> Iterator[Member]:
        """Yield the files of a shard; what follows damage is counted and skipped."""
        stream = None
        try:
            if not is_remote(url) and not Path(url).is_file():
                raise ValueError("not a regular file")
            stream = gopen(url) if is_remote(url) else open(url, "rb")  # noqa: SIM115, closed below
            yield from read_members(stream, url, self.skip_counter)
        except Exception as error:
            # Anything can go wrong; the files before it are good, and the other shards may be.
            reason = str(error) or type(error).__name__
            self.skip_counter.skip(url, UnusableImageError("broken shard", f"what came before is used; {reason}"))
        finally:
            # Closing a command whose output was not read to the end fails.
            with suppress(OSError):
                if stream:
                    stream.close()

    def _decode(self, sample: Sample) -> tuple[Image.Image, int | None] | None:
        """Return the image, and its class with `labels`; None if it is unusable, which is counted."""
        try:
            image = decode_image(sample.image, image_size=self.image_size)
            return image, parse_label(sample) if self.labels else None
        except UnusableImageError as error:
            self.skip_counter.skip(f"{sample.url}: {sample.name}", error)
            return None

    def _make_sample(self, image: Image.Image, label: int | None, generator: Any = None) -> dict[str, Any]:
        self.skip_counter.use()
        sample: dict[str, Any] = {"images": self.transform(image, generator)}
        if label is not None:
            sample["label"] = label
        return sample


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
    """Make the data module of `data=webdataset`; arguments as in `ImageShards` and `ImageDataModule`.

    `val_urls` may be None. `class_names` is a file for `read_names`: the names of the numbers in the `.cls` files.
    """
    names = read_names(class_names) if class_names else None
    train = ImageShards(
        train_urls, image_size, train=True, flip=flip, shuffle=shuffle, labels=labels, seed=seed, class_names=names
    )
    val = ImageShards(val_urls, image_size, train=False, labels=labels) if val_urls else None
    return ImageDataModule(train, val, batch_size, num_workers, seed=seed)


def estimate_images(urls: list[str]) -> ImageCount | None:
    """Estimate the number of images in shards from the first one; None if it is not a local file."""
    if not urls or is_remote(urls[0]) or not Path(urls[0]).is_file():
        return None
    return ImageCount(count_samples(Path(urls[0])) * len(urls), len(urls))


def shuffled(samples: Iterator[Sample], size: int, rng: random.Random) -> Iterator[Sample]:
    """Shuffle samples in a buffer of `size` samples, and of at most 512 MB.

    As webdataset's shuffle, it starts to yield when it holds 100 samples, and reads two per yielded sample until the
    buffer is full.
    """
    buffer: list[Sample] = []
    buffer_bytes = 0
    for sample in samples:
        buffer.append(sample)
        buffer_bytes += len(sample.image)
        if len(buffer) < size and buffer_bytes < _SHUFFLE_BYTES:
            second = next(samples, None)
            if second:
                buffer.append(second)
                buffer_bytes += len(second.image)
        while len(buffer) >= min(_SHUFFLE_START, size) or buffer_bytes >= _SHUFFLE_BYTES:
            chosen = _pop_random(buffer, rng)
            buffer_bytes -= len(chosen.image)
            yield chosen
            if buffer_bytes < _SHUFFLE_BYTES:
                break
    while buffer:
        yield _pop_random(buffer, rng)


def _pop_random(buffer: list[Sample], rng: random.Random) -> Sample:
    """Remove and return a random sample; the last one takes its place."""
    index = rng.randint(0, len(buffer) - 1)
    chosen = buffer[index]
    buffer[index] = buffer[-1]
    buffer.pop()
    return chosen


def parse_label(sample: Sample) -> int:
    """Return the class of a sample.

    Raises:
        UnusableImageError: the sample has no `.cls` file, or it does not hold a class number.
    """
    if sample.label is None:
        raise UnusableImageError("without label", f"there is no {Path(sample.name).stem}.cls")
    try:
        label = int(sample.label)
    except ValueError as error:
        raise UnusableImageError("without label", str(error)) from error
    if not 0 <= label < 2**31:
        raise UnusableImageError("without label", f"it must be in [0, 2**31), got {label}")
    return label
