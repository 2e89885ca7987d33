"""A first run on photographs: validation interval, summary, image grids and early errors."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import make_shards
import pytest
import torch
import yaml
from commands import TRANSFORMER, VQGAN
from models import TRANSFORMER_SIZES, VQGAN_SIZES, make_transformer, make_vqgan
from omegaconf import OmegaConf
from PIL import Image

from clipgen import VQGAN as Tokenizer
from clipgen.cli.config import compose_config
from clipgen.data.webdataset import estimate_images
from clipgen.training.callbacks.metric_printer import explain_dead_codes, explain_ema
from clipgen.training.config import TrainingConfig
from clipgen.training.summary import activation_bytes
from clipgen.training.validation_interval import scale_interval, set_default_interval, warn_of_few_images


@pytest.fixture
def call(call):
    return partial(call, "clipgen-train")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Return a folder of sixty images."""
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
    return sorted(path.name for path in (tmp_path / "run" / "grids").glob("reconstructions_*"))


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


def test_only_the_last_grids_are_kept(call, photos, tmp_path):
    assert call(*VQGAN, *FOLDER, *SMALL, "trainer.val_check_interval=1", "image_logger.keep=2").code == 0
    assert grids(tmp_path) == ["reconstructions_0000003.png", "reconstructions_0000004.png"]


@pytest.mark.parametrize(("images", "interval"), [(0, 1000), (512, 1000), (3300, 2000), (25_600, 8000)])
def test_validation_interval_grows_with_the_validation_set(images, interval):
    """Validation takes at most a tenth of the batches."""
    config = compose_config(
        "stage=vqgan", "experiment=modern", "data=webdataset", "data.train_urls=a", "data.val_urls=b"
    )
    settings = TrainingConfig.from_dict(OmegaConf.to_container(config, resolve=True))
    assert set_default_interval(settings) and settings.trainer["check_val_every_n_epoch"] is None
    trainer = SimpleNamespace(world_size=1)
    data = SimpleNamespace(val=range(images) if images else None, batch_size=settings.data["batch_size"])
    scale_interval(settings, trainer, data)
    assert trainer.val_check_interval == settings.trainer["val_check_interval"] == interval


