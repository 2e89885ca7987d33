"""Properties of all quantizers, the Gumbel quantizer, and statistics of code usage."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import VQGAN_SIZES, make_vqgan

from clipgen.models.config import QuantizerConfig
from clipgen.models.quantizers import QUANTIZERS, GumbelQuantizer, make_quantizer
from clipgen.models.quantizers.base import usage_and_perplexity

CONFIGS = {
    "euclidean": QuantizerConfig("euclidean", 64, 4),
    "cosine": QuantizerConfig("cosine", 64, 4),
    "gumbel": QuantizerConfig("gumbel", 64, 4),
    "fsq": QuantizerConfig("fsq", 240, 3, [8, 6, 5]),
    "lfq": QuantizerConfig("lfq", 64, 6),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_all_quantizers_have_one_interface(name):
    config = CONFIGS[name]
    size, dim = config.codebook_size, config.codebook_dim
    quantizer = make_quantizer(config).eval()
    z_q, indices, losses = quantizer(torch.randn(2, dim, 4, 6))
    assert z_q.shape == (2, dim, 4, 6) and indices.shape == (2, 4, 6) and indices.dtype == torch.int64
    assert quantizer.codebook.shape == (size, dim) and quantizer.codebook_size == size
    torch.testing.assert_close(z_q, quantizer.indices_to_codes(indices), atol=1e-6, rtol=0)
    torch.testing.assert_close(quantizer.indices_to_codes(indices)[1, :, 2, 3], quantizer.codebook[indices[1, 2, 3]])
    assert all(value.ndim == 0 and name.endswith("_loss") for name, value in losses.items())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quantizer(torch.randn(2, dim, 4, 6).bfloat16()).z_q.dtype == torch.float32


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name != "gumbel"])
def test_each_code_is_quantized_to_itself(name):
    quantizer = make_quantizer(CONFIGS[name])
    if name in ("euclidean", "cosine"):
        torch.nn.init.normal_(quantizer.embedding.weight)
    all_indices = torch.arange(quantizer.codebook_size).view(1, 1, -1)
    codes = quantizer.indices_to_codes(all_indices)
    if name == "fsq":
        codes = invert_fsq_bound(quantizer, codes)
    assert torch.equal(quantizer.eval()(codes).indices, all_indices)
    assert len(quantizer.codebook.unique(dim=0)) == quantizer.codebook_size


def invert_fsq_bound(quantizer: Any, codes: torch.Tensor) -> torch.Tensor:
    """Return latents that FSQ, which applies a tanh before rounding, maps to the given codes."""
    levels = quantizer.levels.view(1, -1, 1, 1)
    reach = (levels - 1) * 1.001 / 2
    offset = (levels % 2 == 0) * 0.5
    return torch.atanh((codes * (levels // 2) + offset) / reach) - torch.atanh(offset / reach)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_all_quantizers_train_within_the_vqgan(name, fit):
    config = CONFIGS[name]
    quantizer = dict(
        quantizer_type=name,
        codebook_size=config.codebook_size,
        codebook_dim=config.codebook_dim,
        fsq_levels=config.fsq_levels,
        dead_code_reset_after=0,
    )
    vqgan = make_vqgan(**VQGAN_SIZES | quantizer)
    metrics = fit(vqgan, 3, batch=4).callback_metrics
    assert math.isfinite(metrics["train/loss"])
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        # z + (z_q - z) is rounded, and a pixel is the sum of some 3000 products: an error of at most 3000 * 2 ** -24.
        torch.testing.assert_close(vqgan.eval().decode(vqgan.encode(images)), vqgan(images), atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(codebook_size=1, codebook_dim=4), "codebook_size must be at least 2, got 1"),
        (dict(codebook_size=8, codebook_dim=0), "codebook_dim must be at least 1, got 0"),
        (dict(codebook_size=8, codebook_dim=4, codebook_ema_decay=1.0), "codebook_ema_decay must be in .*, got 1.0"),
        (dict(type="vq"), "quantizer.type must be one of euclidean, cosine, fsq, lfq, gumbel, got 'vq'"),
    ],
)
def test_invalid_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_quantizer(QuantizerConfig(**arguments))


def test_gumbel_quantizer_by_hand():
    """Codes are sampled from the softmax in training, and the most likely one is used in evaluation."""
    quantizer = GumbelQuantizer(4, 3)
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    quantizer.proj.weight.data.zero_()
    quantizer.proj.bias.data = p.log()
    z = torch.randn(64, 3, 8, 8, requires_grad=True)
    sampled = quantizer(z)
    frequency = torch.bincount(sampled.indices.flatten(), minlength=4) / sampled.indices.numel()
    torch.testing.assert_close(frequency, p, atol=0.03, rtol=0)
    torch.testing.assert_close(sampled.z_q, quantizer.indices_to_codes(sampled.indices))
    kl_to_uniform = (p * (p * 4).log()).sum()
    assert sampled.losses["kl_loss"].item() == pytest.approx(kl_to_uniform.item(), rel=1e-4)

    (sampled.z_q * torch.randn_like(sampled.z_q)).sum().backward()
    assert quantizer.proj.weight.grad.abs().sum() > 0 and quantizer.embed.weight.grad.abs().sum() > 0
    likeliest = quantizer.eval()(z)
    assert (likeliest.indices == 3).all()
    assert torch.equal(likeliest.z_q, quantizer.indices_to_codes(likeliest.indices))


def test_usage_and_perplexity_by_hand():
    uniform = usage_and_perplexity(torch.tensor([5, 5, 5, 5]))
    assert [value.item() for value in uniform] == pytest.approx([1.0, 4.0])
    collapsed = usage_and_perplexity(torch.tensor([0, 7, 0, 0]))
    assert [value.item() for value in collapsed] == pytest.approx([0.25, 1.0])
    uneven = usage_and_perplexity(torch.tensor([3, 1]))  # exp(-(3/4 ln 3/4 + 1/4 ln 1/4)) = 4 / 3^(3/4)
    assert uneven[1].item() == pytest.approx(4 / 3**0.75)
    assert torch.isfinite(torch.stack(usage_and_perplexity(torch.zeros(3, dtype=torch.int64)))).all()
