"""Finite scalar quantization, compared with vector-quantize-pytorch."""

from __future__ import annotations

import pytest
import torch

from clipgen.models.config import QuantizerConfig
from clipgen.models.quantizers import FSQ, make_quantizer


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [4, 4, 4], [3], [7, 6]])
def test_fsq_matches_vector_quantize_pytorch(levels):
    reference = pytest.importorskip("vector_quantize_pytorch").FSQ(levels, channel_first=True)
    quantizer = FSQ(levels)
    z = 3 * torch.randn(4, len(levels), 8, 8)
    z_ours, z_reference = z.clone().requires_grad_(), z.clone().requires_grad_()

    z_q, indices, losses = quantizer(z_ours)
    expected, expected_indices = reference(z_reference)
    torch.testing.assert_close(z_q, expected)
    assert torch.equal(indices, expected_indices) and not losses
    codes = quantizer.indices_to_codes(indices)
    torch.testing.assert_close(codes, reference.indices_to_codes(expected_indices))

    weight = torch.randn_like(z)
    (z_q * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(z_ours.grad, z_reference.grad)


@pytest.mark.parametrize(
    ("codebook_size", "codebook_dim", "levels", "message"),
    [
        (16, 2, None, "fsq_levels must be given"),
        (1024, 4, [8, 5, 5, 5], "must be 1000 and 4 for quantizer 'fsq' with levels .*got 1024 and 4"),
        (4, 2, [2, 2], "fsq_levels must be whole numbers of at least 3"),
    ],
)
def test_inconsistent_levels_are_refused(codebook_size, codebook_dim, levels, message):
    with pytest.raises(ValueError, match=message):
        make_quantizer(QuantizerConfig("fsq", codebook_size, codebook_dim, levels))
