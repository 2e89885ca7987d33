"""Photos as they come, decoded."""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError, features

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
# Pictures that a folder may hold and that no decoder of ours reads: they are counted, and their format is named.
UNREADABLE_EXTENSIONS = (".heic", ".heif", ".jxl", ".jp2")
# The formats are told by content. Naming them keeps out those that run other programs, such as EPS.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Medium-format cameras reach 102 megapixels. JPEGs count at the size that they are decoded at.
MAX_PIXELS = 120_000_000
# Pictures that threads decode at the same time share this much memory; a larger one is decoded alone.
_DECODING_BYTES = 1 << 29
# Conversions work on bands of so many pixels, so that they need no second copy of a large picture.
_BAND_PIXELS = 1 << 22
_MAX_PROFILE_BYTES = 4 << 20  # printers' profiles have 0.5 to 3 MB
_WITHOUT_DECODER = {
    "AVIF": ("ftypavif", "ftypavis"),
    "HEIC": ("ftypheic", "ftypheix", "ftyphevc", "ftypmif1", "ftypmsf1"),
    "JPEG XL": ("JXL ",),
    "JPEG 2000": ("jP  ",),
}  # what stands at the fifth byte


class UnusableImageError(ValueError):
    """An image that training has to skip.

    Attributes:
        reason: "truncated", "empty", "not an image", "too large" or another of the few words that summaries count by.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


def decode_image(source: Path | bytes, image_size: int | None = None) -> Image.Image:
    """Decode an image file, or its bytes, to an upright sRGB picture.

    EXIF orientation and the color profile are applied, transparency is laid on white, 16-bit grey is scaled to 8 bits,
    and of an animation the first frame is taken. What the file contains decides its type, not its name.

    Args:
        source: path or content of a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file.
        image_size: what the picture will be reduced to. A JPEG of four times that and more is then decoded at a half,
            quarter or eighth of its size, still at twice what is wanted: 12 megapixels in a third of the time.

    Raises:
        UnusableImageError: the source is empty, truncated, corrupt, no image at all, of a format without a decoder here, or
            larger than `MAX_PIXELS` pixels, which its header tells.
    """
    with _opened(source) as image:
        if image_size:
            image.draft(None, (2 * image_size, 2 * image_size))
        check_pixels(image)
        with _memory.reserved(_bytes_needed(image)):
            image.load()
            with suppress(Exception):  # the pixels are turned first; then it may stumble over other tags: no loss
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)


def check_header(source: Path | bytes) -> None:
    """Raise what `decode_image` would, as far as the first bytes tell: empty, not an image, too large."""
    with _opened(source) as image:
        image.draft(None, (1, 1))
        check_pixels(image)


def upright_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image file as its EXIF orientation turns it, without decoding it."""
    with _opened(path) as image:
        turned = False
        with suppress(Exception):  # broken tags, as in `decode_image`
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (image.height, image.width) if turned else image.size


def check_pixels(image: Image.Image) -> None:
    """Raise UnusableImageError unless an image that is not decoded yet has at most `MAX_PIXELS` pixels."""
    if (pixels := image.width * image.height) > MAX_PIXELS:
        raise UnusableImageError("too large", f"{image.width} x {image.height} pixels are {pixels}, above {MAX_PIXELS}")


def png_text(path: Path) -> dict[str, str]:
    """Return the text chunks of a PNG file; a file of another kind has none.

    Raises:
        UnusableImageError: the file is not a regular file, breaks off, or is too large.
    """
    try:
        with _opened(path, ("PNG",)) as image:
            check_pixels(image)
            with _memory.reserved(_bytes_needed(image)):
                return dict(getattr(image, "text", {}))  # reads to the end of the file, as texts may stand there
    except UnusableImageError as error:
        if error.reason in ("not an image", "no decoder"):
            return {}
        raise


def looks_like_image(start: bytes) -> bool:
    """Return whether a file that begins with these bytes (32 are enough) claims to be an image."""
    known = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\xff\x0a")
    bitmap = start[:2] == b"BM" and start[6:10] == bytes(4)
    webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    return start.startswith(known) or bitmap or webp or _format_without_decoder(start) is not None


