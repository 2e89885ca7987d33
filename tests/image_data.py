"""Small images, folders and shards, and a module that records the images of its batches."""

from __future__ import annotations

import io
import logging
import mmap
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import QUIET, SHARED
from PIL import Image

from clipgen.data.datamodule import ImageDataModule

BAD = SHARED / "data" / "bad_images"
needs_bad = pytest.mark.skipif(not BAD.exists(), reason=f"{BAD} is absent; set CLIPGEN_SHARED")

USABLE = [
    "UPPER.JPEG",
    "alpha.png",
    "animated.gif",
    "café 画像 (1).jpg",
    "cmyk.jpg",
    "exif_rotated.jpg",
    "good_0.jpg",
    "good_1.jpg",
    "good_2.jpg",
    "good_3.jpg",
    "gray16.png",
    "grayscale.jpg",
    "jpeg_named.png",
    "nested/deeper/inner.jpg",
    "one_pixel.png",
    "palette.png",
    "photo.webp",
    "strip.jpg",
]
UNUSABLE = {
    "truncated.jpg": "truncated",
    "empty.jpg": "empty",
    "text.jpg": "not an image",
    "bomb.png": "too large",
}


def random_image(width: int = 20, height: int = 16, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


GOOD = encoded(random_image(200, 160))
TRUNCATED = GOOD[: len(GOOD) // 2]


def square(value: int, kind: str = "PNG") -> bytes:
    """Return a file of an image that is recognized by its red value."""
    return encoded(Image.new("RGB", (8, 8), (value, 0, 0)), kind)


def make_folder(root: Path, count: int, bad: tuple[int, ...] = ()) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        data = encoded(Image.new("RGB", (24, 18), (i * 10, 0, 0)), "PNG")
        (root / f"{i:03d}.png").write_bytes(TRUNCATED if i in bad else data)
    return root


def make_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def numbered_tar(path: Path, values: range) -> Path:
    """Make a shard whose images are recognized by their red value."""
    files = {f"{v:03d}.png": encoded(Image.new("RGB", (8, 8), (v, 0, 0)), "PNG") for v in values}
    return make_tar(path, files)


def red(sample: dict[str, torch.Tensor]) -> int:
    return round((float(sample["images"][0].mean()) + 1) * 127.5)


def is_mapped(array: np.ndarray) -> bool:
    """Return whether an array is in a file that is mapped into memory."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


class Probe(pl.LightningModule):
    """Records the images of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, ...]] = []
        self.validated = 0

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        self.seen.append(tuple(red({"images": image}) for image in batch["images"]))
        return self.weight * batch["images"].mean()

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.validated += len(batch["images"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: ImageDataModule, checkpoint: Path | None = None, **options: object) -> tuple[Probe, pl.Trainer]:
    trainer = pl.Trainer(accelerator="cpu", num_sanity_val_steps=0, **QUIET, **options)
    probe = Probe()
    trainer.fit(probe, data, ckpt_path=checkpoint)
    return probe, trainer
