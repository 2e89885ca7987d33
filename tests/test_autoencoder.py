"""Encoder and decoder: shapes, attention, resampling and patches."""

from __future__ import annotations

import pytest
import torch

from clipgen.models.autoencoder import AttnBlock, Decoder, Downsample, Encoder, Upsample
from clipgen.models.config import AutoencoderConfig as config


@pytest.mark.parametrize(
    ("ch_mult", "patch_size", "f"), [([1, 2], 1, 2), ([1, 1, 2], 1, 4), ([1, 1], 4, 8), ([1], 2, 2)]
)
def test_encoder_and_decoder_shapes(ch_mult, patch_size, f):
    sizes = dict(ch=32, ch_mult=ch_mult, num_res_blocks=1, attn_resolutions=[], resolution=32, z_channels=5)
    z = Encoder(config(**sizes, patch_size=patch_size))(torch.zeros(2, 3, 16, 32))
    assert z.shape == (2, 5, 16 // f, 32 // f)
    assert Decoder(config(**sizes, patch_size=patch_size))(z).shape == (2, 3, 16, 32)


def count_attention(network: torch.nn.Module) -> int:
    """Return the number of attention blocks, except for the one at the lowest resolution."""
    return sum(isinstance(module, AttnBlock) for module in network.modules()) - 1


@pytest.mark.parametrize(
    ("attn_resolutions", "in_encoder", "in_decoder"),
    [([], 0, 0), ([8], 2, 3), ([16, 32], 4, 6)],
)
def test_attention_is_at_the_given_resolutions(attn_resolutions, in_encoder, in_decoder):
    sizes = dict(ch=32, ch_mult=[1, 1, 1], num_res_blocks=2, resolution=32, z_channels=4)
    assert count_attention(Encoder(config(**sizes, attn_resolutions=attn_resolutions))) == in_encoder
    assert count_attention(Decoder(config(**sizes, attn_resolutions=attn_resolutions))) == in_decoder


def test_odd_resolutions_count_as_in_taming_transformers():
    """An encoder's resolutions are counted down, 50, 25, 12, and a decoder's up again, 12, 24, 48."""
    sizes = dict(ch=32, ch_mult=[1, 1, 1], num_res_blocks=1, resolution=50, z_channels=4)
    configs = [config(**sizes, attn_resolutions=[resolution]) for resolution in (12, 24, 25)]
    assert [count_attention(Encoder(c)) for c in configs] == [1, 0, 1]
    assert [count_attention(Decoder(c)) for c in configs] == [2, 2, 0]


def test_resampling_without_convolutions():
    x = torch.randn(2, 3, 4, 6)
    means = x.unflatten(2, (2, 2)).unflatten(4, (3, 2)).mean((3, 5))
    torch.testing.assert_close(Downsample(3, with_conv=False)(x), means)
    assert torch.equal(Upsample(3, with_conv=False)(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    sizes = dict(ch=32, ch_mult=[1, 1], num_res_blocks=1, attn_resolutions=[], resolution=16, z_channels=5)
    encoder, decoder = (net(config(**sizes, resamp_with_conv=False)) for net in (Encoder, Decoder))
    assert decoder(encoder(torch.zeros(1, 3, 16, 16))).shape == (1, 3, 16, 16)
    assert not [name for net in (encoder, decoder) for name in net.state_dict() if "sample" in name]


def test_latents_are_local_without_attention():
    """A latent depends only on pixels near its position."""
    sizes = dict(ch=32, ch_mult=[1, 1], num_res_blocks=1, attn_resolutions=[], resolution=64, z_channels=4)
    encoder, local = Encoder(config(**sizes)), Encoder(config(**sizes, mid_attention=False))
    decoder = Decoder(config(**sizes, mid_attention=False))
    assert not any(isinstance(m, AttnBlock) for net in (local, decoder) for m in net.modules())
    for net in (encoder, local):
        # Group norms, which depend on the whole image, are replaced by the identity.
        for block in [m for m in net.modules() if isinstance(m, torch.nn.GroupNorm)]:
            block.forward = lambda x: x
        images = torch.randn(1, 3, 64, 64, requires_grad=True)
        net(images)[0, 0, 0, 0].backward()
        assert (images.grad[..., 40:, 40:].abs().sum() == 0) == (net is local)


def test_last_layer_is_the_output_convolution():
    sizes = dict(ch=32, ch_mult=[1], num_res_blocks=1, attn_resolutions=[], resolution=8, z_channels=4, patch_size=2)
    decoder = Decoder(config(**sizes))
    assert decoder.last_layer is decoder.conv_out.weight
    assert decoder.last_layer.shape == (3 * 2**2, 32, 3, 3)
    with torch.no_grad():
        decoder.last_layer.zero_()
        decoder.conv_out.bias.zero_()
        assert not decoder(torch.randn(1, 4, 4, 4)).any()


def test_patches_are_folded_and_unfolded_without_loss():
    sizes = dict(ch=32, ch_mult=[1], num_res_blocks=1, attn_resolutions=[], resolution=8, z_channels=4, patch_size=4)
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(Decoder(config(**sizes)).unpatch(Encoder(config(**sizes)).patch(images)), images)


def test_channels_that_group_norms_cannot_divide_are_refused():
    with pytest.raises(ValueError, match=r"autoencoder.ch must give multiples of 32 channels, got 16"):
        Encoder(config(ch=16, ch_mult=(1, 2), resolution=32))
