"""Photos as they come, decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# The formats are told by content. Naming them keeps out those that run other programs, such as EPS.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


class UnusableImageError(ValueError):
    """An image that training has to skip.

    Attributes:
        reason: "truncated", "empty", "not an image", "too large" or another of the few words that summaries count by.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


def decode_image(source: Path | bytes, image_size: int | None = None) -> Image.Image:
    """Decode an image file, or its bytes, to an upright RGB picture.

    EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bits, and of an animation the
    first frame is taken. What the file contains decides its type, not its name.

    Args:
        source: path or content of a JPEG, PNG, WebP, GIF, BMP or TIFF file.
        image_size: what the picture will be reduced to. A JPEG of four times that and more is then decoded at a half,
            quarter or eighth of its size, still at twice what is wanted: 12 megapixels in a third of the time.

    Raises:
        UnusableImageError: the source is empty, truncated, corrupt, no image at all, or too large: a decompression bomb to
            Pillow, which refuses it by its header.
    """
    with _opened(source) as image:
        if image_size:
            image.draft(None, (2 * image_size, 2 * image_size))
        image.load()
        with suppress(Exception):  # the pixels are turned first; then it may stumble over other tags, which is no loss
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def check_header(source: Path | bytes) -> None:
    """Raise what `decode_image` would, as far as the first bytes tell: empty, not an image, too large."""
    with _opened(source):
        pass


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any Pillow mode to RGB: transparency on white, 16-bit and float grey scaled to 8 bits."""
    if image.mode.startswith(("I", "F")):
        return _scale_grey(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextmanager
def _opened(source: Path | bytes) -> Iterator[Image.Image]:
    try:
        if not (len(source) if isinstance(source, bytes) else source.stat().st_size):
            raise UnusableImageError("empty")
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS) as image:
            yield image
    except UnusableImageError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly everything when the data is bad
        raise _unusable(error) from error


def _unusable(error: Exception) -> UnusableImageError:
    if isinstance(error, UnidentifiedImageError):
        return UnusableImageError("not an image")
    if isinstance(error, Image.DecompressionBombError):
        return UnusableImageError("too large", str(error))
    if isinstance(error, OSError) and error.errno:
        return UnusableImageError("unreadable", str(error))
    return UnusableImageError("truncated" if "truncated" in str(error).lower() else "corrupt", str(error))


def _scale_grey(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))  # Pillow's own conversion clips above 255
    white = max(1.0 if image.mode == "F" else 65535.0, float(values.max()))
    return Image.fromarray((values / white * 255).clip(0, 255).round().astype(np.uint8))
