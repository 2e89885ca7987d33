"""Images travel from loading processes to the device as bytes."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from conftest import QUIET
from PIL import Image

from clipgen.data.byte_images import pack, packed_collate, unpack
from clipgen.data.datamodule import ImageDataModule
from clipgen.data.folder import ImageFolder


def test_all_levels_of_eight_bits_survive_packing_exactly():
    images = (torch.arange(256.0) / 127.5 - 1).view(1, 1, 16, 16).expand(2, 3, -1, -1)
    assert pack(images).dtype == torch.uint8
    assert torch.equal(unpack(pack(images)), images)


@pytest.mark.parametrize("value", [0.1234, 1.5, -2.0, float("nan")])
def test_other_images_are_not_packed(value):
    """Such as those of a dataset that adds noise."""
    images = torch.zeros(1, 3, 4, 4)
    images[0, 0, 0, 0] = value
    assert pack(images) is images and unpack(images) is images


def test_batches_of_other_datasets_are_unchanged():
    assert torch.equal(packed_collate([torch.zeros(2), torch.ones(2)]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert packed_collate([{"name": "a"}]) == {"name": ["a"]}


class RecordImages(pl.LightningModule):
    """Keep the images before and after they are on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.sent: list[torch.dtype] = []
        self.received: list[torch.Tensor] = []

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.sent.append(batch["images"].dtype)
        return batch

    def training_step(self, batch, batch_idx):
        self.received.append(batch["images"])
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.received.append(batch["images"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_training_receives_the_images_of_the_dataset_as_floats(tmp_path):
    for i in range(4):
        Image.effect_noise((20, 16), 80).convert("RGB").save(tmp_path / f"{i}.png")
    dataset = ImageFolder(tmp_path, image_size=8, train=False)
    module = RecordImages()
    data = ImageDataModule(dataset, dataset, batch_size=4)
    pl.Trainer(max_epochs=1, accelerator="cpu", **QUIET).fit(module, data)
    assert module.sent and set(module.sent) == {torch.uint8}
    images = torch.stack([dataset[i]["images"] for i in range(4)])
    assert len(module.received) == 3  # training, validation, and Lightning's trial of a validation
    for received in module.received:
        assert sorted(received.sum((1, 2, 3)).tolist()) == sorted(images.sum((1, 2, 3)).tolist())
    assert any(torch.equal(received, images) for received in module.received)
