"""Encoder and decoder: shapes, and parity with taming-transformers' own modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipgen.nets.autoencoder import AttnBlock, Decoder, Encoder
from clipgen.vqgan import VQGAN


@pytest.mark.parametrize(
    ("ch_mult", "patch_size", "f"), [([1, 2], 1, 2), ([1, 1, 2], 1, 4), ([1, 1], 4, 8), ([1], 2, 2)]
)
def test_shapes(ch_mult, patch_size, f):
    sizes = dict(ch=32, ch_mult=ch_mult, num_res_blocks=1, attn_resolutions=[], resolution=32, z_channels=5)
    z = Encoder(**sizes, patch_size=patch_size)(torch.zeros(2, 3, 16, 32))
    assert z.shape == (2, 5, 16 // f, 32 // f)
    assert Decoder(**sizes, patch_size=patch_size)(z).shape == (2, 3, 16, 32)


def test_attention_sits_at_the_asked_resolutions():
    sizes = dict(ch=32, ch_mult=[1, 1, 1], num_res_blocks=2, resolution=32, z_channels=4)
    count = lambda net: sum(isinstance(m, AttnBlock) for m in net.modules()) - 1  # one is always in the middle
    for at, encoder, decoder in (([], 0, 0), ([8], 2, 3), ([16, 32], 4, 6)):
        assert count(Encoder(**sizes, attn_resolutions=at)) == encoder
        assert count(Decoder(**sizes, attn_resolutions=at)) == decoder


def test_without_any_attention():
    """Then a latent sees what is near its place and nothing else."""
    sizes = dict(ch=32, ch_mult=[1, 1], num_res_blocks=1, attn_resolutions=[], resolution=64, z_channels=4)
    encoder, local = Encoder(**sizes), Encoder(**sizes, mid_attention=False)
    decoder = Decoder(**sizes, mid_attention=False)
    assert not any(isinstance(m, AttnBlock) for net in (local, decoder) for m in net.modules())
    for net in (encoder, local):  # group norms see the whole image, so without them
        for block in [m for m in net.modules() if isinstance(m, torch.nn.GroupNorm)]:
            block.forward = lambda x: x
        images = torch.randn(1, 3, 64, 64, requires_grad=True)
        net(images)[0, 0, 0, 0].backward()
        assert (images.grad[..., 40:, 40:].abs().sum() == 0) == (net is local)


def test_the_last_layer_makes_the_pixels():
    sizes = dict(ch=32, ch_mult=[1], num_res_blocks=1, attn_resolutions=[], resolution=8, z_channels=4, patch_size=2)
    decoder = Decoder(**sizes)
    assert decoder.last_layer is decoder.conv_out.weight
    assert decoder.last_layer.shape == (3 * 2**2, 32, 3, 3)
    with torch.no_grad():
        decoder.last_layer.zero_(), decoder.conv_out.bias.zero_()
        assert not decoder(torch.randn(1, 4, 4, 4)).any()


def test_patches_lose_nothing():
    """Folding pixels into channels and back is the identity, so a patch of 4 costs no information."""
    sizes = dict(ch=32, ch_mult=[1], num_res_blocks=1, attn_resolutions=[], resolution=8, z_channels=4, patch_size=4)
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(Decoder(**sizes).unpatch(Encoder(**sizes).patch(images)), images)


@pytest.fixture(scope="module")
def taming(shared):
    """Published layout: -> a VQGAN with its weights, and what taming's own modules return with them."""
    folder = shared / "parity" / "taming_vqgan"
    # the file also pickles a callback of Lightning's; it was written for this test
    state = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=False)["state_dict"]
    vqgan = VQGAN(codebook_size=128, codebook_dim=32, ch=32, ch_mult=[1, 1, 2], num_res_blocks=1, attn_resolutions=[16],
                  resolution=64, z_channels=32, perceptual_weight=0.0, ndf=8, n_layers=2)  # fmt: skip
    expected = {name: torch.from_numpy(array) for name, array in np.load(folder / "expected.npz").items()}
    return vqgan.eval(), state, expected


def part(state: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def test_published_weights_fit_strictly(taming):
    vqgan, state, _ = taming
    for name in ("encoder", "decoder", "quant_conv", "post_quant_conv", "quantize.embedding"):
        assert part(state, f"{name}.")
        vqgan.get_submodule(name).load_state_dict(part(state, f"{name}."), strict=True)
    vqgan.discriminator.load_state_dict(part(state, "loss.discriminator."), strict=True)


@torch.no_grad()
def test_parity_with_taming(taming):
    vqgan, state, expected = taming
    for name in ("encoder", "decoder", "quant_conv", "post_quant_conv", "quantize.embedding"):
        vqgan.get_submodule(name).load_state_dict(part(state, f"{name}."))
    z = vqgan.encode_latents(expected["images"])
    assert torch.equal(vqgan.encode(expected["images"]), expected["indices"])
    for ours, theirs in (
        (z, expected["z"]),
        (vqgan.quantize(z).z_q, expected["z_q"]),
        (vqgan(expected["images"]), expected["reconstruction"]),
        (vqgan.decode(expected["indices"]), expected["reconstruction"]),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert expected["reconstruction"].std() > 0.01  # nothing that would agree by being zero
