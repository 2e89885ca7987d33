"""Estimates of memory and speed agree with the formulas that papers use."""

from __future__ import annotations

import estimate
import pytest
import torch
from models import make_transformer, make_vqgan

from clipgen.models.config import GPTConfig


def test_flops_of_the_transformer_are_six_per_weight_and_token_plus_attention():
    """Kaplan et al. 2020, Table 1, with causal attention counted as full attention, as torch does."""
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 32, "codebook_size": 64, "num_tokens": 16, "clip_dim": 8}
    with torch.device("meta"):
        model = make_transformer(**settings)
        flops = estimate.step_flops(model)
    config = GPTConfig(**settings)
    matrices = 12 * config.n_layer * config.n_embd**2 + config.n_embd * config.codebook_size
    attention = 2 * 2 * config.n_layer * config.num_tokens * config.n_embd  # forward, per token
    assert flops == pytest.approx(config.num_tokens * (6 * matrices + 3 * attention), rel=0.05)


def test_flops_of_the_tokenizer_include_its_discriminator():
    with torch.device("meta"):
        without = estimate.step_flops(make_vqgan(gan_weight=0.0))
        complete = estimate.step_flops(make_vqgan(gan_weight=0.5))
    assert 0 < without < complete


def test_seconds_per_step_are_those_of_the_slower_resource():
    cost = estimate.Estimate(tokens=1, parameters=1, flops=4e12, bytes_moved=1e9, memory=0)
    assert cost.seconds(tflops=10, bandwidth=1000, mfu=0.5) == pytest.approx(0.8)
    assert cost.seconds(tflops=1e6, bandwidth=1000, mfu=0.5) == pytest.approx(0.001)


def test_table_has_a_row_per_stage(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["estimate", "experiment=photos", "data.image_size=64"])
    estimate.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| stage=")]
    assert [row.split("|")[2].strip() for row in rows] == ["64", "64"]
