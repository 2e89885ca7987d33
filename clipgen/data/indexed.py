"""Images that are read by their number: what folders and tables of images have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clipgen.data.chunks import index_ranges
from clipgen.data.decoding import UnusableImageError, decode_image
from clipgen.data.parallel import parallel_map
from clipgen.data.skip_counter import SkipCounter
from clipgen.data.source import ImageCount, Views
from clipgen.data.transforms import val_transform
from clipgen.hashing import hashed_seed


class IndexedImages(Dataset[dict[str, Tensor]], ABC):
    """A map-style dataset of encoded images; a sample is {"images": (3, image_size, image_size) in [-1, 1]}.

    Index ``(epoch, i)`` selects image ``i``, whose crop and flip depend only on the seed, the epoch and the image. A
    plain index ``i``, as any DataLoader uses it, gives a new random crop every time. An unusable image is warned about
    once and replaced by the next usable image, so that the position of a run does not depend on the images that have
    turned out to be broken.
    """

    supports_epoch_index = True
    image_size: int
    seed: int
    transform: Callable[..., Tensor]
    skip_counter: SkipCounter

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def item_name(self, item: int) -> str:
        """Return the name of an image in log messages."""

    @abstractmethod
    def encoded_image(self, item: int) -> Path | bytes:
        """Return the file of an image, or its bytes.

        Raises:
            UnusableImageError: the image is missing.
        """

    @abstractmethod
    def label_of(self, item: int) -> int | None:
        """Return the class of an image; None without ``labels``.

        Raises:
            UnusableImageError: the image has no class.
        """

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor]:
        generator = None
        if isinstance(index, tuple):
            epoch, index = index
            generator = self._generator(epoch, index)
        # Indexing a range raises IndexError past the end, which ends a plain for loop.
        start = range(len(self))[index]
        for step in range(len(self)):
            item = (start + step) % len(self)
            try:
                return {"images": self.transform(self._decode(item), generator)}
            except UnusableImageError as error:
                self._skip(item, error)
        raise ValueError(f"{self.skip_counter.name} has no usable image left: {self.skip_counter}")

    def split_into_chunks(self, size: int) -> list[range]:
        """Return ranges of item indices."""
        return index_ranges(len(self), size)

    def augmented_views(self, chunk: Sequence[int], num_views: int) -> Iterator[Views]:
        """Yield ``num_views`` crops (num_views, 3, H, W) of each usable image, and its class; see ``ImageSource``."""
        crop = self.transform if num_views > 1 else val_transform(self.image_size)

        def load(item: int) -> Views | None:
            try:
                image = self._decode(item)
                label = self.label_of(item)
            except UnusableImageError as error:
                self._skip(item, error)
                return None
            crops = [crop(image, self._generator(view, item)) for view in range(num_views)]
            return torch.stack(crops), label

        return filter(None, parallel_map(load, chunk))

    def count_images(self) -> ImageCount:
        """Return the number of images."""
        return ImageCount(len(self))

    def _decode(self, item: int) -> Image.Image:
        return decode_image(self.encoded_image(item), image_size=self.image_size)

    def _skip(self, item: int, error: UnusableImageError) -> None:
        if self.skip_counter.skip(self.item_name(item), error):
            self.skip_counter.use(-1)

    def _generator(self, epoch: int, item: int) -> torch.Generator:
        return torch.Generator().manual_seed(hashed_seed(f"{self.seed} {epoch} {item}"))


def check_val_fraction(val_fraction: float, count: int, items: str, option: str = "data.val_fraction") -> None:
    """Raise ValueError if items cannot be split into a training and a validation side.

    Args:
        val_fraction: fraction of the validation side.
        count: number of items.
        items: name of the items in the error.
        option: name of the option in the error.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"{option} must be in [0, 1), got {val_fraction}")
    if val_fraction > 0 and count < 2:
        raise ValueError(f"{option} must be 0 for fewer than two {items}, got {val_fraction}")
