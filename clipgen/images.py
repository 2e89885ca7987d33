"""Pictures: tensors to PIL, grids with captions, PNG files with metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from clipgen.data.decoding import to_rgb
from clipgen.data.transforms import val_transform
from clipgen.files import atomic_write


def check_images(images: Tensor) -> None:
    """Raise ValueError unless these are images (B, 3, H, W) of floats: bytes would be taken for nearly white ones."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        got = f"{str(images.dtype).removeprefix('torch.')} of {tuple(images.shape)}"
        raise ValueError(f"images must be (B, 3, H, W) floats in [-1, 1], got {got}")


def images_from_batch(batch: Any) -> Tensor:
    """The images of a batch, which may hold more.

    Raises:
        TypeError: it is no ``{"images": images}``: torchvision's data sets give tuples, and values in [0, 1].
    """
    if isinstance(batch, Mapping) and "images" in batch:
        return batch["images"]
    got = f"one of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise TypeError(f'a batch must be {{"images": (B, 3, H, W) in [-1, 1]}}, got {got}')


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> what a file would hold of them, uint8."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1] -> PIL images."""
    return [Image.fromarray(image) for image in to_bytes(images).permute(0, 2, 3, 1).cpu().numpy()]


def from_pil(picture: Image.Image, size: int | None = None) -> Tensor:
    """A picture's central square -> (1, 3, size, size) in [-1, 1]; None: as large as it is."""
    rgb = to_rgb(picture)
    return val_transform(size or min(rgb.size))(rgb)[None]


def grid(
    pictures: Sequence[Image.Image], columns: int | None = None, captions: Sequence[str] | None = None, cell: int = 128
) -> Image.Image:
    """Pictures in rows, each enlarged to ``cell`` pixels by whole factors where it is smaller, captions under them."""
    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    font = font_for("".join(captions or []))
    texts = [wrap(caption, cell, font) for caption in captions or [""] * len(pictures)]
    text_height = 13 * max(len(lines) for lines in texts) + 4 if captions else 0
    rows, gap = math.ceil(len(pictures) / columns), 6
    width, height = cell + gap, cell + text_height + gap
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for i, (picture, lines) in enumerate(zip(pictures, texts)):
        x, y = gap + (i % columns) * width, gap + (i // columns) * height
        sheet.paste(enlarged(picture, cell), (x, y))
        ImageDraw.Draw(sheet).multiline_text((x, y + cell + 2), "\n".join(lines), "black", font, spacing=1)
    return sheet


def font_for(text: str) -> Any:
    """Pillow's own font, which is ASCII only; for other texts matplotlib's DejaVu Sans (Latin, Cyrillic, Greek, Arabic,
    ..., but no Chinese)."""
    if text.isascii():
        return ImageFont.load_default(size=11)
    found = find_spec("matplotlib")  # importing it would take a while
    assert found is not None and found.origin is not None
    return ImageFont.truetype(str(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"), 10)


def enlarged(picture: Image.Image, cell: int) -> Image.Image:
    """Fit into a square of ``cell`` pixels; small pictures keep their hard pixels."""
    factor = cell / max(picture.size)
    resample = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    return picture.resize((round(picture.width * factor), round(picture.height * factor)), resample)


def wrap(text: str, width: int, font: Any) -> list[str]:
    """Break a sentence into lines no wider than ``width`` pixels, and words where one is wider."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
        while font.getlength(line := lines[-1]) > width and len(line) > 1:
            fits = max(sum(font.getlength(line[:n]) <= width for n in range(1, len(line))), 1)
            lines[-1:] = [line[:fits], line[fits:]]
    return lines


def save_png(picture: Image.Image, path: str | Path, metadata: Mapping[Any, Any] | None = None) -> Path:
    """Write a PNG, whole or not at all; ``metadata`` goes into its text chunks, numbers as JSON."""
    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    with atomic_write(path) as partial:
        picture.save(partial, format="PNG", pnginfo=info)
    return Path(path)


def code_frequency_chart(counts: Tensor, title: str) -> Image.Image:
    """How often each code was chosen (K,), most frequent first, as a picture."""
    import io

    from matplotlib.figure import Figure  # without pyplot, which would keep it

    p = (counts.float() / counts.sum().clamp(min=1)).sort(descending=True).values.cpu().numpy()
    figure = Figure(figsize=(6, 3), dpi=100, layout="constrained")
    axis = figure.add_subplot()
    axis.fill_between(range(len(p)), p, step="mid")
    axis.axhline(1 / len(p), color="gray", linestyle=":", label="all codes alike")
    axis.set(
        title=title, xlabel="code, most frequent first", ylabel="share of indices", xlim=(0, len(p)), ylim=(0, None)
    )
    axis.legend()
    figure.savefig(buffer := io.BytesIO(), format="png")
    return Image.open(buffer).convert("RGB")
