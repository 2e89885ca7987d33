"""Draw grids of images with captions, and charts."""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MAX_CAPTION_LENGTH = 500  # characters
GAP = 6  # pixels between the cells of a grid, and around it
LINE_HEIGHT = 13  # pixels of a line of a caption
FONT_SIZE = 11
# The font of matplotlib is wider than Pillow's.
UNICODE_FONT_SIZE = 10


def grid(
    images: Sequence[Image.Image],
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    cell: int = 128,
    heading: Sequence[str] = (),
) -> Image.Image:
    """Tile images into a grid, row by row, with captions below them.

    Args:
        images: images of any size. Each is resized to fit into a cell.
        columns: number of columns; None makes the grid square.
        captions: one caption per image, wrapped to the width of a cell.
        cell: width and height of a cell in pixels.
        heading: paragraphs above the grid, wrapped to its width.
    """
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    texts = [shorten(caption) for caption in captions or [""] * len(images)]
    font = font_for("".join([*texts, *heading]))
    wrapped_texts = [wrap(text, cell, font) for text in texts]
    text_height = LINE_HEIGHT * max(len(lines) for lines in wrapped_texts) + 4 if captions else 0
    step_x = cell + GAP
    step_y = cell + text_height + GAP
    width = columns * step_x + GAP
    heading_lines = [line for paragraph in heading for line in wrap(paragraph, width - 2 * GAP, font)]
    top = LINE_HEIGHT * len(heading_lines) + GAP if heading else 0
    sheet = Image.new("RGB", (width, top + rows * step_y + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, GAP), "\n".join(heading_lines), "black", font, spacing=1)
    for i, (image, lines) in enumerate(zip(images, wrapped_texts)):
        x = GAP + (i % columns) * step_x
        y = top + GAP + (i // columns) * step_y
        sheet.paste(resize_to_cell(image, cell), (x, y))
        draw.multiline_text((x, y + cell + 2), "\n".join(lines), "black", font, spacing=1)
    return sheet


def font_for(text: str) -> Any:
    """Return a font that has all letters of a text.

    Pillow's font is ASCII only. For other texts it is matplotlib's DejaVu Sans, which covers Latin, Cyrillic, Greek and
    Arabic, but not Chinese.
    """
    if text.isascii():
        return ImageFont.load_default(size=FONT_SIZE)
    # Locating matplotlib is much faster than importing it.
    matplotlib = find_spec("matplotlib")
    assert matplotlib is not None and matplotlib.origin is not None
    file = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(file), UNICODE_FONT_SIZE)


def resize_to_cell(image: Image.Image, cell: int) -> Image.Image:
    """Resize an image to fit into a square of ``cell`` pixels; enlarged images keep sharp pixels."""
    factor = cell / max(image.size)
    resample = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    return image.resize((round(image.width * factor), round(image.height * factor)), resample)


def shorten(caption: str) -> str:
    """Cut a caption to ``MAX_CAPTION_LENGTH`` characters."""
    return caption if len(caption) <= MAX_CAPTION_LENGTH else caption[:MAX_CAPTION_LENGTH] + " ..."


def wrap(text: str, width: int, font: Any) -> list[str]:
    """Break a text into lines of at most ``width`` pixels; wider words are also broken."""
    lines: list[str] = []
    for word in text.split():
        # A word longer than ``width`` characters is certainly too wide, and measuring a very long word takes long.
        fits = bool(lines) and len(word) <= width and font.getlength(f"{lines[-1]} {word}") <= width
        if fits:
            lines[-1] += f" {word}"
        else:
            lines += break_word(word, width, font)
    return lines or [""]


def break_word(word: str, width: int, font: Any) -> list[str]:
    """Break a word into parts of at most ``width`` pixels, and of at least one letter."""
    parts = []
    start = 0
    while start < len(word):
        # A part has at most as many letters as pixels, so the time is linear in the length of the word.
        lengths = range(1, min(width, len(word) - start) + 1)
        num_fitting = bisect_right(lengths, width, key=lambda length: font.getlength(word[start : start + length]))
        part = word[start : start + max(num_fitting, 1)]
        parts.append(part)
        start += len(part)
    return parts


