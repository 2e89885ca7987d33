"""ImageSource: what a source of images offers to training, to the token cache and to evaluation.

A new source is added in two places:

1. ``clipgen/data/NAME.py``: a torch dataset with the members of ``ImageSource``, and a function that returns an
   ``ImageDataModule`` with one such dataset for training and one for validation. ``folder.py`` is the example of a
   map-style dataset (with a length), ``webdataset.py`` that of a stream (an ``IterableDataset``).
2. ``configs/data/NAME.yaml``: the function as ``_target_``, and its arguments as keys. Arguments named ``image_size``,
   ``batch_size``, ``num_workers``, ``seed`` and ``labels`` mean the same in all sources.

Training also accepts any other torch dataset of ``{"images": (3, H, W) in [-1, 1]}``; only the token cache and
evaluation require an ``ImageSource``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor
from torch.utils.data import IterableDataset

from clipgen.data.skip_counter import SkipCounter

# Item indices of a map-style dataset, or the URL of a shard.
Chunk = Any
Views = tuple[Tensor, "int | None"]  # augmentations of one image (A, 3, H, W), and its class


class ImageCount(NamedTuple):
    """Number of images in a dataset.

    Args:
        images: number of images.
        shards: 0 if the number is exact; else it is estimated from the first of this many shards.
    """

    images: int
    shards: int = 0

    def __str__(self) -> str:
        if self.shards:
            return f"about {self.images} in {self.shards} shards (estimated from the first)"
        return str(self.images)


@runtime_checkable
class ImageSource(Protocol):
    """One split of a source of images. As a dataset, its samples are ``{"images": (3, H, W) in [-1, 1]}``.

    The properties may be plain attributes.
    """

    @property
    def labels(self) -> bool:
        """Whether ``augmented_views`` returns classes."""
        ...

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, in the order of their numbers; None if they are not known."""
        ...

    @property
    def skip_counter(self) -> SkipCounter | None:
        """Counter of used and skipped images; None if no image can be unusable."""
        ...

    def split_into_chunks(self, size: int) -> Sequence[Chunk]:
        """Return chunks of about ``size`` images that can be read independently, in any order and by any process."""
        ...

    def augmented_views(self, chunk: Chunk, num_views: int) -> Iterator[Views]:
        """Yield the usable images of a chunk in order, each with ``num_views`` random crops; 1 is the center crop.

        The crops depend only on the seed of the source and the image, so that a cache can be reproduced.
        """
        ...

    def file_names(self) -> Sequence[str]:
        """Return the names of the files that are read, in order; none if images are generated."""
        ...

    def content_id(self) -> str:
        """Return a short string that changes if any of the images does."""
        ...

    def count_images(self) -> ImageCount | None:
        """Return the number of images, or None if it is known only after reading all of them."""
        ...


@runtime_checkable
class ResumableStream(Protocol):
    """A stream that can start in the middle. Map-style datasets are resumed by ``samplers.ResumableSampler``."""

    def resume(
        self, state: Mapping[str, Any] | None, batch_size: int, batches_per_epoch: int | None = None, batches: int = 0
    ) -> None:
        """Start the next iteration at a position.

        Args:
            state: what ``state_after`` returned; None is the start.
            batch_size: images per batch on each rank.
            batches_per_epoch: number of batches after which the stream is iterated again; None if it is not.
            batches: batches of the current epoch that the state includes.
        """
        ...

    def state_after(self, batches: int, num_workers: int) -> dict[str, Any]:
        """Return the position after a number of batches per rank since ``resume``; all ranks call this.

        It must contain plain values and tensors, and be valid for any number of ranks, workers and images per batch.
        """
        ...


def require_source(dataset: Any) -> ImageSource:
    """Return the dataset.

    Raises:
        TypeError: it does not implement ``ImageSource``.
    """
    if not isinstance(dataset, ImageSource):
        raise TypeError(
            f"{type(dataset).__name__} must implement clipgen.data.source.ImageSource to be encoded, "
            "as ImageFolder does"
        )
    return dataset


def count_images(dataset: Any) -> ImageCount | None:
    """Return the number of images of any dataset, or None for no dataset and for streams of unknown length."""
    if dataset is None:
        return None
    if isinstance(dataset, ImageSource):
        return dataset.count_images()
    if isinstance(dataset, IterableDataset):
        return None
    return ImageCount(len(dataset))


def supports_epoch_index(dataset: Any) -> bool:
    """Return whether a map-style dataset accepts indices ``(epoch, item)``, for augmentations that differ by epoch."""
    return getattr(dataset, "supports_epoch_index", False)


def skip_counter_of(dataset: Any) -> SkipCounter | None:
    """Return the skip counter of a source; None for any other dataset."""
    return dataset.skip_counter if isinstance(dataset, ImageSource) else None
