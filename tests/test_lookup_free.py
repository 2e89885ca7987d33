"""Quantizers without a codebook: against vector-quantize-pytorch, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from models import VQGAN_SIZES, make_vqgan

from clipgen.models.config import QuantizerConfig
from clipgen.models.quantizers import FSQ, LFQ, QUANTIZERS, make_quantizer

KINDS = {
    "euclidean": (64, 4, None),
    "cosine": (64, 4, None),
    "gumbel": (64, 4, None),
    "fsq": (240, 3, [8, 6, 5]),
    "lfq": (64, 6, None),
}


def quantizer(kind: str, size: int, dim: int, levels: list[int] | None):
    return make_quantizer(QuantizerConfig(kind, size, dim, levels))


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [4, 4, 4], [3], [7, 6]])
def test_fsq_is_the_librarys(levels):
    theirs = pytest.importorskip("vector_quantize_pytorch").FSQ(levels, channel_first=True)
    ours, z = FSQ(levels), 3 * torch.randn(4, len(levels), 8, 8)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    z_q, indices, losses = ours(a)
    expected, expected_indices = theirs(b)
    torch.testing.assert_close(z_q, expected)
    assert torch.equal(indices, expected_indices) and not losses
    torch.testing.assert_close(ours.indices_to_codes(indices), theirs.indices_to_codes(expected_indices))
    weight = torch.randn_like(z)
    (z_q * weight).sum().backward(), (expected * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_lfq_is_the_librarys():
    theirs = pytest.importorskip("vector_quantize_pytorch").LFQ(
        dim=6, entropy_loss_weight=1.0, diversity_gamma=0.7, commitment_loss_weight=0.0, spherical=False
    )
    ours, z = LFQ(6, diversity=0.7), 0.02 * torch.randn(4, 6, 8, 8)
    z_q, indices, losses = ours(z)
    expected, expected_indices, entropy = theirs(z)
    torch.testing.assert_close(z_q, expected)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(losses["entropy_loss"], entropy, atol=1e-4, rtol=1e-4)


def test_lfq_by_hand():
    module = LFQ(2, inverse_temperature=1.0)
    z = torch.tensor([[0.5, -2.0], [0.0, 1.0]]).view(2, 2, 1, 1)
    z_q, indices, losses = module(z)
    assert indices.flatten().tolist() == [0b10, 0b01]  # zero counts as no
    assert z_q.flatten(1).tolist() == [[1, -1], [-1, 1]]
    assert losses["commitment_loss"].item() == pytest.approx((0.25 + 1 + 1 + 0) / 4)
    bit = torch.sigmoid(4 * z.flatten(1))  # of each element: codes are products of bits
    joint = torch.stack(
        [
            (1 - bit[:, 0]) * (1 - bit[:, 1]),
            (1 - bit[:, 0]) * bit[:, 1],
            bit[:, 0] * (1 - bit[:, 1]),
            bit[:, 0] * bit[:, 1],
        ],
        dim=1,
    )
    entropy = lambda p: -(p * p.log()).sum(-1)
    expected = entropy(joint).mean() - entropy(joint.mean(0))
    assert losses["entropy_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert "entropy_loss" not in module.eval()(z).losses


def test_a_code_that_nobody_is_near_gives_no_nan():
    z = torch.full((4, 6, 2, 2), 9.0, requires_grad=True)
    LFQ(6)(z).losses["entropy_loss"].backward()
    assert torch.isfinite(z.grad).all()


def test_the_entropy_drives_all_codes_into_use():
    module, free = LFQ(4), torch.nn.Parameter(0.02 + 0.005 * torch.randn(256, 4))  # all of one sign
    optimizer = torch.optim.Adam([free], lr=0.001)
    used = lambda: len(module(free[:, :, None, None]).indices.unique())
    assert used() == 1
    for _ in range(300):
        optimizer.zero_grad()
        module(free[:, :, None, None]).losses["entropy_loss"].backward()
        optimizer.step()
    assert used() > 12


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_one_interface(kind):
    size, dim, levels = KINDS[kind]
    module = quantizer(kind, size, dim, levels).eval()
    z_q, indices, losses = module(torch.randn(2, dim, 4, 6))
    assert z_q.shape == (2, dim, 4, 6) and indices.shape == (2, 4, 6) and indices.dtype == torch.int64
    assert module.codebook.shape == (size, dim) and module.codebook_size == size
    torch.testing.assert_close(z_q, module.indices_to_codes(indices), atol=1e-6, rtol=0)
    torch.testing.assert_close(module.indices_to_codes(indices)[1, :, 2, 3], module.codebook[indices[1, 2, 3]])
    assert all(value.ndim == 0 and name.endswith("_loss") for name, value in losses.items())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.randn(2, dim, 4, 6).bfloat16()).z_q.dtype == torch.float32


@pytest.mark.parametrize("kind", [k for k in QUANTIZERS if k != "gumbel"])
def test_every_code_is_its_own_nearest(kind):
    module = quantizer(kind, *KINDS[kind])
    if kind in ("euclidean", "cosine"):
        torch.nn.init.normal_(module.embedding.weight)
    everything = torch.arange(module.codebook_size).view(1, 1, -1)
    codes = module.indices_to_codes(everything)
    if kind == "fsq":  # what is squashed has to be unsquashed first
        levels = module.levels.view(1, -1, 1, 1)
        reach, offset = (levels - 1) * 1.001 / 2, (levels % 2 == 0) * 0.5
        codes = torch.atanh((codes * (levels // 2) + offset) / reach) - torch.atanh(offset / reach)
    assert torch.equal(module.eval()(codes).indices, everything)
    assert len(module.codebook.unique(dim=0)) == module.codebook_size


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_each_trains_within_the_vqgan(kind, fit):
    size, dim, levels = KINDS[kind]
    vqgan = make_vqgan(
        quantizer_type=kind,
        codebook_size=size,
        codebook_dim=dim,
        fsq_levels=levels,
        ch=32,
        ch_mult=[1],
        num_res_blocks=1,
        attn_resolutions=[],
        z_channels=32,
        patch_size=4,
        perceptual_weight=0.0,
        gan_weight=0.0,
        learning_rate=1e-3,
    )
    metrics = fit(vqgan, 3, batch=4).callback_metrics
    assert math.isfinite(metrics["train/loss"])
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        # z + (z_q - z) is rounded, and a decoder sums some 3000 products on the way to a pixel: 3000 * 2 ** -24 at most
        torch.testing.assert_close(vqgan.eval().decode(vqgan.encode(images)), vqgan(images), atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fsq", 16, 2, None), "fsq_levels must be given"),
        (("fsq", 1024, 4, [8, 5, 5, 5]), "must be 1000 and 4 for quantizer 'fsq' with levels .*got 1024 and 4"),
        (("fsq", 4, 2, [2, 2]), "fsq_levels must be whole numbers of at least 3"),
        (("lfq", 1024, 256, None), "and 256 for quantizer 'lfq', got 1024 and 256"),
        (("vq", 16, 2, None), "quantizer.type must be one of euclidean, cosine, fsq, lfq, gumbel, got 'vq'"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantizer(*arguments)


def test_what_only_a_learned_codebook_knows_is_refused():
    with pytest.raises(ValueError, match="apply only to .* not to 'lfq'; got dead_code_reset_after=5, kmeans_iters=10"):
        make_vqgan(**VQGAN_SIZES | dict(quantizer_type="lfq", codebook_size=16, codebook_dim=4, kmeans_iters=10))
