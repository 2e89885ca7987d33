"""Validation logs the same metrics on any number of processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import QUIET
from image_data import encoded, make_tar
from models import TRANSFORMER_SIZES, VQGAN_SIZES, make_transformer, make_vqgan
from torch import nn
from torch.utils.data import Dataset

from clipgen.data.datamodule import ImageDataModule
from clipgen.data.folder import folder_data
from clipgen.data.shapes import ShapesDataset
from clipgen.data.webdataset import shard_data
from clipgen.evaluation.reconstruction import ReconstructionMetrics
from clipgen.images import to_pil
from clipgen.models.losses import Averages
from clipgen.training.config import TrainingConfig
from clipgen.training.summary import describe_batch


def test_averages_are_weighted_by_batch_size():
    averages = Averages()
    averages.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)}, 1)
    averages.add({"a": torch.tensor(4.0)}, 2)
    assert averages.compute() == {"a": 3.0, "b": 5.0}
    averages.reset()
    assert averages.compute() == {}


@pytest.mark.parametrize("devices", [1, 8])
def test_log_states_the_effective_batch_size(devices):
    model = {"optimizer": {"grad_accum_steps": 2}}
    config = TrainingConfig("vqgan", "run", data={}, model=model)
    text = describe_batch(config, 32, devices)
    assert text.startswith(f"{64 * devices} images per optimizer step: data.batch_size=32 per device")
    hints = ["8 devices see 8 times", "not scaled", "set effective_batch_size"]
    assert all((hint in text) == (devices == 8) for hint in hints)
    config.effective_batch_size = 64 * devices
    assert not any(hint in describe_batch(config, 32, devices) for hint in hints)


# ------------------------------------------------------------------------------------------------- several processes


class Cached(Dataset):
    """Samples like those of a token cache."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(size)
        self.embeddings = nn.functional.normalize(torch.randn(size, 64, generator=generator), dim=1)

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        return {"indices": torch.arange(16).roll(item), "condition": self.embeddings[item]}


def features(images: torch.Tensor) -> torch.Tensor:
    return nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1)


def data(kind: str, folder: Path, count: int) -> pl.LightningDataModule:
    """Make the data of a run with ``count`` validation images."""
    if kind == "cache":
        return ImageDataModule(Cached(8), Cached(count), batch_size=2)
    images = to_pil(ShapesDataset(count, image_size=32, seed=2).render(range(count)))
    (folder / "images").mkdir()
    for i, image in enumerate(images):
        image.save(folder / "images" / f"{i}.png")
    for name, part in (("a", images[:1]), ("b", images[1:] or images)):
        make_tar(folder / f"{name}.tar", {f"{i}.png": encoded(image, "PNG") for i, image in enumerate(part)})
    if kind == "folder":
        make = folder_data(folder / "images", 32, 1, val_root=folder / "images")
        make.train, make.batch_size = ShapesDataset(8), 2
        return make
    urls = [str(folder / f"{name}.tar") for name in "ab"][-min(count, 2) :]
    make = shard_data(urls, urls, 32, 2)
    make.train = ShapesDataset(8)
    return make


def metrics(kind: str, folder: Path, count: int, devices: int) -> dict[str, float]:
    """Return the validation metrics of a run whose weights do not change."""
    torch.manual_seed(0)
    callbacks: list[pl.Callback] = []
    if kind == "cache":
        model: pl.LightningModule = make_transformer(**TRANSFORMER_SIZES | {"learning_rate": 0.0})
    else:
        model = make_vqgan(**VQGAN_SIZES | {"learning_rate": 0.0, "dead_code_reset_after": 0})
        callbacks = [ReconstructionMetrics(fid_features=f"{__name__}:features" if count > 1 else None)]
    strategy = "auto" if devices == 1 else "ddp_spawn_find_unused_parameters_true"
    trainer = pl.Trainer(
        max_steps=1,
        val_check_interval=1,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        callbacks=callbacks,
        **QUIET,
    )
    folder.mkdir()
    trainer.fit(model, datamodule=data(kind, folder, count))
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"), [("folder", 3), ("folder", 1), ("folder", 5), ("shards", 4), ("shards", 1), ("cache", 3)]
)
def test_two_processes_give_the_validation_metrics_of_one(tmp_path, kind, count):
    """Also if one of them has fewer batches, or none."""
    single, double = (metrics(kind, tmp_path / str(devices), count, devices) for devices in (1, 2))
    assert len(single) >= (1 if kind == "cache" else 7)
    assert double == pytest.approx(single, rel=1e-4)
