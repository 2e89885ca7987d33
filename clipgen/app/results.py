"""Generated images: their files, and what the page says about each of them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgen.generation.file_names import file_name
from clipgen.generation.sampling_options import SAMPLING_OPTIONS

if TYPE_CHECKING:
    from PIL import Image

    from clipgen.app.request import ImageRequest


@dataclass(frozen=True)
class Result:
    """A generated image.

    Args:
        image: the image, with its metadata in ``info``.
        request: the request that generated it.
        position: its number in the results of the request.
        caption: its caption in the gallery.
    """

    image: Image.Image
    request: ImageRequest
    position: int
    caption: str = ""

    @property
    def seed(self) -> int:
        """The seed of the image."""
        return int(self.image.info["seed"])

    def regenerate(self) -> ImageRequest:
        """Return the request of this image alone; of the complete strip for an interpolation."""
        return self.request.regenerate(self.position, self.seed)

    def generate_more(self, num_images: int) -> ImageRequest:
        """Return a request for images with the same prompt and settings, and another seed."""
        return self.request.generate_more(self.position, num_images)

    def variations(self, num_images: int) -> ImageRequest:
        """Return a request for images with this image as the prompt."""
        return self.request.variations(self.position, self.image, num_images)


def make_results(request: ImageRequest, images: Sequence[Image.Image]) -> list[Result]:
    """Return the results of a request, with captions that tell them apart."""
    captions = make_captions(request)
    return [Result(image, request, i, captions[i]) for i, image in enumerate(images)]


def make_captions(request: ImageRequest) -> list[str]:
    """Return a caption per image: the sampling parameters of a sweep; empty for other requests."""
    from clipgen.generation.sweep import sweep_labels

    captions = []
    for label in sweep_labels(request.sweep):
        captions += [label] * request.num_images
    return captions


def save_result(result: Result, folder: Path) -> Path:
    """Write the PNG of an image with its metadata to a new folder below ``folder``."""
    info = result.image.info
    return save_image(result.image, file_name(title(info), str(info["seed"])), folder)


def save_sheet(sheet: Image.Image, folder: Path) -> Path:
    """Write the PNG of the sheet of a sweep with its metadata to a new folder below ``folder``."""
    return save_image(sheet, file_name("sweep", title(sheet.info), str(sheet.info["seed"])), folder)


def save_image(image: Image.Image, name: str, folder: Path) -> Path:
    """Write the PNG of an image with its metadata to a new folder below ``folder``, which no visitor can guess."""
    from clipgen.images import save_png

    place = folder / secrets.token_hex(16)
    place.mkdir(parents=True)
    return save_png(image, place / name, image.info)


def sheet_metadata(results: Sequence[Result]) -> dict[Any, Any]:
    """Return the metadata that all images of a sweep share, the first seed, and the captions of the images."""
    first, *others = (result.image.info for result in results)
    shared = {name: value for name, value in first.items() if all(info.get(name) == value for info in others)}
    return shared | {"seed": first["seed"], "sweep": [result.caption for result in results]}


def title(info: Mapping[Any, Any]) -> str:
    """Return the prompt of an image in words."""
    if "interpolate" in info:
        from clipgen.generation.prompts import describe

        return " to ".join(describe(end) for end in info["interpolate"])
    return str(info["prompt"])


def details(result: Result) -> str:
    """Return prompt, seed and settings of an image as an HTML table."""
    info = result.image.info
    sampling = [f"{name.replace('_', ' ')} {info[name]:g}" for name in SAMPLING_OPTIONS]
    rows = {"Prompt": title(info), "Seed": str(info["seed"]), "Sampling": ", ".join(sampling)}
    if "keep_fraction" in info:
        rows["Kept"] = f"the upper {info['keep_fraction']:.0%} of the upload"
    rows["Model"] = f"{result.request.model}, weights {info['model']}"
    rows["Size"] = f"{result.image.width} x {result.image.height} pixels"
    cells = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows.items()
    )
    return f"<table class='details'>{cells}</table>"
