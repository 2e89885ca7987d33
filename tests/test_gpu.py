"""Generation and training on a GPU, if there is one, compared with a CPU; the tests also run on the CPU."""

from __future__ import annotations

import copy
import csv
import math

import pytest
import torch
from commands import PROMPT, SHAPES, TRANSFORMER, VQGAN

from clipgen.hardware.processor import has_bf16_units

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GUIDED = dict(guidance_scale=2.0, guidance_power=1.0, top_p=0.9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [{}, GUIDED, dict(temperature=0.0)])
def test_seed_gives_equal_images_on_any_device(pipe, device, settings):
    """Up to the rounding of convolutions on a GPU (TF32)."""
    moved = copy.deepcopy(pipe).to(device)
    e = pipe.embed(PROMPT).expand(3, -1)
    images = moved.generate(e.to(device), 5, **settings)
    assert images.device.type == device
    torch.testing.assert_close(images.cpu(), pipe.generate(e, 5, **settings), atol=0.02, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_generation_matches_uncompiled(pipe, device):
    """Also when CUDA graphs reuse memory of previous batches."""
    pipe = pipe.to(device)
    compiled = copy.deepcopy(pipe).compile()
    e = pipe.embed(PROMPT)
    for batch_size, settings in ((3, {}), (1, {}), (3, {}), (2, GUIDED)):
        batch = e.expand(batch_size, -1)
        images = compiled.generate(batch, 5, **settings)
        torch.testing.assert_close(images, pipe.generate(batch, 5, **settings), atol=0.02, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_both_stages_train_resume_and_sample(call, tmp_path, device):
    """In bfloat16 and compiled, with all options that recipes use."""
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
    sampled = call("clipgen-sample", "--prompt", PROMPT, "--checkpoint", "transformer", "--device", device)
    assert sampled.code == 0, sampled.stderr
