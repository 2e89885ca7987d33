"""Sources of the images of an evaluation: a text-to-image system, a folder of images, a dataset."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from clipgen.data.chunks import index_ranges, iter_batches
from clipgen.data.decoding import UnusableImageError, decode_image, upright_size
from clipgen.data.folder import ImageFolder
from clipgen.data.folder_listing import find_images
from clipgen.data.packed_strings import PackedStrings
from clipgen.data.shapes import ShapesDataset
from clipgen.data.source import ImageSource
from clipgen.data.webdataset import ImageShards
from clipgen.evaluation.captions import Caption, captions_of_files, files_by_caption
from clipgen.evaluation.feature_store import ImageBatch
from clipgen.hashing import hash_files, hash_lines
from clipgen.images import from_pil
from clipgen.pipeline import TextToImage
from clipgen.sampling_params import SamplingParams

logger = logging.getLogger(__name__)
IMAGES_PER_PART = 500  # lost at most when an evaluation is interrupted
MAX_DEFAULT_SIZE = 1024  # a batch of larger images takes gigabytes, however small their files are
GRID_FILES = ("grid.png", "preview.png")  # written by clipgen-sample next to its images
GenerateFn = Callable[[list[str], list[int]], Tensor]  # captions, seeds -> images (B, 3, H, W) in [-1, 1]


class GeneratedImages:
    """Images that a system generates, one per caption, each from its own seed.

    Args:
        generate: function from captions and seeds to images.
        captions: one per image.
        seed: image i uses ``seed + i``.
        identity: distinguishes the system and its settings from others.
        batch_size: images that are requested at a time.
    """

    def __init__(
        self,
        generate: GenerateFn,
        captions: Sequence[str],
        seed: int,
        identity: dict[str, Any],
        batch_size: int = 50,
    ):
        self.generate = generate
        self.captions = list(captions)
        self.seed = seed
        self.batch_size = batch_size
        self.chunks = index_ranges(len(self.captions), IMAGES_PER_PART)
        self.identity = identity | {
            "captions": hash_lines(self.captions),
            "seed": seed,
            "images": len(self.captions),
        }

    def read(self, chunk: range) -> Iterator[ImageBatch]:
        """Generate the images of a chunk, batch by batch."""
        for start in range(chunk.start, chunk.stop, self.batch_size):
            numbers = range(start, min(start + self.batch_size, chunk.stop))
            captions = [self.captions[i] for i in numbers]
            yield self.generate(captions, [self.seed + i for i in numbers]), captions


def make_generate_fn(pipe: TextToImage, params: SamplingParams | None = None, rerank_from: int = 1) -> GenerateFn:
    """Return the function that generates a pipeline's images.

    Args:
        pipe: the pipeline.
        params: sampling parameters.
        rerank_from: number of candidates per caption, of which the one with the highest CLIP score is returned.
    """

    def generate(captions: list[str], seeds: list[int]) -> Tensor:
        embeddings = pipe.encode_text(captions).repeat_interleave(rerank_from, dim=0)
        candidate_seeds: list[int] = []
        for seed in seeds:
            candidate_seeds += range(seed * rerank_from, (seed + 1) * rerank_from)
        candidates = pipe.generate(embeddings, candidate_seeds, params)
        if rerank_from == 1:
            return candidates
        # The scores use CLIP's own embeddings, the conditions may have been moved towards images.
        text = pipe.clip.encode_text(captions).repeat_interleave(rerank_from, dim=0)
        best = pipe.clip_scores(candidates, text).view(-1, rerank_from).argmax(dim=1)
        return candidates[best + rerank_from * torch.arange(len(seeds), device=best.device)]

    return generate


class FolderImages:
    """The images of a folder, of any system: central squares, resized to ``image_size`` if they have another size.

    Args:
        root: the folder.
        image_size: height and width in pixels. None uses the short side of the first image.
        captions: captions of the images, see ``captions_of_files``; ``"embedded"``: the captions in the images or in
            text files next to them. None uses no captions.
        batch_size: images per batch.
        workers: number of decoding threads.
        all_captions: repeat each image for all of its captions; otherwise the first of each is taken.

    Raises:
        ValueError: the folder contains no image, or captions are missing.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int | None = None,
        captions: Sequence[Caption] | Literal["embedded"] | None = None,
        batch_size: int = 50,
        workers: int = 4,
        all_captions: bool = False,
    ):
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.workers = workers
        self.files = [file for file in find_images(self.root) if not is_grid(file)]
        if not self.files:
            raise ValueError(f"{root} must contain images, got only grids of images")
        self.first_size = self._read_size(self.files[0])
        self.image_size = image_size or self._default_size()
        self.sizes_may_differ = image_size is not None
        self.captions: list[str] = []
        if captions is not None and captions != "embedded" and all_captions:
            self.files, self.captions = files_by_caption(self.root, self.files, captions)
        elif captions is not None:
            self.captions = captions_of_files(self.root, self.files, None if captions == "embedded" else captions)
        self.chunks = index_ranges(len(self.files), IMAGES_PER_PART)
        self.identity = {
            "content": hash_files(self.root / file for file in self.files),
            "captions": hash_lines(self.captions),
            "image_size": self.image_size,
        }

    def read(self, chunk: range) -> Iterator[ImageBatch]:
        """Yield the images of a chunk with their captions, batch by batch."""
        with ThreadPool(self.workers) as pool:
            for start in range(chunk.start, chunk.stop, self.batch_size):
                batch = slice(start, min(start + self.batch_size, chunk.stop))
                yield torch.cat(pool.map(self._load, self.files[batch])), self.captions[batch]

    def _load(self, file: str) -> Tensor:
        """Load an image. It is decoded as in ``RealImages``, so that a folder's distance from itself is 0."""
        if not self.sizes_may_differ:
            self._check_size(file)
        with self._path_in_errors(file):
            image = decode_image(self.root / file, image_size=self.image_size)
        return from_pil(image, self.image_size)

    def _default_size(self) -> int:
        """Return the short side of the first image.

        Raises:
            ValueError: it is too large to be used without being requested.
        """
        size = min(self.first_size)
        if size > MAX_DEFAULT_SIZE:
            raise ValueError(
                f"image_size must be given for images above {MAX_DEFAULT_SIZE} pixels, got {self.first_size[0]} x "
                f"{self.first_size[1]} in {self.root}: choose --image-size"
            )
        return size

    def _check_size(self, file: str) -> None:
        """Log a warning, once, if the size of an image differs from that of the first one."""
        size = self._read_size(file)
        if size != self.first_size:
            self.sizes_may_differ = True
            logger.warning(
                "%s is %d x %d, but the first image of %s is %d x %d: the central squares of all images are resized to "
                "%d pixels; choose another size by --image-size",
                file,
                *size,
                self.root,
                *self.first_size,
                self.image_size,
            )

    def _read_size(self, file: str) -> tuple[int, int]:
        with self._path_in_errors(file):
            return upright_size(self.root / file)

    @contextmanager
    def _path_in_errors(self, file: str) -> Iterator[None]:
        try:
            yield
        except UnusableImageError as error:
            raise ValueError(f"{self.root / file} cannot be used as an image: {error}") from error


