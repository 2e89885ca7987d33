"""On a GPU, where there is one, pictures and trainings are a CPU's; what the tests ask for holds on a CPU, too."""

from __future__ import annotations

import copy
import csv
import math

import pytest
import torch
from commands import PROMPT, SHAPES, TRANSFORMER, VQGAN

from clipgen.processor import has_bf16_units

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GUIDED = dict(guidance_scale=2.0, guidance_power=1.0, top_p=0.9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [{}, GUIDED, dict(temperature=0.0)])
def test_a_seed_draws_the_same_on_any_device(pipe, device, settings):
    """But for a GPU's rounding in convolutions (TF32)."""
    there = copy.deepcopy(pipe).to(device)
    e = pipe.embed(PROMPT).expand(3, -1)
    found, expected = there.generate(e.to(device), 5, **settings), pipe.generate(e, 5, **settings)
    assert found.device.type == device
    torch.testing.assert_close(found.cpu(), expected, atol=0.02, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_pictures_are_the_same_pictures(pipe, device):
    """Whatever was drawn before: CUDA graphs use their memory again."""
    pipe = pipe.to(device)
    compiled, e = copy.deepcopy(pipe).compile(), pipe.embed(PROMPT)
    for rows, settings in ((3, {}), (1, {}), (3, {}), (2, GUIDED)):
        found, expected = (each.generate(e.expand(rows, -1), 5, **settings) for each in (compiled, pipe))
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_both_stages_train_and_draw(call, tmp_path, device):
    """In bfloat16 and compiled, with all that a recipe may switch on; stopped and resumed in between."""
    precision = "bf16-mixed" if has_bf16_units(device) else "32-true"
    common = [
        f"trainer.accelerator={device}",
        f"trainer.precision={precision}",
        f"model.compile={device == 'cuda'}",
        "model.optimizer.ema_decay=0.9",
        "logger=csv",
        *SHAPES,
    ]
    gan = [
        "model.channels_last=true",
        "model.quantizer.kmeans_iters=2",
        "model.quantizer.codebook_ema_decay=0.9",
        "model.gan.lecam_weight=0.1",
        "model.gan.weight=0.5",
        "model.gan.start_step=1",
        "model.gan.channels=8",
        "model.gan.num_layers=1",
        "model.optimizer.grad_clip=1",
    ]
    gpt = [
        "vqgan=vqgan",
        "model.optimizer.name=muon",
        "model.conditioning.drop_prob=0.1",
        "model.clip_loss.weight=0.2",
        "model.optimizer.grad_clip=1",
        "image_logger.prompts=[a red star]",
    ]
    for output, arguments in (("vqgan", [*VQGAN, *gan]), ("transformer", [*TRANSFORMER, *gpt])):
        arguments = ["clipgen-train", *arguments, *common, f"output={output}"]
        first = call(*arguments, "trainer.max_steps=2")
        assert first.code == 0, first.stderr
        resumed = call(*arguments, f"resume={output}")
        assert resumed.code == 0, resumed.stderr
        rows = csv.DictReader((tmp_path / output / "metrics.csv").open())
        losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
        assert len(losses) == 4 and all(map(math.isfinite, losses))
    drawn = call("clipgen-sample", "--prompt", PROMPT, "--checkpoint", "transformer", "--device", device)
    assert drawn.code == 0, drawn.stderr
