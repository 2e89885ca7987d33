"""Generate the images of a request and write them: one PNG per image, strips of interpolations, and a grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from clipgen.cli.console import print_line
from clipgen.cli.progress_bar import progress_bar
from clipgen.cli.sample_request import SampleRequest
from clipgen.generation.file_names import file_name
from clipgen.generation.options import Preview
from clipgen.generation.prompts import describe
from clipgen.generation.sweep import sweep_labels
from clipgen.images import save_png, to_pil
from clipgen.pipeline import TextToImage
from clipgen.sampling_params import SamplingParams
from clipgen.visualization import grid

# A grid of more images does not open in most viewers, and takes gigabytes of memory.
MAX_GRID_IMAGES = 1000


class GridCell(NamedTuple):
    """An image of the grid, with the number of its prompt and sampling parameters."""

    number: int
    caption: str
    image: Image.Image


def generate(pipe: TextToImage, request: SampleRequest, folder: Path, preview: bool) -> None:
    """Generate and write every image, the strips, and the grid.

    Args:
        pipe: the model.
        request: what to generate.
        folder: where the files are written.
        preview: update ``preview.png`` after each row of indices.
    """
    with progress_bar("Generating", request.total_images) as advance:
        options = {
            "seed": request.seed,
            "outpaint": request.outpaint,
            "keep_fraction": request.keep_fraction,
            "preview": preview_writer(folder) if preview else None,
            "progress": advance,
        }
        cells = write_images(pipe, request, folder, options)
        write_strips(pipe, request, folder, options)
    if cells:
        write_grid(cells, request, folder)


def write_images(
    pipe: TextToImage,
    request: SampleRequest,
    folder: Path,
    options: dict[str, Any],
) -> list[GridCell]:
    """Generate and write the images of all prompts; return the first ones for the grid."""
    labels = sweep_labels(sampling_sweep(pipe, request))
    cells = []
    for prompt_index, params_index, image in generate_images(pipe, request, options):
        number = prompt_index * len(request.sweep) + params_index
        name = request.prompts[prompt_index].name
        label = labels[params_index]
        file = file_name(f"{number:02d}", name, label, str(image.info["seed"]))
        print_line(save_png(image, folder / file, image.info))
        if number * request.num_images < MAX_GRID_IMAGES:
            cells.append(GridCell(number, label or name, image))
    return cells


def generate_images(
    pipe: TextToImage,
    request: SampleRequest,
    options: dict[str, Any],
) -> Iterator[tuple[int, int, Image.Image]]:
    """Yield (index of the prompt, index of the sampling parameters, image), with as many prompts per batch as fit."""
    sweep = sampling_sweep(pipe, request)
    guided = any(params.uses_guidance for params in sweep)
    prompts_per_batch = max(pipe.batch_size(guided) // request.num_candidates, 1)
    for start in range(0, len(request.prompts), prompts_per_batch):
        batch = [prompt for _, prompt in request.prompts[start : start + prompts_per_batch]]
        for params_index, params in enumerate(sweep):
            images = pipe(batch, request.num_images, params, rerank_from=request.rerank_from, **options)
            for i, image in enumerate(images):
                yield start + i // request.num_images, params_index, image


def sampling_sweep(pipe: TextToImage, request: SampleRequest) -> list[SamplingParams]:
    """Return the sampling parameters of a request, the model's where the request names none."""
    return [replace(pipe.params, **values) for values in request.sweep]


def write_strips(pipe: TextToImage, request: SampleRequest, folder: Path, options: dict[str, Any]) -> None:
    """Generate and write one strip of images per interpolation and sampling parameters."""
    sweep = sampling_sweep(pipe, request)
    labels = sweep_labels(sweep)
    number = 0
    for first, second in request.interpolations:
        for label, params in zip(labels, sweep):
            strip = pipe.interpolate(first, second, request.strip_length, params, **options)
            # The number alone makes the name unique: labels are cut, and lose signs and points.
            file = file_name(f"interpolation_{number:02d}", describe(first), describe(second), label)
            number += 1
            print_line(save_png(grid(strip, columns=len(strip)), folder / file, strip[0].info))


def write_grid(cells: list[GridCell], request: SampleRequest, folder: Path) -> None:
    """Write the grid of all images, one row per prompt and sampling parameters."""
    num_rows = len(request.prompts) * len(request.sweep)
    cells = sorted(cells, key=lambda cell: cell.number)
    images = [cell.image for cell in cells]
    captions = [cell.caption for cell in cells]
    columns = request.num_images if num_rows > 1 else None
    sheet = grid(images, columns=columns, captions=captions, heading=request.heading)
    print_line(save_png(sheet, folder / "grid.png"))
    total = num_rows * request.num_images
    if len(cells) < total:
        print_line(f"The grid shows the first {len(cells)} of {total} images")


def preview_writer(folder: Path) -> Preview:
    """Return a function that writes the images so far to ``preview.png``."""

    def write(images: Tensor) -> None:
        save_png(grid(to_pil(images)), folder / "preview.png")

    return write