class RealImages:
    """The usable images of a dataset, center-cropped, as a reference; without the grids that clipgen-sample writes.

    Args:
        name: a folder, tar shards (globs, braces) or ``"shapes"``.
        image_size: height and width in pixels.
        batch_size: images per batch.
        count: number of images of shapes, which are rendered.
        seed: seed of shapes.
        files: the images of a folder to use, as paths below it. None uses all.

    Raises:
        ValueError: ``files`` names an image that the folder does not contain.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        batch_size: int = 50,
        count: int = 10_000,
        seed: int = 1_000_003,
        files: Collection[str] | None = None,
    ):
        self.batch_size = batch_size
        self.dataset = open_dataset(name, image_size, count, seed)
        if isinstance(self.dataset, ImageFolder):
            leave_out_grids(self.dataset)
        if files is not None:
            keep_files(self.dataset, files)
        self.chunks = list(self.dataset.split_into_chunks(IMAGES_PER_PART))
        self.identity = {"content": self.dataset.content_id(), "image_size": image_size}

    def read(self, chunk: Any) -> Iterator[ImageBatch]:
        """Yield the images of a chunk, batch by batch, without captions."""
        for views, _ in iter_batches(self.dataset, chunk, 1, self.batch_size):
            yield views[:, 0], []


def open_dataset(name: str, image_size: int, count: int, seed: int) -> ImageSource:
    """Open ``"shapes"``, a folder, or shards."""
    if name == "shapes":
        return ShapesDataset(count, image_size, seed)
    if Path(name).expanduser().is_dir():
        return ImageFolder(name, image_size, train=False)
    return ImageShards(name, image_size, train=False)


def is_grid(file: str) -> bool:
    """Return whether a file has the name of a grid of images, which is not an image of the set."""
    return Path(file).name in GRID_FILES


def leave_out_grids(dataset: ImageFolder) -> None:
    """Leave the grids of a folder out, as ``FolderImages`` does, so that its distance from itself is 0."""
    if not any(map(is_grid, dataset.files)):
        return
    dataset.files = PackedStrings([file for file in dataset.files if not is_grid(file)])
    if not len(dataset.files):
        raise ValueError(f"{dataset.root} must contain images, got only grids of images")


def keep_files(dataset: ImageSource, files: Collection[str]) -> None:
    """Restrict a folder to the given images; ValueError if it lacks one."""
    if not isinstance(dataset, ImageFolder):
        raise ValueError(f"files can be selected from a folder only, not from a {type(dataset).__name__}")
    missing = sorted(set(files) - set(dataset.files))
    if missing:
        raise ValueError(
            f"the reference {dataset.root} must contain the images that the captions name, but lacks {missing[0]}; "
            "--whole-reference uses all of its images instead"
        )
    dataset.files = PackedStrings([file for file in dataset.files if file in files])
