"""Image files of many kinds are decoded, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import BAD, TRUNCATED, UNUSABLE, USABLE, encoded, needs_bad, random_image
from PIL import Image

from clipgen.data.decoding import UnusableImageError, check_header, decode_image
from clipgen.data.transforms import train_transform, val_transform


def test_orientation_is_applied_despite_other_broken_tags() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x0131] = 6, "description", "software"
    data = bytearray(encoded(random_image(20, 16), exif=exif))
    assert decode_image(bytes(data)).size == (16, 20)
    start = data.index(b"Exif")
    sizes = set()
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(data)
        broken[start + 30 + rng.integers(30)] = rng.integers(256)
        sizes.add(decode_image(bytes(broken)).size)
    assert sizes <= {(16, 20), (20, 16)}


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)
def test_lossless_formats_keep_their_pixels(format: str, options: dict[str, object]) -> None:
    image = random_image()
    assert np.array_equal(decode_image(encoded(image, format, **options)), image)


@pytest.mark.parametrize("dtype", ["<u2", "int32", "float32"])
def test_high_depth_gray_is_scaled_not_clipped(dtype: str) -> None:
    top = 1.0 if dtype == "float32" else 65535
    ramp = (np.linspace(0, 1, 256) * top).reshape(16, 16).astype(dtype)
    gray = np.asarray(decode_image(encoded(Image.fromarray(ramp), "TIFF")))[..., 0].ravel()
    assert np.abs(gray.astype(int) - np.arange(256)).max() <= 1


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    for format, source in (("PNG", image), ("PNG", image.convert("LA")), ("GIF", image)):
        decoded = decode_image(encoded(source, format))
        assert decoded.mode == "RGB" and decoded.getpixel((3, 3)) == (255, 255, 255)
    assert decode_image(encoded(image, "PNG")).getpixel((0, 0)) == (255, 0, 0)


def test_cmyk_keeps_its_color() -> None:
    color = decode_image(encoded(Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK"))).getpixel((8, 8))
    assert np.abs(np.subtract(color, (200, 40, 90))).max() < 6


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"no image", "not an image"),
        (TRUNCATED, "truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_unusable_content_is_refused_with_its_reason(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnusableImageError) as caught:
        decode_image(data)
    assert caught.value.reason == reason
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    with pytest.raises(UnusableImageError, match=reason):
        decode_image(path)


def test_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnusableImageError, match=r"unreadable.*gone.jpg"):
        decode_image(tmp_path / "gone.jpg")


def test_size_is_checked_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    check_header(TRUNCATED)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 16 // 2 - 1)  # Pillow refuses more than twice this
    with pytest.raises(UnusableImageError, match="320 pixels") as caught:
        check_header(encoded(random_image(20, 16), "PNG"))
    assert caught.value.reason == "too large"


@needs_bad
@pytest.mark.parametrize("name", USABLE)
def test_usable_photos_decode_and_transform(name: str) -> None:
    image = decode_image(BAD / name)
    assert image.mode == "RGB"
    for transform in (train_transform(32), val_transform(32)):
        images = transform(image)
        assert images.shape == (3, 32, 32) and images.dtype == torch.float32
        assert images.min() >= -1 and images.max() <= 1


@needs_bad
@pytest.mark.parametrize(("name", "reason"), UNUSABLE.items())
def test_unusable_photos_are_refused_with_their_reason(name: str, reason: str) -> None:
    with pytest.raises(UnusableImageError) as caught:
        decode_image(BAD / name)
    assert caught.value.reason == reason


@needs_bad
def test_decoded_photos_have_the_right_size_and_color() -> None:
    assert decode_image(BAD / "exif_rotated.jpg").size == (160, 200)
    assert decode_image(BAD / "animated.gif").size == (64, 64)
    assert decode_image(BAD / "one_pixel.png").size == (1, 1)
    gray = np.asarray(decode_image(BAD / "gray16.png"))
    assert 20 < gray.mean() < 235 and (gray == 255).mean() < 0.2  # Pillow's own conversion is white everywhere
    alpha = Image.open(BAD / "alpha.png").getchannel("A")
    clear = np.asarray(alpha) == 0
    assert clear.any() and (np.asarray(decode_image(BAD / "alpha.png"))[clear] == 255).all()
    with pytest.raises(UnusableImageError, match="900000000"):
        check_header(BAD / "bomb.png")


@pytest.mark.parametrize(("size", "decoded"), [((2000, 1040), (1000, 520)), ((1023, 1200), (1023, 1200))])
def test_large_jpegs_are_decoded_at_reduced_size(size: tuple[int, int], decoded: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (26, 50, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC), "JPEG")
    reduced = decode_image(data, image_size=256)
    assert reduced.size == decoded and decode_image(data).size == size
    crop = val_transform(256)
    assert (crop(reduced) - crop(decode_image(data))).abs().mul(127.5).max() < 5  # levels of 256
