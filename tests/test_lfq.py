"""Lookup-free quantization, compared with vector-quantize-pytorch and with values computed by hand."""

from __future__ import annotations

import pytest
import torch
from models import VQGAN_SIZES, make_vqgan
from torch import Tensor

from clipgen.models.config import QuantizerConfig
from clipgen.models.quantizers import LFQ, make_quantizer


def test_lfq_matches_vector_quantize_pytorch():
    reference = pytest.importorskip("vector_quantize_pytorch").LFQ(
        dim=6,
        entropy_loss_weight=1.0,
        diversity_gamma=0.7,
        commitment_loss_weight=0.0,
        spherical=False,
    )
    z = 0.02 * torch.randn(4, 6, 8, 8)
    z_q, indices, losses = LFQ(6, diversity=0.7)(z)
    expected, expected_indices, entropy = reference(z)
    torch.testing.assert_close(z_q, expected)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(losses["entropy_loss"], entropy, atol=1e-4, rtol=1e-4)


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(-1)


def test_lfq_by_hand():
    quantizer = LFQ(2, inverse_temperature=1.0)
    z = torch.tensor([[0.5, -2.0], [0.0, 1.0]]).view(2, 2, 1, 1)
    z_q, indices, losses = quantizer(z)
    assert indices.flatten().tolist() == [0b10, 0b01]  # zero counts as negative
    assert z_q.flatten(1).tolist() == [[1, -1], [-1, 1]]
    assert losses["commitment_loss"].item() == pytest.approx((0.25 + 1 + 1 + 0) / 4)

    # The probability of a code is the product of the probabilities of its bits.
    first_bit, second_bit = torch.sigmoid(4 * z.flatten(1)).T
    joint = torch.stack(
        [
            (1 - first_bit) * (1 - second_bit),
            (1 - first_bit) * second_bit,
            first_bit * (1 - second_bit),
            first_bit * second_bit,
        ],
        dim=1,
    )
    expected = entropy(joint).mean() - entropy(joint.mean(0))
    assert losses["entropy_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert "entropy_loss" not in quantizer.eval()(z).losses


def test_codes_of_probability_zero_give_finite_gradients():
    z = torch.full((4, 6, 2, 2), 9.0, requires_grad=True)
    LFQ(6)(z).losses["entropy_loss"].backward()
    assert torch.isfinite(z.grad).all()


def test_entropy_loss_spreads_latents_over_the_codes():
    quantizer = LFQ(4)
    latents = torch.nn.Parameter(0.02 + 0.005 * torch.randn(256, 4))  # all of one sign
    optimizer = torch.optim.Adam([latents], lr=0.001)

    def num_used_codes() -> int:
        return len(quantizer(latents[:, :, None, None]).indices.unique())

    assert num_used_codes() == 1
    for _ in range(300):
        optimizer.zero_grad()
        quantizer(latents[:, :, None, None]).losses["entropy_loss"].backward()
        optimizer.step()
    assert num_used_codes() > 12


def test_inconsistent_sizes_are_refused():
    with pytest.raises(ValueError, match="and 8 for quantizer 'lfq', got 1024 and 8"):
        make_quantizer(QuantizerConfig("lfq", 1024, 8))
    with pytest.raises(ValueError, match=r"codebook_dim must be in \[1, 30\] for quantizer 'lfq', got 256"):
        make_quantizer(QuantizerConfig("lfq", 1024, 256))


def test_options_of_a_learned_codebook_are_refused():
    with pytest.raises(
        ValueError, match=r"apply only to .* not to 'lfq'; got dead_code_reset_after=5, kmeans_iters=10"
    ):
        make_vqgan(**VQGAN_SIZES | dict(quantizer_type="lfq", codebook_size=16, codebook_dim=4, kmeans_iters=10))