def code_grid(indices: Tensor, codebook: Tensor, cell: int = 36) -> Image.Image:
    """Draw the code indices of an image: a cell per index, with its number; similar codes have similar colors.

    Args:
        indices: code indices, (h, w).
        codebook: the codes, (K, D).
        cell: width and height of a cell in pixels.
    """
    height, width = indices.shape
    colors = code_colors(codebook)[indices.cpu()]
    sheet = Image.fromarray(colors.numpy()).resize((width * cell, height * cell), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(sheet)
    font = font_for("0")
    for y in range(height):
        for x in range(width):
            luminance = colors[y, x].float() @ torch.tensor([0.299, 0.587, 0.114])
            center = ((x + 0.5) * cell, (y + 0.5) * cell)
            draw.text(center, str(int(indices[y, x])), "black" if luminance > 128 else "white", font, anchor="mm")
    return sheet


def code_colors(codebook: Tensor) -> Tensor:
    """Return a color (K, 3), uint8, per code (K, D): its coordinates on the three principal axes of the codebook."""
    codes = codebook.detach().double().cpu()
    codes = codes - codes.mean(dim=0)
    # Eigenvalues are in ascending order.
    axes = torch.linalg.eigh(codes.T @ codes).eigenvectors[:, -3:].flip(1)
    # The sign of an eigenvector is arbitrary: make its largest entry positive, so that colors are reproducible.
    signs = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    coordinates = codes @ (axes * signs)
    scaled = coordinates / (4 * coordinates.std(dim=0).clamp(min=1e-12)) + 0.5
    colors = torch.full((len(codes), 3), 0.5, dtype=torch.float64)
    colors[:, : scaled.shape[1]] = scaled
    return (colors.clamp(0, 1) * 255).round().to(torch.uint8)


def code_frequency_chart(counts: Tensor, title: str) -> Image.Image:
    """Plot the relative frequency of each code, most frequent first: counts (K,) -> image."""
    # Without pyplot, which would keep the figure alive.
    from matplotlib.figure import Figure

    frequencies = (counts.float() / counts.sum().clamp(min=1)).sort(descending=True).values.cpu().numpy()
    figure = Figure(figsize=(6, 3), dpi=100, layout="constrained")
    axis = figure.add_subplot()
    axis.fill_between(range(len(frequencies)), frequencies, step="mid")
    axis.axhline(1 / len(frequencies), color="gray", linestyle=":", label="uniform")
    axis.set_title(title)
    axis.set_xlabel("code, most frequent first")
    axis.set_ylabel("fraction of indices")
    axis.set_xlim(0, len(frequencies))
    axis.set_ylim(0, None)
    axis.legend()
    return to_image(figure)


def line_chart(
    curves: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
    threshold: float | None = None,
) -> Image.Image:
    """Plot curves over 1, 2, 3, ...

    Args:
        curves: values by name.
        x_label: label of the horizontal axis.
        y_label: label of the vertical axis.
        threshold: value of a dotted line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    axis = figure.add_subplot()
    for name, values in curves.items():
        axis.plot(range(1, len(values) + 1), values, label=name)
    if threshold is not None:
        axis.axhline(threshold, color="gray", linestyle=":", label="real images")
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.legend()
    return to_image(figure)


def interval_chart(
    series: Mapping[str, Sequence[tuple[float, float, float, float]]],
    x_label: str,
    y_label: str,
    baseline: float | None = None,
) -> Image.Image:
    """Plot values with intervals over a logarithmic axis.

    Args:
        series: points (x, value, low, high) by name.
        x_label: label of the horizontal axis.
        y_label: label of the vertical axis.
        baseline: value of a dotted line, at x = 0.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    axis = figure.add_subplot()
    for name, points in series.items():
        x, values, low, high = map(list, zip(*points))
        below = [value - bound for value, bound in zip(values, low)]
        above = [bound - value for value, bound in zip(values, high)]
        axis.errorbar(x, values, yerr=[below, above], label=name, capsize=3)
    if baseline is not None:
        axis.axhline(baseline, color="gray", linestyle=":", label=f"{x_label} = 0")
    axis.set_xscale("log")
    ticks = sorted({point[0] for points in series.values() for point in points})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.legend()
    return to_image(figure)


def to_image(figure: Any) -> Image.Image:
    """Render a figure of matplotlib."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