def has_extension(name: str) -> bool:
    """Return whether a file name ends like `.jpg` or `.txt`; `0001`, `clip.0001` and `photo.jpg?size=2` do not."""
    return re.search(r"\.[A-Za-z][A-Za-z0-9]{0,7}$", name) is not None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any Pillow mode to sRGB: its color profile is applied, transparency is laid on white, 16-bit
    and float grey is scaled to 8 bits."""
    profile = image.info.get("icc_profile")
    if image.mode == "RGB" and not profile and not image.has_transparency_data:
        return image
    white = _white_level(image) if image.mode.startswith(("I", "F")) else 0.0
    result = Image.new("RGB", image.size)
    for top, band in _bands(image):
        result.paste(_grey(band, white) if white else _colors(band, profile), (0, top))
    return result


def _colors(image: Image.Image, profile: bytes | None) -> Image.Image:
    transparent = image.has_transparency_data
    if image.mode == "LA":
        source = image.getchannel("L")
    else:
        source = image if image.mode in ("L", "CMYK") else image.convert("RGB")
    transform = _to_srgb(profile, source.mode) if profile else None
    if transform is not None:
        colors = ImageCms.applyTransform(source, transform)
        assert colors is not None
        if not transparent:
            return colors
        colors.putalpha(image.convert("RGBA").getchannel("A"))
    elif transparent:
        colors = image.convert("RGBA")
    else:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colors).convert("RGB")


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> Any:
    """Return the transform from an embedded color profile to sRGB; None where it changes nothing or is unusable."""
    if len(profile) > _MAX_PROFILE_BYTES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        transform = ImageCms.buildTransform(source, _srgb(), mode, "RGB")
        if mode != "RGB":
            return transform
        colors = _color_cube()
        changed = ImageCms.applyTransform(colors, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    assert changed is not None
    # Most profiles are sRGB's own, and rounding would move its colors by a level.
    furthest = max(high for _, high in ImageChops.difference(colors, changed).getextrema())  # type: ignore[misc]
    return transform if furthest > 2 else None


@cache
def _srgb() -> Any:
    return ImageCms.createProfile("sRGB")


@cache
def _color_cube() -> Image.Image:
    """Return an image of 9 x 9 x 9 colors that are evenly spread."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3))


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield the first row and the pixels of horizontal bands."""
    rows = max(_BAND_PIXELS // image.width, 1)
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _white_level(image: Image.Image) -> float:
    highest = max(float(_grey_values(band).max()) for _, band in _bands(image))
    return max(1.0 if image.mode == "F" else 65535.0, highest)


def _grey(image: Image.Image, white: float) -> Image.Image:
    values = _grey_values(image)  # Pillow's own conversion clips above 255
    return Image.fromarray((values / white * 255).clip(0, 255).round().astype(np.uint8)).convert("RGB")


def _grey_values(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image, dtype=np.float32))


# ------------------------------------------------------------------------------------------------------------ opening


@contextmanager
def _opened(source: Path | bytes, formats: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    try:
        if isinstance(source, bytes):
            size = len(source)
        else:
            size = _regular_size(source)
        if not size:
            raise UnusableImageError("empty")
        file = BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=formats or _formats()) as image:
            yield image
    except UnusableImageError:
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(source) from error
    except Exception as error:  # Pillow's decoders raise nearly everything when the data is bad
        raise _unusable(error) from error


@cache
def _formats() -> tuple[str, ...]:
    return (*_FORMATS, "AVIF") if features.check("avif") else _FORMATS


def _regular_size(path: Path) -> int:
    """Return the bytes of a file; opening a pipe or a device could wait for ever."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UnusableImageError("unreadable", "not a regular file")
    return status.st_size


def _unidentified(source: Path | bytes) -> UnusableImageError:
    start = source[:32] if isinstance(source, bytes) else read_start(source)
    if (name := _format_without_decoder(start)) is None:
        return UnusableImageError("not an image")
    way = 'pip install "pillow>=11.3"' if name == "AVIF" else "convert it to JPEG or PNG"
    return UnusableImageError("no decoder", f"{name}: {way}")


def read_start(path: Path) -> bytes:
    """Return the first 32 bytes of a regular file; none of anything else."""
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(32)
    return b""


def _format_without_decoder(start: bytes) -> str | None:
    if start.startswith(b"\xff\x0a"):
        return "JPEG XL"
    mark = start[4:12].decode("latin-1")
    return next((name for name, marks in _WITHOUT_DECODER.items() if mark.startswith(marks)), None)


def _unusable(error: Exception) -> UnusableImageError:
    if isinstance(error, Image.DecompressionBombError):
        return UnusableImageError("too large", str(error))
    if isinstance(error, MemoryError):
        return UnusableImageError("too large", "there is not enough memory to decode it")
    if isinstance(error, OSError) and error.errno:
        return UnusableImageError("unreadable", str(error))
    return UnusableImageError("truncated" if "truncated" in str(error).lower() else "corrupt", str(error))


# ------------------------------------------------------------------------------------------------------------- memory


def _bytes_needed(image: Image.Image) -> int:
    """Return what decoding an image and converting it to RGB takes at most."""
    if image.mode in ("1", "L", "P"):
        decoded = 1
    else:
        decoded = 2 if image.mode.startswith("I;16") else 4
    converted = 0 if image.mode == "RGB" else 4
    return image.width * image.height * (decoded + converted)


class MemoryBudget:
    """Memory that the threads of a process share: one waits while what the others hold leaves no room for it.

    A request above the limit is granted when nobody else holds memory, so no request waits for ever.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.changed = threading.Condition()

    @contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        """Hold `size` bytes of the budget inside the `with`."""
        with self.changed:
            self.changed.wait_for(lambda: not self.held or self.held + size <= self.limit)
            self.held += size
        try:
            yield
        finally:
            with self.changed:
                self.held -= size
                self.changed.notify_all()


_memory = MemoryBudget(_DECODING_BYTES)


def _new_memory() -> None:
    """Begin with an empty budget in a forked process, which does not have the threads that held it."""
    global _memory
    _memory = MemoryBudget(_DECODING_BYTES)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_memory)
