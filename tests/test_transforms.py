"""Crops and flips of images for training and validation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from image_data import random_image
from PIL import Image

from clipgen.data.transforms import train_transform, val_transform


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (60, 60), (31, 30), (30, 37)])
def test_val_transform_equals_resize_then_center_crop(size: tuple[int, int]) -> None:
    image = random_image(*size)
    resized = image.resize((size[0] * 30 // min(size), size[1] * 30 // min(size)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 29) // 2, (resized.height - 29) // 2
    expected = np.asarray(resized.crop((left, top, left + 30, top + 30)), dtype=int)
    actual = ((val_transform(30)(image) + 1) * 127.5).round().int().permute(1, 2, 0).numpy()
    assert np.abs(actual - expected).max() <= 1


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    image = random_image(47, 32)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    windows = [pixels[:, :, i : i + 32] for i in range(16)]
    places = set()
    for _ in range(200):
        images = train_transform(32, flip=False)(image)
        places |= {i for i, window in enumerate(windows) if torch.allclose(images, window)}
        assert any(torch.allclose(images, window) for window in windows)
    assert places == set(range(16))


def test_train_transform_uses_the_global_generator() -> None:
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (32, 1, 3)))
    transform = train_transform(32)
    torch.manual_seed(0)
    first = [transform(ramp) for _ in range(60)]
    torch.manual_seed(0)
    assert all(torch.equal(a, transform(ramp)) for a in first)
    starts = [float(images[0, 0].min()) for images in first]
    assert min(starts) < -0.8 and max(starts) > 0.6  # crops reach both ends
    flipped = sum(bool(images[0, 0, 0] > images[0, 0, -1]) for images in first)
    assert 15 < flipped < 45
    assert not any(t[0, 0, 0] > t[0, 0, -1] for t in (train_transform(32, flip=False)(ramp) for _ in range(20)))


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1), (2, 3)])
def test_extreme_aspect_ratios_are_cropped_before_enlarging(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    resize = Image.Image.resize

    def spy(self: Image.Image, size: tuple[int, int], *args: object, **options: object) -> Image.Image:
        made.append(size)
        return resize(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    for transform in (train_transform(64), val_transform(64)):
        assert transform(Image.new("RGB", size, "white")).unique().tolist() == [1.0]
    assert set(made) == {(64, 64)}


@pytest.mark.parametrize("make", [train_transform, val_transform])
def test_image_size_is_checked(make) -> None:
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        make(0)
