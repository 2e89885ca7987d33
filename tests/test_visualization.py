"""Grids of images with captions."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from clipgen.visualization import break_word, code_colors, code_grid, grid, resize_to_cell, wrap


def solid(color: str, size: tuple[int, int] = (4, 4)) -> Image.Image:
    return Image.new("RGB", size, color)


def test_grid_fills_rows_first():
    sheet = grid([solid(color) for color in ("red", "green", "blue")], columns=2, cell=8)
    assert sheet.size == (2 * 14 + 6, 2 * 14 + 6)
    red, green, blue = (solid(color).getpixel((0, 0)) for color in ("red", "green", "blue"))
    centers = [sheet.getpixel(position) for position in ((10, 10), (24, 10), (10, 24), (24, 24))]
    assert centers == [red, green, blue, (255, 255, 255)]


def test_grid_is_square_by_default_and_has_no_empty_columns():
    assert grid([solid("red")] * 9, cell=8).size == (3 * 14 + 6, 3 * 14 + 6)
    assert grid([solid("red")] * 2, columns=8, cell=8).size == (2 * 14 + 6, 14 + 6)


def test_captions_are_drawn_below_the_images():
    without = grid([solid("red")], cell=64)
    with_caption = grid([solid("red")], cell=64, captions=["a large blue ring on a white background"])
    assert with_caption.height > without.height + 13
    below = np.asarray(with_caption)[6 + 64 :]
    assert below.min() < 128, "no text"
    assert below[:, :6].min() == 255, "text in the margin"


@pytest.mark.parametrize("letters", ["éü", "кж", "λω"])
def test_captions_may_have_non_ascii_letters(letters):
    """Letters that a font lacks all look alike: boxes."""
    first, second = (np.asarray(grid([solid("red")], cell=64, captions=[f"a {letter}"])) for letter in letters)
    assert not np.array_equal(first, second)


def test_small_images_keep_sharp_pixels_and_large_ones_shrink():
    checkerboard = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("RGB")
    assert set(np.unique(np.asarray(resize_to_cell(checkerboard, 64)))) == {0, 255}
    assert resize_to_cell(solid("red", (300, 100)), 60).size == (60, 20)


def test_wrapped_lines_fit_and_keep_all_words():
    font = ImageFont.load_default(size=11)
    text = "a large blue ring on a white background"
    lines = wrap(text, 80, font)
    assert len(lines) > 2 and " ".join(lines) == text
    assert all(font.getlength(line) <= 80 for line in lines)


def test_words_wider_than_a_line_are_broken():
    font = ImageFont.load_default(size=11)
    lines = wrap("an extraordinarily_long_name of a file", 40, font)
    assert "".join(lines).replace(" ", "") == "anextraordinarily_long_nameofafile"
    assert all(font.getlength(line) <= 40 for line in lines)
    assert wrap("wide", 1, font) == list("wide")
    assert wrap("", 80, font) == [""]


def test_codes_are_cells_in_the_color_of_the_code():
    codebook = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    indices = torch.tensor([[3, 0, 3], [1, 2, 15]])
    sheet = code_grid(indices, codebook, cell=20)
    assert sheet.size == (60, 40)
    colors = code_colors(codebook)
    for y in range(2):
        for x in range(3):
            assert sheet.getpixel((20 * x, 20 * y)) == tuple(colors[indices[y, x]].tolist())
    # The number is drawn in the middle.
    assert np.asarray(sheet.crop((0, 0, 20, 20)).convert("L")).std() > 0


@pytest.mark.parametrize("dimensions", [1, 2, 8])
def test_similar_codes_have_similar_colors(dimensions):
    codebook = torch.linspace(-1, 1, 32)[:, None] * torch.ones(dimensions)
    colors = code_colors(codebook).float()
    assert colors.shape == (32, 3)
    steps = (colors[1:] - colors[:-1]).norm(dim=1)
    assert (colors[0] - colors[-1]).norm() > 4 * steps.max() > 0


def test_long_captions_are_drawn_quickly_and_cut():
    font = ImageFont.load_default(size=11)
    start = time.perf_counter()
    assert "".join(break_word("a" * 100_000, 128, font)) == "a" * 100_000
    assert " ".join(wrap("ab " * 30_000, 128, font)).split() == ["ab"] * 30_000
    sheet = grid([Image.new("RGB", (8, 8))], captions=["a" * 1_000_000])
    assert time.perf_counter() - start < 20 and sheet.height < 1000
