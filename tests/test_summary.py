"""The summary that is logged before the first step."""

from __future__ import annotations

import logging
import re
from functools import partial

import pytest
import torch
from models import TRANSFORMER_SIZES, VQGAN_SIZES, make_transformer, make_vqgan
from photo_runs import FOLDER, OPEN, SMALL

from clipgen.training.summary import activation_bytes


@pytest.fixture
def call(call):
    return partial(call, "clipgen-train")


def test_summary_is_logged_before_the_first_step(call, photos, caplog):
    caplog.set_level(logging.INFO)
    (photos / "broken.png").write_bytes(b"no picture")
    batch = ["model.optimizer.grad_accum_steps=2", "effective_batch_size=8"]
    assert call(*OPEN, *FOLDER, *SMALL, *batch).code == 0
    for line in (
        "Images:     59 for training, 1 held out for validation, 1 skipped so far",
        "Batch:      8 images per optimizer step: data.batch_size=4 per device x 2 accumulated batches",
        "Tokens:     4 x 4 = 16 per image of 32 x 32 pixels, from a codebook of 16",
        "Length:     4 steps, each image about 0.542 times; validation every 1000 steps",
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
