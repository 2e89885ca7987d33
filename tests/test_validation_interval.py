"""How often a run is validated, and that its last step is."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import make_shards
import pytest
import yaml
from commands import VQGAN
from omegaconf import OmegaConf
from photo_runs import FOLDER, OPEN, SHARDS, SMALL, grids

from clipgen.cli.config import compose_config
from clipgen.training.config import TrainingConfig
from clipgen.training.validation_interval import (
    convert_interval,
    scale_interval,
    set_default_interval,
    warn_of_few_images,
)


@pytest.fixture
def call(call):
    return partial(call, "clipgen-train")


@pytest.mark.parametrize("source", [FOLDER, SHARDS], ids=["folder", "shards"])
def test_short_run_validates_at_its_end(call, photos, tmp_path, source):
    """A folder with one batch per epoch is not validated after every step."""
    make_shards.main([str(photos), "--output", "shards", "--val-fraction", "0.1"])
    result = call(*OPEN, *source, *SMALL)
    assert result.code == 0, result.stderr
    assert grids(tmp_path) == ["reconstructions_0000004.png"]
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["val_check_interval"] == 1000


@pytest.mark.parametrize(("steps", "validated"), [(3, [2, 3]), (4, [2, 4])])
def test_last_step_is_validated_once(call, photos, tmp_path, steps, validated):
    """Otherwise the steps after the last validation could not become the model that is exported."""
    assert call(*VQGAN, *FOLDER, *SMALL, f"trainer.max_steps={steps}", "trainer.val_check_interval=2").code == 0
    assert grids(tmp_path) == [f"reconstructions_{step:07d}.png" for step in validated]


def test_validation_interval_can_be_a_fraction_of_an_epoch(call, photos, tmp_path):
    more = ["trainer.max_steps=15", "trainer.val_check_interval=0.5", "data.val_fraction=0.01"]
    assert call(*VQGAN, *FOLDER, *SMALL, *more).code == 0
    assert grids(tmp_path) == [f"reconstructions_{step:07d}.png" for step in (7, 14, 15)]


def test_validation_interval_counts_optimizer_steps(call, photos, tmp_path):
    more = ["trainer.val_check_interval=2", "model.optimizer.grad_accum_steps=3", "data.val_fraction=0.01"]
    assert call(*VQGAN, *FOLDER, *SMALL, *more).code == 0
    assert grids(tmp_path) == ["reconstructions_0000002.png", "reconstructions_0000004.png"]
    # Resuming with this file must not multiply the interval again.
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["val_check_interval"] == 2


@pytest.mark.parametrize(("accumulated", "expected"), [(1, 4), (3, 12)])
def test_lightning_counts_batches(accumulated, expected):
    model = {"optimizer": {"grad_accum_steps": accumulated}}
    config = TrainingConfig("vqgan", "run", data={}, model=model, trainer={"val_check_interval": 4})
    trainer = SimpleNamespace()
    convert_interval(config, trainer)
    assert trainer.val_check_interval == expected


@pytest.mark.parametrize(("images", "interval"), [(0, 1000), (512, 1000), (3300, 2000), (25_600, 8000)])
def test_validation_interval_grows_with_the_validation_set(images, interval):
    """Validation takes at most a tenth of the batches."""
    config = compose_config(
        "stage=vqgan", "experiment=modern", "data=webdataset", "data.train_urls=a", "data.val_urls=b"
    )
    settings = TrainingConfig.from_dict(OmegaConf.to_container(config, resolve=True))
    assert set_default_interval(settings) and settings.trainer["check_val_every_n_epoch"] is None
    data = SimpleNamespace(val=range(images) if images else None, batch_size=settings.data["batch_size"])
    scale_interval(settings, 1, data)
    assert settings.trainer["val_check_interval"] == interval


@pytest.mark.parametrize("images", [0, 1, 49, 50])
def test_few_validation_images_give_a_warning(caplog, images):
    warn_of_few_images(SimpleNamespace(val=range(images) if images else None))
    assert ("Validation has" in caplog.text) == (images in (1, 49))
    assert ("There is no validation" in caplog.text) == (images == 0)
