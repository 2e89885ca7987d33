"""Serve a request: wait for the model, generate in a thread, and yield the updates of the page during that time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clipgen.app.messages import status
from clipgen.app.models import ModelStore
from clipgen.app.results import Result, make_results, sheet_metadata
from clipgen.generation.bundled_vocabulary import prompt_warnings
from clipgen.generation.partial_images import PartialImages, PartialRequest
from clipgen.generation.streaming import Report, stream
from clipgen.visualization import grid

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from clipgen.app.request import ImageRequest

# Side in pixels of a cell of the sheet of a sweep.
SHEET_CELL = 160
# Seconds between two reports of a request that waits for others.
WAITING_INTERVAL = 0.2


@dataclass(frozen=True)
class Update:
    """Values of the components of the page.

    Args:
        status: HTML.
        partial: images that are not complete yet; empty to leave the gallery as it is.
        results: complete images.
        columns: columns of the gallery.
        sheet: all images of a sweep on one image.
    """

    status: str
    partial: list[Image.Image] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    columns: int = 1
    sheet: Image.Image | None = None


def serve_request(
    store: ModelStore,
    request: ImageRequest,
    stopped: threading.Event | None = None,
) -> Iterator[Update]:
    """Generate the images of a request; closing the generator stops the work after the current row.

    Args:
        store: the models.
        request: what to generate.
        stopped: also stops the work when it is set; ``Stopped`` is raised then.
    """
    start = time.monotonic()
    yield Update(status("Waiting for the model ..."))
    # The page must not wait for the end of the work. Until then ``ModelStore.generating`` keeps others away.
    for message in stream(lambda report: generate_with_reports(store, request, report), stopped, join=False):
        if message.kind == "result":
            seconds = time.monotonic() - start
            yield finished_update(request, message.value, seconds)
        elif isinstance(message.value, str):
            yield Update(status(message.value))
        else:
            progress: PartialRequest = message.value
            text = f"Row {progress.rows} of {progress.num_rows} ..."
            yield Update(status(text), partial=progress.images, columns=gallery_columns(request))


def generate_with_reports(store: ModelStore, request: ImageRequest, report: Report) -> list[Image.Image]:
    """Load the model and generate the images of a request; report texts and ``PartialRequest``."""
    pipe = store.load(request.model)
    partial = PartialImages(pipe.image_size, pipe.side, request.total)

    def preview(images: Tensor) -> None:
        report(partial.update(images))

    while not store.generating.acquire(timeout=WAITING_INTERVAL):
        # Raises ``Stopped`` if the visitor does not want to wait any longer.
        report("Waiting for other visitors ...")
    try:
        return request.generate(pipe, preview)
    finally:
        store.generating.release()


def finished_update(request: ImageRequest, images: list[Image.Image], seconds: float) -> Update:
    """Return the results of a request."""
    results = make_results(request, images)
    is_sweep = len(request.sweep) > 1
    sheet = make_sheet(results, request) if is_sweep else None
    noun = "image" if len(images) == 1 else "images"
    text = f"{len(images)} {noun} in {seconds:.1f} s. Choose one to see its settings."
    columns = gallery_columns(request)
    return Update(status(text, notes(request)), results=results, columns=columns, sheet=sheet)


def make_sheet(results: list[Result], request: ImageRequest) -> Image.Image:
    """Return all images of a sweep on one image, one row per value of top-k."""
    captions = [result.caption for result in results]
    images = [result.image for result in results]
    sheet = grid(images, columns=sheet_columns(request), captions=captions, cell=SHEET_CELL)
    sheet.info = sheet_metadata(results)
    return sheet


def sheet_columns(request: ImageRequest) -> int:
    """Return the number of images with the same top-k in a sweep."""
    first = request.sweep[0].top_k
    return sum(params.top_k == first for params in request.sweep) * request.num_images


def gallery_columns(request: ImageRequest) -> int:
    """Return the number of columns of the gallery, at most 4."""
    if len(request.sweep) > 1:
        return min(sheet_columns(request), 4)
    if request.total <= 1:
        return 1
    if request.total <= 4:
        return 2
    return 3 if request.total <= 9 else 4


def notes(request: ImageRequest) -> list[str]:
    """Return remarks on the prompts, or the image to complete, that a bundled model was not trained for."""
    prompts = list(request.prompts)
    if request.outpaint and request.outpaint not in prompts:
        prompts.append(request.outpaint)
    return prompt_warnings(request.model, [("the upload", prompt) for prompt in prompts])
