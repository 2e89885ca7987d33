"""A first run on photographs: image grids, explanations and early errors."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from commands import VQGAN
from photo_runs import FOLDER, SMALL, grids

from clipgen import VQGAN as Tokenizer
from clipgen.training.callbacks.metric_printer import explain_dead_codes, explain_ema


@pytest.fixture
def call(call):
    return partial(call, "clipgen-train")


def test_only_the_last_grids_are_kept(call, photos, tmp_path):
    assert call(*VQGAN, *FOLDER, *SMALL, "trainer.val_check_interval=1", "image_logger.keep=2").code == 0
    assert grids(tmp_path) == ["reconstructions_0000003.png", "reconstructions_0000004.png"]


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


# --------------------------------------------------------------------------------------------------- errors in time

EARLY = {
    "clipgen-train": "clipgen.cli.train",
    "clipgen-train stage=vqgan model.chh=1": "clipgen.cli.train",
    "clipgen-train stage=vqgan data=folder data.root=/none": "clipgen.cli.train",
    "clipgen-train stage=vqgan data=webdataset data.train_urls=/none.tar data.val_urls=null": "clipgen.cli.train",
    "clipgen-train stage=vqgan resume=/none": "clipgen.cli.train",
    "clipgen-train stage=vqgan init_from=/none": "clipgen.cli.train",
    "clipgen-train stage=transformer": "clipgen.cli.train",
    "clipgen-train stage=transformer vqgan=/none": "clipgen.cli.train",
    "clipgen-train stage=transformer data=cached": "clipgen.cli.train",
    "clipgen-sample": "clipgen.cli.sample",
    "clipgen-sample --checkpoint /none ring": "clipgen.cli.sample",
    "clipgen-sample --image /none.png": "clipgen.cli.sample",
    "clipgen-sample --outpaint /none.png": "clipgen.cli.sample",
    "clipgen-sample --reproduce /none.png": "clipgen.cli.sample",
    "clipgen-sample --prompts-file /none.txt": "clipgen.cli.sample",
    "clipgen-sample --num-images 0 ring": "clipgen.cli.sample",
    "clipgen-sample --rerank-from 2 --num-images 4 ring": "clipgen.cli.sample",
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
    "clipgen-convert taming none.ckpt none.yaml --output x": "clipgen.cli.convert",
    "clipgen-convert hfailab none.pt --output x": "clipgen.cli.convert",
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
