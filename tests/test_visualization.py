"""Tensors to pictures, grids, PNG files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from clipgen.images import enlarged, grid, save_png, to_pil, wrap


def plain(color: str, size: tuple[int, int] = (4, 4)) -> Image.Image:
    return Image.new("RGB", size, color)


def test_every_8_bit_value_survives():
    levels = torch.arange(256).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    picture = to_pil(levels / 127.5 - 1)[0]
    assert picture.mode == "RGB" and picture.size == (16, 16)
    assert np.array_equal(np.asarray(picture), levels[0].permute(1, 2, 0).numpy())


def test_range_order_and_clamp():
    images = torch.zeros(2, 3, 2, 5)
    images[0, 0], images[0, 1], images[0, 2] = 1.0, -1.0, 9.0
    images[1] = -9.0
    first, second = to_pil(images.requires_grad_())
    assert first.size == (5, 2) and first.getpixel((4, 1)) == (255, 0, 255)
    assert second.getpixel((0, 0)) == (0, 0, 0)
    assert to_pil(torch.ones(1, 3, 2, 2).bfloat16())[0].getpixel((0, 0)) == (255, 255, 255)


def test_grid_places_rows_first():
    sheet = grid([plain(c) for c in ("red", "green", "blue")], columns=2, cell=8)
    assert sheet.size == (2 * 14 + 6, 2 * 14 + 6)
    red, green, blue = (Image.new("RGB", (1, 1), c).getpixel((0, 0)) for c in ("red", "green", "blue"))
    centers = [sheet.getpixel(at) for at in ((10, 10), (24, 10), (10, 24), (24, 24))]
    assert centers == [red, green, blue, (255, 255, 255)]


def test_grid_is_square_by_default_and_never_wider_than_its_pictures():
    assert grid([plain("red")] * 9, cell=8).size == (3 * 14 + 6, 3 * 14 + 6)
    assert grid([plain("red")] * 2, columns=8, cell=8).size == (2 * 14 + 6, 14 + 6)


def test_captions_get_room_and_are_drawn():
    without = grid([plain("red")], cell=64)
    with_caption = grid([plain("red")], cell=64, captions=["a large blue ring on a white background"])
    assert with_caption.height > without.height + 13
    below = np.asarray(with_caption)[6 + 64 :]
    assert below.min() < 128  # ink
    assert np.asarray(with_caption)[6 + 64 :, :6].min() == 255  # nothing in the margin


@pytest.mark.parametrize("letters", ["éü", "кж", "λω"])
def test_captions_of_other_letters_than_asciis_are_legible(letters):
    """Letters that a font lacks all look alike: boxes."""
    one, other = (np.asarray(grid([plain("red")], cell=64, captions=[f"a {letter}"])) for letter in letters)
    assert not np.array_equal(one, other)


def test_small_pictures_keep_hard_pixels_and_large_ones_shrink():
    board = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("RGB")
    assert set(np.unique(np.asarray(enlarged(board, 64)))) == {0, 255}
    assert enlarged(plain("red", (300, 100)), 60).size == (60, 20)


def test_wrapped_lines_fit_and_lose_no_word():
    font, text = ImageFont.load_default(size=11), "a large blue ring on a white background"
    lines = wrap(text, 80, font)
    assert len(lines) > 2 and " ".join(lines) == text
    assert all(font.getlength(line) <= 80 for line in lines)
    broken = wrap("an extraordinarily_long_name of a file", 40, font)
    assert "".join(broken).replace(" ", "") == "anextraordinarily_long_nameofafile" and all(
        font.getlength(row) <= 40 for row in broken
    )
    assert wrap("wide", 1, font) == list("wide")
    assert wrap("", 80, font) == [""]


def test_png_with_metadata(tmp_path):
    prompt = 'ein großer blauer Ring, 画像 "quoted"\nand a second line'
    path = save_png(plain("red"), tmp_path / "ring.png", dict(prompt=prompt, seed=7, top_p=0.9, rerank_from=None))
    again = Image.open(path)
    assert again.getpixel((0, 0)) == (255, 0, 0) and again.text["prompt"] == prompt
    assert [json.loads(again.text[name]) for name in ("seed", "top_p", "rerank_from")] == [7, 0.9, None]
    assert [p.name for p in tmp_path.iterdir()] == ["ring.png"]


def test_png_without_metadata(tmp_path):
    assert Image.open(save_png(plain("red"), str(tmp_path / "x.png"))).text == {}


def test_a_write_that_fails_leaves_the_old_picture(tmp_path, monkeypatch):
    path = save_png(plain("red"), tmp_path / "x.png")

    def half(self, target, **_):
        target.write_bytes(b"\x89PNG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="No space left"):
        save_png(plain("green"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)
