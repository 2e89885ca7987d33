"""Images that a visitor uploads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from clipgen.app.limits import MAX_KEPT_SIDE, MAX_UPLOAD_PIXELS

if TYPE_CHECKING:
    from PIL import Image


def read_upload(path: str | None, purpose: str = "an image") -> Image.Image:
    """Decode an uploaded image.

    Args:
        path: the file; None if nothing was uploaded.
        purpose: name of the image, for messages.

    Raises:
        ValueError: the image is missing, or the file is not a usable image.
    """
    from clipgen.data.decoding import UnusableImageError, decode_image, upright_size

    if not path or not Path(path).is_file():
        raise ValueError(f"{purpose} is missing: upload one first")
    try:
        width, height = upright_size(Path(path))
        if width * height > MAX_UPLOAD_PIXELS:
            limit = f"at most {MAX_UPLOAD_PIXELS // 10**6} million pixels"
            raise ValueError(f"{purpose} must have {limit}, got {width} x {height}")
        image = decode_image(Path(path))
    except UnusableImageError as error:
        raise ValueError(f"the uploaded file cannot be used as an image: {error}") from error
    # Requests are kept for an hour, and no model sees more pixels than this.
    image.thumbnail((MAX_KEPT_SIDE, MAX_KEPT_SIDE))
    return image
