"""Convert images of any Pillow mode and color profile to sRGB."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageCms

# Pixels per band: conversions work on one band at a time, so that they need no second copy of a large image.
_BAND_PIXELS = 1 << 22
# The profiles of printers have 0.5 to 3 MB.
_MAX_PROFILE_BYTES = 4 << 20


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any Pillow mode to sRGB.

    Its color profile is applied, transparent pixels are blended with white, and 16-bit and float gray is scaled to 8
    bits.
    """
    profile = image.info.get("icc_profile")
    if image.mode == "RGB" and not profile and not image.has_transparency_data:
        return image
    is_high_depth = image.mode.startswith(("I", "F"))
    white = _white_level(image) if is_high_depth else 0.0
    result = Image.new("RGB", image.size)
    for top, band in _bands(image):
        rgb = _scale_gray(band, white) if is_high_depth else _convert_colors(band, profile)
        result.paste(rgb, (0, top))
    return result


def _convert_colors(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image with 8 bits per channel to sRGB on white."""
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
    """Return the transform from an embedded color profile to sRGB; None if it changes nothing or is unusable."""
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
    # Most profiles are sRGB itself; applying them would only add rounding errors.
    largest_change = max(high for _, high in ImageChops.difference(colors, changed).getextrema())  # type: ignore[misc]
    return transform if largest_change > 2 else None


@cache
def _srgb() -> Any:
    return ImageCms.createProfile("sRGB")


@cache
def _color_cube() -> Image.Image:
    """Return an image of 9 x 9 x 9 evenly spaced colors."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3))


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield horizontal bands, each with the number of its first row."""
    rows = max(_BAND_PIXELS // image.width, 1)
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _white_level(image: Image.Image) -> float:
    """Return the gray value that becomes white: the nominal maximum, or the largest value if that is higher."""
    largest = max(float(_gray_values(band).max()) for _, band in _bands(image))
    nominal = 1.0 if image.mode == "F" else 65535.0
    return max(nominal, largest)


def _scale_gray(image: Image.Image, white: float) -> Image.Image:
    """Scale gray values to 8 bits; Pillow's own conversion would clip them at 255."""
    values = _gray_values(image) / white * 255
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8)).convert("RGB")


def _gray_values(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image, dtype=np.float32))
