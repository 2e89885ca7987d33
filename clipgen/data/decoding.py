"""Decode image files from any source to upright sRGB images, with bounded memory."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BufferedReader, BytesIO, FileIO
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features
from PIL.JpegImagePlugin import JpegImageFile

from clipgen.data.color_conversion import to_rgb
from clipgen.data.memory_budget import reserve_memory

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
# Image formats without a decoder here: such files are counted as skipped, and their format is named.
UNREADABLE_EXTENSIONS = (".heic", ".heif", ".jxl", ".jp2")
# Pillow detects formats by content. Listing them excludes those that run other programs, such as EPS.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Medium-format cameras reach 102 megapixels. The size of a JPEG is the one that it is decoded at.
MAX_PIXELS = 120_000_000
# Tags of TIFF.
_TILE_WIDTH = 322
_TILE_LENGTH = 323
# Number of bytes that suffice to recognize a format.
_SIGNATURE_BYTES = 32
# Bytes 4 to 12 of formats without a decoder.
_SIGNATURES_WITHOUT_DECODER = {
    "AVIF": ("ftypavif", "ftypavis"),
    "HEIC": ("ftypheic", "ftypheix", "ftyphevc", "ftypmif1", "ftypmsf1"),
    "JPEG XL": ("JXL ",),
    "JPEG 2000": ("jP  ",),
}


class UnusableImageError(ValueError):
    """An image that training has to skip.

    Attributes:
        reason: "truncated", "empty", "not an image", "too large" or another of the reasons that ``SkipCounter`` counts.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


def decode_image(source: Path | bytes, image_size: int | None = None) -> Image.Image:
    """Decode an image file, or its bytes, to an upright sRGB image.

    EXIF orientation and the color profile are applied, transparent pixels are blended with white, 16-bit gray is scaled
    to 8 bits, and animations are reduced to their first frame. The format is determined by content, not by name.

    Args:
        source: path or content of a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file.
        image_size: size to which the image will be resized. A JPEG of at least four times this size is then decoded at
            a half, quarter or eighth of its size, but at least twice ``image_size``: 12 megapixels take a third of the
            time.

    Raises:
        UnusableImageError: the source is empty, truncated, corrupt, not an image, or of a format without a decoder,
            or it has more than ``MAX_PIXELS`` pixels according to its header.
    """
    with _opened(source) as image:
        coefficient_bytes = _coefficient_bytes(image)
        if image_size:
            image.draft(None, (2 * image_size, 2 * image_size))
        check_pixels(image)
        with reserve_memory(_bytes_needed(image) + coefficient_bytes):
            image.load()
            # Pixels are rotated first; an error in other tags after that does not matter.
            with suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)


def check_header(source: Path | bytes) -> None:
    """Raise the errors of ``decode_image`` that the first bytes reveal: empty, not an image, too large."""
    with _opened(source) as image:
        _coefficient_bytes(image)
        image.draft(None, (1, 1))
        check_pixels(image)


def upright_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image file after its EXIF orientation is applied, without decoding it."""
    with _opened(path) as image:
        is_rotated = False
        # Broken tags are ignored, as in ``decode_image``.
        with suppress(Exception):
            is_rotated = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (image.height, image.width) if is_rotated else image.size


def check_pixels(image: Image.Image) -> None:
    """Raise UnusableImageError if an image that is not decoded yet has more than ``MAX_PIXELS`` pixels."""
    for width, height in (image.size, _tile_size(image)):
        pixels = width * height
        if pixels > MAX_PIXELS:
            raise UnusableImageError("too large", f"{width} x {height} pixels are {pixels}, above {MAX_PIXELS}")


def _coefficient_bytes(image: Image.Image) -> int:
    """Return the memory that a JPEG of several scans takes besides its pixels, also if it is decoded at a smaller size.

    Such a file needs two bytes for each sample of the full size, because each scan refines them. 0 for other images.

    Raises:
        UnusableImageError: the full size has more than ``MAX_PIXELS`` pixels.
    """
    if not isinstance(image, JpegImageFile) or not _has_several_scans(image):
        return 0
    check_pixels(image)
    return 2 * image.width * image.height * len(image.layer)


def _has_several_scans(image: JpegImageFile) -> bool:
    """Return whether a JPEG that was just opened has several scans: if not, the first one contains all components."""
    assert image.fp is not None
    num_components = len(image.layer)
    header_bytes = 6 + 2 * num_components
    # Pillow stops behind the header of the first scan.
    image.fp.seek(max(image.fp.tell() - header_bytes - 2, 0))
    header = b"\xff\xda" + header_bytes.to_bytes(2, "big") + bytes([num_components])
    return "progressive" in image.info or image.fp.read(len(header)) != header


def _tile_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of the tiles of a TIFF, which may be larger than the image; (0, 0) without tiles."""
    tags = getattr(image, "tag_v2", {})
    return _whole_number(tags.get(_TILE_WIDTH)), _whole_number(tags.get(_TILE_LENGTH))


