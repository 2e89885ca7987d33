"""Images of which some rows are generated, as squares of full size."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from clipgen.images import to_pil


@dataclass(frozen=True)
class PartialRequest:
    """The state of a request whose images are being generated.

    Args:
        images: all images of the request; rows that are not generated yet are transparent.
        rows: complete rows of tokens of the images in work.
        num_rows: rows of tokens of a complete image.
    """

    images: list[Image.Image]
    rows: int
    num_rows: int


class PartialImages:
    """Collect the previews of a request, whose images are generated in several batches if they are many.

    Args:
        image_size: height and width of a complete image in pixels.
        num_rows: rows of tokens of a complete image.
        total: number of images of the request.
    """

    def __init__(self, image_size: int, num_rows: int, total: int):
        self.image_size = image_size
        self.num_rows = num_rows
        self.total = total
        self.complete: list[Image.Image] = []
        self.current: list[Image.Image] = []
        self.height = 0

    def update(self, images: Tensor) -> PartialRequest:
        """Take a preview (B, 3, h, W), and return the state of all images.

        A preview with fewer rows than the one before belongs to a new batch, or to the same batch once more if it did
        not fit into the memory of the GPU.
        """
        height = images.shape[2]
        if height < self.height == self.image_size:
            self.complete += self.current
        self.height = height
        self.current = [paste_into_square(strip, self.image_size) for strip in to_pil(images)]
        visible = self.complete + self.current
        waiting = max(self.total - len(visible), 0)
        empty = Image.new("RGBA", (self.image_size, self.image_size))
        rows = height * self.num_rows // self.image_size
        return PartialRequest(visible + [empty] * waiting, rows, self.num_rows)


def paste_into_square(strip: Image.Image, size: int) -> Image.Image:
    """Return a square image with a strip at its top; the rest is transparent."""
    square = Image.new("RGBA", (size, size))
    square.paste(strip, (0, 0))
    return square
