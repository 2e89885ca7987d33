"""``clipgen-demo``: everything from nothing, on nets that learn nothing in two steps."""

from __future__ import annotations

import json
from functools import partial

import pytest
from commands import everything
from PIL import Image

TINY = ["trainer.max_steps=2", "trainer.val_check_interval=1", "data.train_size=64", "data.val_size=64"]


@pytest.fixture
def call(call):
    return partial(call, "clipgen-demo")


def test_demo(call, tmp_path):
    """In a folder whose name Hydra's grammar could not read."""
    done = call("--output", "de mo (1)", "--seed", 3, *TINY)
    output = tmp_path / "de mo (1)"
    assert done.code == 0, done.stderr
    names = {"grid.png", "reconstructions.png", "losses.png", "report.json", "vqgan", "transformer"}
    assert {path.name for path in output.iterdir()} == names and everything(tmp_path) > {"de mo (1)/grid.png"}
    for name in ("grid", "reconstructions", "losses"):
        picture = Image.open(output / f"{name}.png").convert("L")
        assert picture.width > 200 and picture.getextrema()[0] < 200
    report = json.loads((output / "report.json").read_text())
    assert set(report["accuracy"]) == {"all", "shape", "color", "size", "background"}
    assert all(0 <= value <= 1 for value in report["accuracy"].values())
    assert report["accuracy"]["all"] <= min(report["accuracy"].values())
    parts = {"imports", "vqgan", "transformer", "sampling", "plots"}
    assert set(report["seconds"]) == {*parts, "total"}
    sampling = {"temperature": 1.0, "top_k": 300, "top_p": 0.8}
    assert report["settings"] == {"seed": 3, "overrides": TINY, "prompts": 200, "sampling": sampling}
    assert "torch" in report["versions"]
    for word in ("Training stage=vqgan", "Training stage=transformer", "background", "clipgen-sample --checkpoint"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.chh=1"], "there is no key model.chh"),
        (["trainer.max_steps"], "arguments must be KEY=VALUE, got trainer.max_steps"),
        (["stage=vqgan"], "overrides must leave stage, output and vqgan to the demo, got stage=vqgan"),
        (["output=x"], "overrides must leave stage, output and vqgan"),
        (["model.n_layer=1"], "there is no key model.n_layer"),  # of stage 2 alone: said before stage 1 is trained
        (["trainer.max_steps=many"], "trainer.max_steps must be int, got 'many'"),
        (["--output", "/proc/none"], "output must be a folder that can be written to, got /proc/none/vqgan"),
    ],
)
def test_refusals(call, tmp_path, arguments, message):
    result = call(*arguments, *([] if "--output" in arguments else ["--output", "demo"]))
    assert result.code == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"clipgen-demo: error: {message}"), result.stderr
    assert everything(tmp_path) == set()