def _whole_number(value: Any) -> int:
    """Return a value of a tag if it is a whole number, else 0."""
    return value if isinstance(value, int) else 0


def png_text(path: Path) -> dict[str, str]:
    """Return the text chunks of a PNG file; {} for a file of another format.

    Raises:
        UnusableImageError: the file is not a regular file, truncated, or too large.
    """
    try:
        with _opened(path, ("PNG",)) as image:
            check_pixels(image)
            with reserve_memory(_bytes_needed(image)):
                # This reads to the end of the file, where texts may be.
                return dict(getattr(image, "text", {}))
    except UnusableImageError as error:
        if error.reason in ("not an image", "no decoder"):
            return {}
        raise


def looks_like_image(start: bytes) -> bool:
    """Return whether a file that begins with these bytes (32 suffice) has the signature of an image."""
    signatures = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\xff\x0a")
    is_bitmap = start[:2] == b"BM" and start[6:10] == bytes(4)
    is_webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    return start.startswith(signatures) or is_bitmap or is_webp or _format_without_decoder(start) is not None


def has_extension(name: str) -> bool:
    """Return whether a file name has an extension like ``.jpg``; ``0001`` and ``clip.0001`` have none."""
    return re.search(r"\.[A-Za-z][A-Za-z0-9]{0,7}$", name) is not None


# ------------------------------------------------------------------------------------------------------------ opening


class _BoundedReader(BufferedReader):
    """Read no more than the rest of a file, regardless of the length that its chunks claim.

    ``BufferedReader.read`` allocates the requested size first, which Pillow takes from the file.
    """

    def __init__(self, path: Path, length: int) -> None:
        super().__init__(FileIO(path))
        self._length = length

    def read(self, size: int | None = -1, /) -> bytes:
        remaining = max(self._length - self.tell(), 0)
        return super().read(remaining if size is None or size < 0 else min(size, remaining))


@contextmanager
def _opened(source: Path | bytes, formats: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    """Open an image without decoding it; errors inside the ``with`` become UnusableImageError."""
    try:
        size = len(source) if isinstance(source, bytes) else _regular_file_size(source)
        if not size:
            raise UnusableImageError("empty")
        with (
            BytesIO(source) if isinstance(source, bytes) else _BoundedReader(source, size) as file,
            Image.open(file, formats=formats or _formats()) as image,
        ):
            yield image
    except UnusableImageError:
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(source) from error
    except Exception as error:
        # Pillow's decoders raise almost any exception for bad data.
        raise _unusable(error) from error


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that this installation of Pillow can decode."""
    return (*_FORMATS, "AVIF") if features.check("avif") else _FORMATS


def _regular_file_size(path: Path) -> int:
    """Return the size of a file in bytes; refuse pipes and devices, which could block forever."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UnusableImageError("unreadable", "not a regular file")
    return status.st_size


def _unidentified(source: Path | bytes) -> UnusableImageError:
    start = source[:_SIGNATURE_BYTES] if isinstance(source, bytes) else read_start(source)
    name = _format_without_decoder(start)
    if name is None:
        return UnusableImageError("not an image")
    remedy = 'pip install "pillow>=11.3"' if name == "AVIF" else "convert it to JPEG or PNG"
    return UnusableImageError("no decoder", f"{name}: {remedy}")


def read_start(path: Path) -> bytes:
    """Return the first 32 bytes of a regular file; b"" for anything else."""
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(_SIGNATURE_BYTES)
    return b""


def _format_without_decoder(start: bytes) -> str | None:
    if start.startswith(b"\xff\x0a"):
        return "JPEG XL"
    signature = start[4:12].decode("latin-1")
    for name, signatures in _SIGNATURES_WITHOUT_DECODER.items():
        if signature.startswith(signatures):
            return name
    return None


def _unusable(error: Exception) -> UnusableImageError:
    """Return the reason for an error of a decoder."""
    if isinstance(error, Image.DecompressionBombError):
        return UnusableImageError("too large", str(error))
    if isinstance(error, MemoryError):
        return UnusableImageError("too large", "there is not enough memory to decode it")
    if isinstance(error, OSError) and error.errno:
        return UnusableImageError("unreadable", str(error))
    return UnusableImageError("truncated" if "truncated" in str(error).lower() else "corrupt", str(error))


# ------------------------------------------------------------------------------------------------------------- memory


def _bytes_needed(image: Image.Image) -> int:
    """Return an upper bound of the memory for decoding an image and converting it to RGB."""
    if image.mode in ("1", "L", "P"):
        decoded_bytes = 1
    elif image.mode.startswith("I;16"):
        decoded_bytes = 2
    else:
        decoded_bytes = 4
    converted_bytes = 0 if image.mode == "RGB" else 4
    tile_width, tile_height = _tile_size(image)
    return image.width * image.height * (decoded_bytes + converted_bytes) + tile_width * tile_height * decoded_bytes
