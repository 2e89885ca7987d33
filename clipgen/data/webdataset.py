"""Use webdataset shards, tar files of images, as an iterable dataset."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.gopen import gopen
from webdataset.utils import pytorch_worker_info

from clipgen.data.class_names import read_names
from clipgen.data.datamodule import ImageDataModule
from clipgen.data.decoding import UnusableImageError, decode_image
from clipgen.data.handover import from_rank_zero
from clipgen.data.parallel import parallel_map
from clipgen.data.shard_order import UNKNOWN, Position, Segment, ShardOrder, ShardSlice
from clipgen.data.skip_counter import SkipCounter
from clipgen.data.source import ImageCount, Views
from clipgen.data.tar_reader import Member, Sample, count_samples, group_samples, is_tar, read_members
from clipgen.data.transforms import train_transform, val_transform
from clipgen.data.urls import expand_urls, is_remote
from clipgen.hashing import hash_files, hashed_seed

logger = logging.getLogger(__name__)

# Number of consecutive unusable images from which the source is considered wrong.
_MAX_CONSECUTIVE_SKIPS = 1_000
# Limit of the shuffle buffer, however large the images are.
_SHUFFLE_BYTES = 1 << 29
# Number of samples in the shuffle buffer from which it yields.
_SHUFFLE_START = 100


@dataclass(frozen=True)
class ResumedStream:
    """The position to which a training stream was moved, and its progress since then.

    Args:
        batch_size: images per batch on each rank.
        sizes: tensor (S,) with the number of samples in each of S shards when the position was stored.
        batches_per_epoch: number of batches after which the stream is iterated again; None if it is not.
        batches_in_epoch: number of batches of the next epoch.
        batches_before: number of batches between the position and the next epoch.
        start: the position; None is the start of the first pass.
    """

    batch_size: int
    sizes: Any
    batches_per_epoch: int | None = None
    batches_in_epoch: int = 0
    batches_before: int = 0
    start: Position | None = None


class ImageShards(IterableDataset[dict[str, Any]]):
    """Stream of the images in tar shards; a sample is {"images": (3, image_size, image_size) in [-1, 1]}.

    Training never ends. It goes through the shards in random order, pass after pass; ranks and workers share the shards
    of a pass, see ``shard_order``. Validation reads every image once; the images are split between
    ranks and workers by shard if there are enough shards, else by image.

    Construction checks local shards: each must be a tar file, and one of them must contain a usable image. Broken
    content is skipped, warned about once and counted: a corrupt image, which the next one replaces in training, or the
    rest of a shard after the position at which it is damaged. Training raises ValueError if no shard contains an image,
    or if 1000 consecutive images are unusable.

    Args:
        urls: paths, http(s) URLs and ``pipe:`` commands, with braces (``train-{000000..000009}.tar``); paths also with
            ``*``, ``?``, ``[...]``. A list, or one string separated by commas; a string that is one command is not
            separated.
        image_size: height and width of the images in pixels.
        train: endless and shuffled, with random crop and flip; else every image once, with center crop.
        flip: mirror half of the training images.
        shuffle: size of the training's shuffle buffer, in undecoded images.
        labels: add "label", the integer in the sample's ``.cls`` file; a sample without a label is then unusable.
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
        # Number of samples in each shard, shared by all workers.
        self._sizes = torch.full((len(self.urls),), UNKNOWN, dtype=torch.int32).share_memory_()
        self._iteration = 0
        # Set by ``resume``.
        self._resumed: ResumedStream | None = None
        from_rank_zero(self._check_shards)

    def _check_shards(self) -> None:
        """Raise ValueError if a local shard is not a tar file, or if all shards are local and no image is usable."""
        local_urls = [url for url in self.urls if not is_remote(url)]
        for url in local_urls:
            if not is_tar(Path(url)):
                raise ValueError(f"{url} must be a tar file, got {os.path.getsize(url)} bytes of another type")
        samples = chain.from_iterable(map(self._read_shard, local_urls))
        all_local = len(local_urls) == len(self.urls)
        if all_local and not any(map(self._decode, samples)):
            raise ValueError(f"{self.skip_counter.name} must contain a usable image, got {self.skip_counter}")
        self.skip_counter.restart()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._training_samples() if self.train else self._validation_samples()

    # ---------------------------------------------------------------------------------------------- as an ImageSource

    def split_into_chunks(self, size: int) -> list[str]:
        """Return the shards; ``size`` has no effect."""
        return self.urls

    def augmented_views(self, chunk: str, num_views: int) -> Iterator[Views]:
        """Yield ``num_views`` crops (num_views, 3, H, W) of each usable image, and its class; see ``ImageSource``."""
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

    def resume(
        self, state: Mapping[str, Any] | None, batch_size: int, batches_per_epoch: int | None = None, batches: int = 0
    ) -> None:
        """Start the next iteration at a position.

        Some shards are read again for this, but no images are decoded.

        Args:
            state: what ``state_after`` returned; None is the start of the first pass.
            batch_size: images per batch on each rank.
            batches_per_epoch: number of batches after which the stream is iterated again; None if it is not.
            batches: batches of the current epoch that the state includes.
        """
        resumed = ResumedStream(batch_size, self._sizes, batches_per_epoch, (batches_per_epoch or 0) - batches)
        self._resumed = resumed
        if state is None:
            return
        if len(state["sizes"]) != len(self.urls):
            logger.warning(
                "%s has %d shards, not %d as when the checkpoint was written: training continues with a new pass",
                self.skip_counter.name,
                len(self.urls),
                len(state["sizes"]),
            )
            return
        sizes = torch.as_tensor(state["sizes"]).clone()
        self._resumed = replace(resumed, start=Position.from_dict(state["position"]), sizes=sizes)
        self._sizes.copy_(torch.maximum(self._sizes, sizes))

    def state_after(self, batches: int, num_workers: int) -> dict[str, Any]:
        """Return the position after a number of batches since ``resume``. All ranks must call this.

        Args:
            batches: batches on each rank.
            num_workers: workers of the loader, at least 1.
        """
        _, num_ranks, _, _ = pytorch_worker_info()
        resumed = self._resumed or ResumedStream(0, self._sizes)
        position = self._position(resumed, num_ranks, num_workers).after(batches, resumed.batch_size)
        return {"position": position.as_dict(), "sizes": max_over_ranks(self._sizes)}

    def _position(self, resumed: ResumedStream, num_ranks: int, num_workers: int) -> Position:
        """Return the position to which ``resume`` has moved the stream, for a number of readers."""
        if resumed.start is None:
            return Position.start(num_ranks, num_workers)
        # By the sizes in the checkpoint, because all processes must come to the same result at any time.
        order = ShardOrder(len(self.urls), str(self.seed), resumed.sizes)
        return order.moved_to(resumed.start, num_ranks, num_workers)

    def _position_of_next_epoch(self, resumed: ResumedStream, num_ranks: int, num_workers: int) -> Position:
        """Return the position at which the next iteration starts, and count the batches of its epoch."""
        position = self._position(resumed, num_ranks, num_workers).after(resumed.batches_before, resumed.batch_size)
        if resumed.batches_per_epoch is not None:
            # A copy of the stream must not move the original.
            self._resumed = replace(
                resumed,
                batches_before=resumed.batches_before + resumed.batches_in_epoch,
                batches_in_epoch=resumed.batches_per_epoch,
            )
        return position

    def _order(self, more_seed: str) -> ShardOrder:
        return ShardOrder(len(self.urls), f"{self.seed}{more_seed}", self._sizes)

    def _training_samples(self) -> Iterator[dict[str, Any]]:
        """Return the endless stream of this rank and worker, from the position of the run."""
        rank, num_ranks, worker, num_workers = pytorch_worker_info()
        self._warn_of_few_shards(num_ranks * num_workers, rank + worker)
        if self._resumed is None:
            # Iterated without a run: each iteration has its own order.
            info = get_worker_info()
            base_seed = info.seed - worker if info else 0
            order = self._order(f" {self._iteration}")
            noise = f"{base_seed} {rank}"
            self._iteration += 1
            position = Position.start(num_ranks, num_workers)
        else:
            order = self._order("")
            noise = ""
            position = self._position_of_next_epoch(self._resumed, num_ranks, num_workers)
        read = partial(self._read_segment, noise=noise)
        return self._decoded(order.samples(position, position.reader(rank, worker), read))

    def _warn_of_few_shards(self, num_readers: int, reader: int) -> None:
        if len(self.urls) < num_readers and reader == 0:
            logger.info(
                "%s: %d shards are fewer than the %d workers of all devices, so each is read by several of them",
                self.skip_counter.name,
                len(self.urls),
                num_readers,
            )

    def _read_segment(self, segment: Segment, noise: str) -> Iterator[tuple[Sample, int]]:
        """Yield the shuffled samples of a segment, each with the seed of its crop; decodes nothing."""
        rng = random.Random(f"{segment.name} {noise}")
        samples = chain.from_iterable(map(self._read_slice, segment.slices))
        for sample in shuffle_in_buffer(samples, self.shuffle, rng):
            yield sample, rng.getrandbits(48)

    def _read_slice(self, shard_slice: ShardSlice) -> Iterator[Sample]:
        """Yield the samples of a slice, and note the size of its shard."""
        size = 0
        for sample in self._read_shard(self.urls[shard_slice.shard]):
            if size % shard_slice.step == shard_slice.offset:
                yield sample
            size += 1
        self._sizes[shard_slice.shard] = size
        if not self._sizes.any():
            raise ValueError(
                f"{self.skip_counter.name} must contain images, got {len(self.urls)} shards without any: "
                f"{self.skip_counter}"
            )

    def _decoded(self, samples: Iterator[tuple[Sample, int]]) -> Iterator[dict[str, Any]]:
        """Decode samples.

        Every file of the shards, usable or not, gives one sample: an unusable image is replaced by another crop of the
        next usable one. So the number of a sample is known without decoding, and a resume decodes nothing that it
        skips.
        """
        pending_seeds: list[int] = []
        for sample, seed in samples:
            pending_seeds.append(seed)
            decoded = self._decode(sample)
            if decoded:
                for crop_seed in pending_seeds:
                    yield self._make_sample(*decoded, torch.Generator().manual_seed(crop_seed))
                pending_seeds.clear()
            elif len(pending_seeds) == _MAX_CONSECUTIVE_SKIPS:
                raise ValueError(
                    f"{self.skip_counter.name} must contain usable images, got {_MAX_CONSECUTIVE_SKIPS} consecutive "
                    f"unusable ones: {self.skip_counter}"
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
        """Return the image, and its class with ``labels``; None if it is unusable, which is counted."""
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
    """Make the data module of ``data=webdataset``; arguments as in ``ImageShards`` and ``ImageDataModule``.

    ``val_urls`` may be None. ``class_names`` is a file for ``read_names``: the names of the numbers in the ``.cls``
    files.
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


def max_over_ranks(values: Tensor) -> Tensor:
    """Return the element-wise maximum (S,) of a tensor (S,) over all ranks, on the CPU. All ranks must call this."""
    result = values.clone()
    if dist.is_available() and dist.is_initialized():
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        on_device = result.to(device)
        dist.all_reduce(on_device, dist.ReduceOp.MAX)
        result = on_device.cpu()
    return result


def shuffle_in_buffer(samples: Iterator[Sample], size: int, rng: random.Random) -> Iterator[Sample]:
    """Shuffle samples in a buffer of ``size`` samples, and of at most 512 MB.

    As webdataset's shuffle, it starts to yield when it contains 100 samples, and reads two per yielded sample until the
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
        UnusableImageError: the sample has no ``.cls`` file, or it does not contain a class number.
    """
    if sample.label is None:
        raise UnusableImageError("without label", f"there is no {Path(sample.name).stem}.cls next to it")
    try:
        label = int(sample.label)
    except ValueError as error:
        raise UnusableImageError("without label", str(error)) from error
    if not 0 <= label < 2**31:
        raise UnusableImageError("without label", f"it must be in [0, 2**31), got {label}")
    return label
