"""A first run on photographs: when it validates, what it says before the first step, and what it leaves behind."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import make_shards
import pytest
import yaml
from commands import VQGAN
from PIL import Image

from clipgen.callbacks import few_tokens, lagging_average
from clipgen.cli.config import composed
from clipgen.cli.counts import count_shards
from clipgen.cli.validation import scale_interval, settle_interval, warn_of_few_images


@pytest.fixture
def call(call):
    return partial(call, "clipgen-train")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Sixty pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(60):
        Image.new("RGB", (40, 36), (i * 4, 99, 0)).save(folder / f"{i:02d}.png")
    return folder


OPEN = [*VQGAN, "trainer.val_check_interval=null"]
SMALL = ["data.image_size=32", "data.batch_size=4", "data.num_workers=0", "output=run"]
FOLDER = ["data=folder", "data.root=photos"]
SHARDS = ["data=webdataset", "data.train_urls='shards/train-*.tar'", "data.val_urls='shards/val-*.tar'"]


def grids(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run" / "pictures").glob("reconstructions_*"))


@pytest.mark.parametrize("source", [FOLDER, SHARDS], ids=["folder", "shards"])
def test_a_run_shorter_than_its_first_validation_ends_with_one(call, photos, tmp_path, source):
    """And a folder of one batch an epoch does not validate after every step."""
    make_shards.main([str(photos), "--output", "shards", "--val-fraction", "0.1"])
    result = call(*OPEN, *source, *SMALL)
    assert result.code == 0, result.stderr
    assert grids(tmp_path) == ["reconstructions_0000004.png"]
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["val_check_interval"] == 1000


def test_a_validated_run_is_not_validated_again(call, photos, tmp_path):
    assert call(*VQGAN, *FOLDER, *SMALL, "trainer.max_steps=3", "trainer.val_check_interval=2").code == 0
    assert grids(tmp_path) == ["reconstructions_0000002.png"]


def test_a_fraction_of_an_epoch_is_validated(call, photos, tmp_path):
    more = ["trainer.max_steps=15", "trainer.val_check_interval=0.5", "data.val_fraction=0.01"]
    assert call(*VQGAN, *FOLDER, *SMALL, *more).code == 0
    assert grids(tmp_path) == ["reconstructions_0000007.png", "reconstructions_0000014.png"]


def test_the_last_grids_are_kept(call, photos, tmp_path):
    assert call(*VQGAN, *FOLDER, *SMALL, "trainer.val_check_interval=1", "pictures.keep=2").code == 0
    assert grids(tmp_path) == ["reconstructions_0000003.png", "reconstructions_0000004.png"]


@pytest.mark.parametrize(("images", "interval"), [(0, 1000), (512, 1000), (3300, 2000), (25_600, 8000)])
def test_the_interval_grows_with_the_validation_images(images, interval):
    """So that at most a tenth of the batches are for validation; in modern on shards, too, which have no end."""
    config = composed("stage=vqgan", "experiment=modern", "data=webdataset", "data.train_urls=a", "data.val_urls=b")
    assert settle_interval(config) and config.trainer.check_val_every_n_epoch is None
    trainer = SimpleNamespace(world_size=1)
    scale_interval(config, trainer, SimpleNamespace(val=range(images) if images else None))
    assert trainer.val_check_interval == config.trainer.val_check_interval == interval


def test_images_in_shards_are_estimated_from_the_first(photos, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    make_shards.main(["photos", "--output", "shards", "--shard-size", "10"])
    count = count_shards(sorted(map(str, Path("shards").glob("train-*.tar"))))
    assert str(count) == "about 60 in 6 shards (estimated from the first)"
    assert count_shards(["https://example.org/a.tar"]) is None


@pytest.mark.parametrize("images", [0, 1, 49, 50])
def test_few_validation_images_are_warned_about(caplog, images):
    warn_of_few_images(SimpleNamespace(val=range(images) if images else None))
    assert ("Validation has" in caplog.text) == (images in (1, 49))


def test_ema_weights_and_dead_codes_are_explained_where_they_appear(tiny_vqgan):
    tiny_vqgan.hparams["ema_decay"] = 0.99
    assert "look worse than the training loss until about step 300" in lagging_average(SimpleNamespace(global_step=5),
                                                                                       tiny_vqgan)  # fmt: skip
    assert lagging_average(SimpleNamespace(global_step=300), tiny_vqgan) == ""
    assert few_tokens(tiny_vqgan) == ""
    tiny_vqgan.counts[3] = 15
    assert "their 15 tokens cannot use more than 15 of the 16 codes" in few_tokens(tiny_vqgan)
    tiny_vqgan.counts[3] = 16
    assert few_tokens(tiny_vqgan) == ""
