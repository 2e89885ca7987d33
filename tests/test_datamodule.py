"""The loaders of a dataset, and training with them."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hydra.utils import instantiate
from image_data import GOOD, TRUNCATED, fit, make_folder, make_tar, numbered_tar
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset, TensorDataset

from clipgen.data.datamodule import ImageDataModule, training_images
from clipgen.data.folder import folder_data
from clipgen.data.webdataset import shard_data

ROOT = Path(__file__).parents[1]


def test_images_for_the_initialization_need_no_order_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An order of 10^9 images would take 8 GB in every process."""

    class ManyImages(Dataset):
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"images": torch.tensor(index)}

    monkeypatch.setattr(torch, "randperm", None)
    loader = DataLoader(ManyImages())
    ranks = [SimpleNamespace(train_dataloader=loader, global_rank=rank, world_size=2) for rank in range(2)]
    chosen = [torch.cat(list(training_images(rank, 6, 4))).tolist() for rank in ranks]
    assert len({*chosen[0], *chosen[1]}) == 12


def test_training_on_a_folder_resumes_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path / "photos", 11, bad=(3,))

    def data() -> ImageDataModule:
        return folder_data(tmp_path / "photos", 8, batch_size=4, val_fraction=0.1, flip=False, seed=1)

    uninterrupted, _ = fit(data(), max_epochs=3)
    assert len(uninterrupted.seen) == 6 and all(len(batch) == 4 for batch in uninterrupted.seen)
    assert uninterrupted.seen[:2] != uninterrupted.seen[2:4]
    assert uninterrupted.validated == 3
    half, trainer = fit(data(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, _ = fit(data(), tmp_path / "half.ckpt", max_epochs=3)
    assert half.seen + rest.seen == uninterrupted.seen


def test_overfit_batches_repeats_the_same_batch(tmp_path: Path) -> None:
    probe, _ = fit(
        folder_data(make_folder(tmp_path, 9), 8, batch_size=4, val_fraction=0), overfit_batches=1, max_epochs=3
    )
    assert len(set(probe.seen)) == 1


def test_training_on_shards_logs_skipped_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    numbered_tar(tmp_path / "train.tar", range(10))
    make_tar(tmp_path / "val.tar", {"0.jpg": GOOD, "1.jpg": TRUNCATED})
    data = shard_data(f"{tmp_path}/train.tar", f"{tmp_path}/val.tar", 8, batch_size=4, num_workers=1)
    probe, _ = fit(data, max_steps=5, val_check_interval=5, check_val_every_n_epoch=None)
    assert len(probe.seen) == 5 and probe.validated == 1
    assert f"{tmp_path}/val.tar: 1 image, 1 skipped: 1 truncated" in caplog.messages
    assert any(message.startswith(f"{tmp_path}/train.tar: ") for message in caplog.messages)


def test_data_module_arguments_are_checked() -> None:
    dataset = TensorDataset(torch.zeros(6, 3, 8, 8))
    for options, message in [
        ({"batch_size": 0}, "^data.batch_size must be at least 1, got 0"),
        ({"batch_size": 7}, "data.batch_size must be at most 6, the training images, got 7"),
        ({"batch_size": 2, "num_workers": -1}, "^data.num_workers must be at least 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            ImageDataModule(dataset, None, **options)
    data = ImageDataModule(dataset, dataset, batch_size=4)
    assert len(data.train_dataloader()) == 1  # full batches only
    assert [len(batch[0]) for batch in data.val_dataloader()] == [4, 2]
    assert ImageDataModule(dataset, None, batch_size=4).val_dataloader() == []


def test_loader_fetches_whole_batches_from_the_dataset() -> None:
    class Batched(TensorDataset):
        calls: ClassVar[list[list[int]]] = []

        def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
            self.calls.append(indices)
            return [{"images": self.tensors[0][i]} for i in indices]

    dataset = Batched(torch.zeros(6, 3, 8, 8))
    list(ImageDataModule(dataset, dataset, batch_size=3).train_dataloader())
    assert [len(call) for call in dataset.calls] == [3, 3]


@pytest.mark.parametrize("name", ["folder", "webdataset"])
def test_bundled_configs_make_the_data_module(name: str, tmp_path: Path) -> None:
    make_folder(tmp_path, 20)
    numbered_tar(tmp_path / "a.tar", range(4))
    config = OmegaConf.create({"seed": 5, "data": OmegaConf.load(ROOT / "configs" / "data" / f"{name}.yaml")})
    assert config.data.image_size == 256 and config.data.batch_size == 16
    urls = {"train_urls": f"{tmp_path}/a.tar", "val_urls": None}
    config.data.update({"root": str(tmp_path)} if name == "folder" else urls)
    data = instantiate(config.data, _convert_="all")
    assert isinstance(data, ImageDataModule) and data.seed == 5
    assert next(iter(data.train))["images"].shape == (3, 256, 256)
