"""Where the images of an evaluation come from: a system that draws, a folder of pictures, a data set."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipgen.data.chunks import index_ranges, iter_batches
from clipgen.data.decoding import UnusableImageError, decode_image, upright_size
from clipgen.data.folder import ImageFolder, find_images
from clipgen.data.shapes import ShapesDataset
from clipgen.data.source import ImageSource
from clipgen.data.webdataset import ImageShards
from clipgen.evaluation.captions import Caption, captions_of
from clipgen.evaluation.feature_store import Batch
from clipgen.hashing import hash_files
from clipgen.images import from_pil
from clipgen.pipeline import TextToImage

logger = logging.getLogger(__name__)
PIECE = 500  # images in a part: what a kill can lose
SHEETS = ("grid.png", "preview.png")  # what clipgen-sample writes beside its pictures
Draw = Callable[[list[str], list[int]], Tensor]  # captions, seeds -> images (B, 3, H, W) in [-1, 1]


class GeneratedImages:
    """Images that a system draws, one a caption, each from its own seed.

    Args:
        draw: captions and seeds -> images. identity: tells the system and its settings from others.
        batch_size: images asked for at once.
    """

    def __init__(self, draw: Draw, captions: Sequence[str], seed: int, identity: dict[str, Any], batch_size: int = 50):
        self.draw, self.captions, self.seed, self.batch_size = draw, list(captions), seed, batch_size
        self.pieces = index_ranges(len(self.captions), PIECE)
        digest = hashlib.sha256("\n".join(self.captions).encode()).hexdigest()[:16]
        self.identity = identity | {"captions": digest, "seed": seed, "images": len(self.captions)}

    def read(self, piece: range) -> Iterator[Batch]:
        for start in range(piece.start, piece.stop, self.batch_size):
            numbers = range(start, min(start + self.batch_size, piece.stop))
            captions = [self.captions[i] for i in numbers]
            yield self.draw(captions, [self.seed + i for i in numbers]), captions


def drawing(pipe: TextToImage, rerank_from: int = 1, **settings: Any) -> Draw:
    """How a pipeline draws; of ``rerank_from`` images a caption it hands over what its CLIP finds nearest."""

    def draw(captions: list[str], seeds: list[int]) -> Tensor:
        embeddings = pipe.encode_text(captions).repeat_interleave(rerank_from, dim=0)
        each = [seed * rerank_from + i for seed in seeds for i in range(rerank_from)]
        images = pipe.generate(embeddings, each, **settings)
        if rerank_from == 1:
            return images
        sought = pipe.clip.encode_text(captions).repeat_interleave(rerank_from, dim=0)
        best = pipe.clip_scores(images, sought).view(-1, rerank_from).argmax(dim=1)
        return images[best + rerank_from * torch.arange(len(seeds), device=best.device)]

    return draw


class FolderImages:
    """The pictures of a folder, whoever drew them: central squares, resized where they are not ``image_size`` already.

    Args:
        image_size: None: as the first picture. captions: see ``captions_of``; ``()``: none are needed.
        workers: threads that decode.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int | None = None,
        captions: Sequence[Caption] | None = (),
        batch_size: int = 50,
        workers: int = 4,
    ):
        self.root, self.batch_size, self.workers = Path(root).expanduser(), batch_size, workers
        self.files = [file for file in find_images(self.root) if Path(file).name not in SHEETS]
        if not self.files:
            raise ValueError(f"{root} must hold pictures, got none but sheets of them")
        self.first_size = self._size(self.files[0])
        self.image_size, self.warned = image_size or min(self.first_size), image_size is not None
        self.captions = [] if captions == () else captions_of(self.root, self.files, captions)
        self.pieces = index_ranges(len(self.files), PIECE)
        said = hashlib.sha256("\n".join(self.captions).encode()).hexdigest()[:16]
        content = hash_files([self.root / file for file in self.files])
        self.identity = {"pictures": content, "captions": said, "image_size": self.image_size}

    def read(self, piece: range) -> Iterator[Batch]:
        with ThreadPool(self.workers) as pool:
            for start in range(piece.start, piece.stop, self.batch_size):
                rows = slice(start, min(start + self.batch_size, piece.stop))
                yield torch.cat(pool.map(self._load, self.files[rows])), self.captions[rows]

    def _load(self, file: str) -> Tensor:
        if not self.warned and (size := self._size(file)) != self.first_size:
            self.warned = True
            logger.warning(
                "%s is %d x %d, and the first of %s %d x %d: the central squares of all are resized to %d x "
                "%d; --image-size names another",
                file,
                *size,
                self.root,
                *self.first_size,
                self.image_size,
                self.image_size,
            )
        with self._named(file):
            # Decoded as the images of ``RealImages`` are, so that a folder's distance from itself is 0.
            picture = decode_image(self.root / file, image_size=self.image_size)
        return from_pil(picture, self.image_size)

    def _size(self, file: str) -> tuple[int, int]:
        with self._named(file):
            return upright_size(self.root / file)

    @contextmanager
    def _named(self, file: str) -> Iterator[None]:
        try:
            yield
        except UnusableImageError as error:
            raise ValueError(f"{self.root / file} cannot be used as an image: {error}") from error


class RealImages:
    """The usable images of a data set, centre-cropped: what others are compared with.

    Args:
        name: a folder, tar shards (globs, braces) or ``"shapes"``. count, seed: of shapes, which are drawn.
    """

    def __init__(self, name: str, image_size: int, batch_size: int = 50, count: int = 10_000, seed: int = 1_000_003):
        self.batch_size = batch_size
        self.dataset: Any = open_dataset(name, image_size, count, seed)
        self.pieces = self.dataset.split_into_chunks(PIECE)
        self.identity = {"pictures": self.dataset.content_id(), "image_size": image_size}

    def read(self, piece: Any) -> Iterator[Batch]:
        return ((views[:, 0], []) for views, _ in iter_batches(self.dataset, piece, 1, self.batch_size))


def open_dataset(name: str, image_size: int, count: int, seed: int) -> ImageSource:
    """``"shapes"``, a folder, or shards."""
    if name == "shapes":
        return ShapesDataset(count, image_size, seed)
    if Path(name).expanduser().is_dir():
        return ImageFolder(name, image_size, train=False)
    return ImageShards(name, image_size, train=False)