def test_images_in_shards_are_estimated_from_the_first(photos, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    make_shards.main(["photos", "--output", "shards", "--shard-size", "10"])
    count = estimate_images(sorted(map(str, Path("shards").glob("train-*.tar"))))
    assert str(count) == "about 60 in 6 shards (estimated from the first)"
    assert estimate_images(["https://example.org/a.tar"]) is None


@pytest.mark.parametrize("images", [0, 1, 49, 50])
def test_few_validation_images_give_a_warning(caplog, images):
    warn_of_few_images(SimpleNamespace(val=range(images) if images else None))
    assert ("Validation has" in caplog.text) == (images in (1, 49))
    assert ("There is no validation" in caplog.text) == (images == 0)


def test_training_without_validation_exports_its_last_checkpoint(call, photos, tmp_path, caplog):
    """As with variant=printed, which trains on all images of a folder."""
    result = call(*VQGAN, *FOLDER, *SMALL, "data.val_fraction=0")
    assert result.code == 0, result.stderr
    assert "There is no validation" in caplog.text
    assert not (tmp_path / "run/checkpoints/best.ckpt").exists()
    exported = Tokenizer.load(tmp_path / "run/vqgan").state_dict()
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    name = next(name for name in exported if name.endswith("conv_in.weight"))
    assert torch.equal(exported[name], last[name])


def test_lagging_ema_and_dead_codes_are_explained(tiny_vqgan):
    tiny_vqgan.optimizer_config = replace(tiny_vqgan.optimizer_config, ema_decay=0.99)
    assert "look worse than the training loss until about step 300" in explain_ema(
        SimpleNamespace(global_step=5), tiny_vqgan
    )
    assert explain_ema(SimpleNamespace(global_step=300), tiny_vqgan) == ""
    assert explain_dead_codes(tiny_vqgan) == ""
    tiny_vqgan.counts[3] = 15
    assert "their 15 tokens cannot use more than 15 of the 16 codes" in explain_dead_codes(tiny_vqgan)
    tiny_vqgan.counts[3] = 16
    assert explain_dead_codes(tiny_vqgan) == ""


# ------------------------------------------------------------------------------------------- before the first step


def test_summary_is_logged_before_the_first_step(call, photos, caplog):
    caplog.set_level(logging.INFO)
    (photos / "broken.png").write_bytes(b"no picture")
    batch = ["model.optimizer.grad_accum_steps=2", "effective_batch_size=8"]
    assert call(*OPEN, *FOLDER, *SMALL, *batch).code == 0
    for line in (
        "Images:     59 for training, 1 held out for validation, 1 skipped so far",
        "Batch:      8 images per optimizer step: data.batch_size=4 per device x 2 accumulated batches",
        "Tokens:     4 x 4 = 16 per image of 32 x 32 pixels, from a codebook of 16",
        "Length:     4 steps, each image about 0.542 times; validation every 2000 batches",
    ):
        assert line in caplog.text
    assert re.search(r"Parameters: 0\.\d M to train, on cpu", caplog.text)
    assert re.search(r"Memory:     about \S+ GiB per device \(estimated\): weights, .* activations", caplog.text)
    assert "Validation has 1 image:" in caplog.text


@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimated_activations_match_what_autograd_saves(tiny_vqgan, images, checkpointing):
    """For a real batch, without the quantizer."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    vqgan = make_vqgan(**VQGAN_SIZES, grad_checkpointing=checkpointing).train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        reconstruction = vqgan.autoencode(images)[0]
    weights = {p.untyped_storage().data_ptr() for p in vqgan.parameters()}
    real = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)
    assert reconstruction.requires_grad
    assert activation_bytes(vqgan) * len(images) == pytest.approx(real, rel=0.1)


def test_estimated_activations_grow_with_the_layers(tiny_transformer):
    deeper = make_transformer(**{**TRANSFORMER_SIZES, "n_layer": 4})
    more = activation_bytes(deeper) - activation_bytes(tiny_transformer)
    tokens, width = tiny_transformer.num_tokens, tiny_transformer.hparams["n_embd"]
    assert 2 * 12 * tokens * width * 4 < more < 2 * 40 * tokens * width * 4  # arXiv:2205.05198: 34 per token and width


def test_newest_finished_tokenizer_is_used_and_logged(call, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = ["data.train_size=64", "data.val_size=8"]
    assert call(*VQGAN, *data, "output=outputs/vqgan/first").code == 0
    unfinished = tmp_path / "outputs" / "vqgan" / "second" / "checkpoints" / "last.ckpt"
    unfinished.parent.mkdir(parents=True)
    unfinished.touch()
    os.utime(unfinished, (2e9, 2e9))
    assert call(*TRANSFORMER, *data, "output=run2").code == 0
    assert "Tokenizer: outputs/vqgan/first, the newest finished one" in caplog.text
    assert (
        "Passed over outputs/vqgan/second, which is not finished: clipgen-train resume=outputs/vqgan/second"
        in caplog.text
    )
    (tmp_path / "outputs").rename(tmp_path / "elsewhere")
    resumed = call("resume=run2", "trainer.max_steps=5")  # its own copy
    assert resumed.code == 0, resumed.stderr


# --------------------------------------------------------------------------------------------------- errors in time

EARLY = {
    "clipgen-train": "clipgen.cli.train",
    "clipgen-train stage=vqgan model.chh=1": "clipgen.cli.train",
    "clipgen-train stage=vqgan data=folder data.root=/none": "clipgen.cli.train",
    "clipgen-train stage=vqgan data=webdataset data.train_urls=/none.tar data.val_urls=null": "clipgen.cli.train",
    "clipgen-train stage=transformer": "clipgen.cli.train",
    "clipgen-train stage=transformer vqgan=/none": "clipgen.cli.train",
    "clipgen-sample": "clipgen.cli.sample",
    "clipgen-sample --checkpoint /none ring": "clipgen.cli.sample",
    "clipgen-sample --image /none.png": "clipgen.cli.sample",
    "clipgen-sample --outpaint /none.png": "clipgen.cli.sample",
    "clipgen-sample --reproduce /none.png": "clipgen.cli.sample",
    "clipgen-sample --prompts-file /none.txt": "clipgen.cli.sample",
    "clipgen-encode": "clipgen.cli.encode",
    "clipgen-encode vqgn=x": "clipgen.cli.encode",
    "clipgen-encode vqgan=/none output=x": "clipgen.cli.encode",
    "clipgen-sample --top-p 2 ring": "clipgen.cli.sample",
    "clipgen-eval": "clipgen.cli.evaluate",
    "clipgen-eval --checkpoint /none --captions shapes": "clipgen.cli.evaluate",
    "clipgen-eval --checkpoint shapes --captions /none --features none": "clipgen.cli.evaluate",
    "clipgen-eval --checkpoint shapes --captions shapes --top-p 2 --features none": "clipgen.cli.evaluate",
    "clipgen-eval --images /none --features none": "clipgen.cli.evaluate",
    "clipgen-eval --vqgan /none --reference shapes": "clipgen.cli.evaluate",
    "clipgen-eval --vqgan shapes --reference /none": "clipgen.cli.evaluate",
    "clipgen-convert": "clipgen.cli.convert",
    "clipgen-baseline": "clipgen.cli.baseline",
    "clipgen-baseline vqgan-clip": "clipgen.cli.baseline",
    "clipgen-baseline vqgan-clip --checkpoint /none --prompt ring": "clipgen.cli.baseline",
    "clipgen-baseline vqgan-clip --vqgan /none --prompt ring": "clipgen.cli.baseline",
    "clipgen-baseline biggan-clip --generator biggan:/none --prompt ring": "clipgen.cli.baseline",
    "clipgen-baseline search --generator /none --prompt ring": "clipgen.cli.baseline",
    "clipgen-baseline class --checkpoint /none --class dog": "clipgen.cli.baseline",
    "clipgen-app --checkpoint /none": "clipgen.cli.app",
    "clipgen-demo model.chh=1": "clipgen.cli.demo",
    "clipgen-demo --resume": "clipgen.cli.demo",
}


@pytest.mark.parametrize("line", EARLY)
def test_early_errors_do_not_import_torch(line, tmp_path):
    """Importing torch takes seconds, on some laptops half a minute."""
    code = f"import sys, {EARLY[line]} as module; sys.argv = {line.split()}\n" + (
        "try: module.main()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert re.fullmatch("[12] False", done.stdout.strip()), done
    assert f"{line.split()[0]}: error: " in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
