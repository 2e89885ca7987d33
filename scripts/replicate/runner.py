"""Serve a pipeline on Replicate: checked inputs, images that appear row by row, and files with their metadata."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, Optional

import cog
from cog import BaseRunner, Input, Path
from PIL import Image

from clipgen import TextToImage
from clipgen.generation.options import Preview
from clipgen.generation.partial_images import PartialImages, PartialRequest
from clipgen.generation.streaming import stream
from clipgen.hardware.device import default_device
from clipgen.images import save_png
from clipgen.visualization import grid

# Environment variable: the model to serve. By default it is the folder "model" next to this file, if there is one.
CHECKPOINT = "CLIPGEN_CHECKPOINT"
MODEL = Path(__file__).parent / "model"
# Width and height in pixels of an image in a preview.
PREVIEW_CELL = 128


class Runner(BaseRunner):
    """Generate images from a prompt with one pipeline, which is loaded once."""

    def setup(self) -> None:
        """Load the pipeline."""
        checkpoint = os.environ.get(CHECKPOINT) or (str(MODEL) if MODEL.is_dir() else "shapes")
        self.pipe = TextToImage.load(checkpoint).to(default_device())
        self.folder: Path | None = None

    def healthcheck(self) -> bool:
        """Return whether the pipeline is loaded."""
        return hasattr(self, "pipe")

    # The signature is read as text by cog, which checks its types and bounds before a call: they must be literals. They
    # are those of the web page.
    @cog.streaming
    def run(
        self,
        prompt: str = Input(description="A sentence that describes the image", max_length=1000),
        num_images: int = Input(description="Number of images", default=4, ge=1, le=16),
        top_k: Optional[int] = Input(  # noqa: UP045
            description="Number of most likely codes that are kept; empty: the model's", default=None, ge=1, le=1000
        ),
        top_p: Optional[float] = Input(  # noqa: UP045
            description="Probability of the most likely codes that are kept; empty: the model's",
            default=None,
            ge=0.01,
            le=1.0,
        ),
        temperature: Optional[float] = Input(  # noqa: UP045
            description="Divisor of the logits; 0 takes the most likely code; empty: the model's",
            default=None,
            ge=0.0,
            le=2.0,
        ),
        guidance_scale: Optional[float] = Input(  # noqa: UP045
            description="Classifier-free guidance; 1 disables it, as a model without condition dropout needs; "
            "empty: the model's",
            default=None,
            ge=0.0,
            le=10.0,
        ),
        seed: Optional[int] = Input(description="Seed of the first image; empty: random", default=None, ge=0),  # noqa: UP045
        rerank_from: Optional[int] = Input(  # noqa: UP045
            description="Number of candidates, of which CLIP chooses the best; empty: no choice",
            default=None,
            ge=1,
            le=64,
        ),
        stream_rows: bool = Input(description="Also send the unfinished images after each row", default=True),
    ) -> Iterator[Path]:
        """Yield a sheet with the unfinished images after each row of indices, and at the end one file per image."""
        settings = {
            "top_k": top_k,
            "top_p": top_p,
            "temperature": temperature,
            "guidance_scale": guidance_scale,
            "seed": seed,
            "rerank_from": rerank_from,
        }
        # Without a value, that of the model is used.
        overrides = {name: value for name, value in settings.items() if value is not None}
        yield from self.generate(prompt, num_images, overrides, stream_rows)

    def generate(self, prompt: str, num_images: int, settings: dict[str, Any], stream_rows: bool) -> Iterator[Path]:
        """Yield a file per row of indices if ``stream_rows``, and a file per image.

        Args:
            prompt: the prompt.
            num_images: number of images.
            settings: keyword arguments of the pipeline.
            stream_rows: yield the unfinished images.
        """

        def work(report: Preview) -> list[Image.Image]:
            return self.pipe(prompt, num_images, preview=report, **settings)

        folder = self.new_folder()
        partial = PartialImages(self.pipe.image_size, self.pipe.side, settings.get("rerank_from", num_images))
        for position, message in enumerate(stream(work)):
            if message.kind == "result":
                yield from write_images(message.value, folder)
            elif stream_rows:
                yield write_rows(partial.update(message.value), folder, position)

    def new_folder(self) -> Path:
        """Return a new folder for the files of a prediction; delete that of the last one, whose files are sent."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder = Path(tempfile.mkdtemp())
        return self.folder


def write_images(images: list[Image.Image], folder: Path) -> Iterator[Path]:
    """Write images with their metadata, and yield their files."""
    for number, image in enumerate(images):
        yield Path(save_png(image, folder / f"{number}.png", image.info))


def write_rows(state: PartialRequest, folder: Path, position: int) -> Path:
    """Write a sheet with the unfinished images, and return its file.

    Args:
        state: the unfinished images.
        folder: folder of the prediction.
        position: number of the sheet; a second batch begins with the first row again.
    """
    name = f"row-{state.rows:03d}-{position:03d}.png"
    return Path(save_png(grid(state.images, cell=PREVIEW_CELL), folder / name))
