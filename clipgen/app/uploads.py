"""Images that a visitor uploads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from clipgen.app.limits import MAX_UPLOAD_PIXELS

if TYPE_CHECKING:
    from PIL import Image


def image_upload(label: str) -> gr.Image:
    """Return a component that accepts an image, and passes on the path of its file."""
    component = gr.Image(label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=240)
    # Gradio would open the file, with error messages that no visitor understands.
    component.preprocess = uploaded_path  # type: ignore[method-assign,unused-ignore]
    return component


def uploaded_path(payload: gr.FileData | None) -> str | None:
    """Return the path of an uploaded file; None if there is none."""
    return payload.path if payload else None


def read_upload(path: str | None, purpose: str = "an image") -> Image.Image:
    """Decode an uploaded image.

    Args:
        path: the file; None if nothing was uploaded.
        purpose: name of the image, for messages.

    Raises:
        ValueError: there is no image, or the file cannot be used as one.
    """
    from clipgen.data.decoding import UnusableImageError, decode_image, upright_size

    if not path or not Path(path).is_file():
        raise ValueError(f"{purpose} is missing: upload one first")
    try:
        width, height = upright_size(Path(path))
        if width * height > MAX_UPLOAD_PIXELS:
            limit = f"at most {MAX_UPLOAD_PIXELS // 10**6} million pixels"
            raise ValueError(f"{purpose} must have {limit}, got {width} x {height}")
        return decode_image(Path(path))
    except UnusableImageError as error:
        raise ValueError(f"the uploaded file cannot be used as an image: {error}") from error
