"""Conversion of image tensors to PIL images, and PNG files with metadata."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from clipgen.data.decoding import decode_image
from clipgen.images import from_pil, psnr, rounded, save_png, to_pil


def solid(color: str) -> Image.Image:
    return Image.new("RGB", (4, 4), color)


def test_every_8_bit_value_survives():
    levels = torch.arange(256).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    image = to_pil(levels / 127.5 - 1)[0]
    assert image.mode == "RGB" and image.size == (16, 16)
    assert np.array_equal(np.asarray(image), levels[0].permute(1, 2, 0).numpy())


def test_rounded_images_are_those_of_a_file():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    assert torch.equal(rounded(images), torch.cat([from_pil(image) for image in to_pil(images)]))


def test_channels_keep_their_order_and_values_are_clamped():
    images = torch.zeros(2, 3, 2, 5)
    images[0, 0] = 1.0
    images[0, 1] = -1.0
    images[0, 2] = 9.0
    images[1] = -9.0
    first, second = to_pil(images.requires_grad_())
    assert first.size == (5, 2) and first.getpixel((4, 1)) == (255, 0, 255)
    assert second.getpixel((0, 0)) == (0, 0, 0)
    assert to_pil(torch.ones(1, 3, 2, 2).bfloat16())[0].getpixel((0, 0)) == (255, 255, 255)


def test_photos_are_turned_upright(tmp_path):
    """As the commands do; the tags of a photo that cannot be read are ignored."""
    photo = Image.new("RGB", (16, 16), "black")
    photo.paste("white", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: the upper half is on the right
    photo.save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as opened:
        upright = from_pil(opened)
        assert opened.getexif()[0x0112] == 6
    assert upright[..., 8:].eq(1).all() and upright[..., :8].eq(-1).all()
    assert torch.equal(from_pil(decode_image(tmp_path / "photo.png")), upright)
    photo.info["exif"] = b"Exif\0\0nonsense"
    assert from_pil(photo)[:, :, :8].eq(1).all()


def test_png_metadata_is_read_back(tmp_path):
    prompt = 'ein großer blauer Ring, 画像 "quoted"\nand a second line'
    metadata = dict(prompt=prompt, seed=7, top_p=0.9, rerank_from=None)
    path = save_png(solid("red"), tmp_path / "ring.png", metadata)
    image = Image.open(path)
    assert image.getpixel((0, 0)) == (255, 0, 0) and image.text["prompt"] == prompt
    assert [json.loads(image.text[name]) for name in ("seed", "top_p", "rerank_from")] == [7, 0.9, None]
    assert [file.name for file in tmp_path.iterdir()] == ["ring.png"]


def test_png_without_metadata_has_no_text_chunks(tmp_path):
    assert Image.open(save_png(solid("red"), str(tmp_path / "x.png"))).text == {}


def test_a_failed_write_keeps_the_old_image(tmp_path, monkeypatch):
    path = save_png(solid("red"), tmp_path / "x.png")

    def fail_halfway(self, target, **_):
        target.write_bytes(b"\x89PNG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail_halfway)
    with pytest.raises(OSError, match="No space left"):
        save_png(solid("green"), path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)


def test_psnr_is_that_of_pixel_values_in_0_1():
    images = torch.zeros(2, 3, 4, 4)
    reconstructions = images.clone()
    reconstructions[1] += 0.2  # 0.1 of the range
    assert psnr(images, reconstructions).tolist() == pytest.approx([100, 20], abs=1e-4)
