"""VQGAN-CLIP: optimization of latents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipgen.baselines import vqgan_clip
from clipgen.baselines.vqgan_clip import AugmentationParams
from clipgen.pipeline import TextToImage


def test_distance_is_the_angle():
    angles = torch.tensor([0.0, 0.5, 1.5, 3.0])
    a = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    b = torch.stack([angles.cos(), angles.sin()], dim=1).requires_grad_()
    torch.testing.assert_close(vqgan_clip.great_circle(a, b), angles**2 / 2, atol=1e-4, rtol=1e-4)
    vqgan_clip.great_circle(a, b).sum().backward()
    assert b.grad.isfinite().all()


def generators_of(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_augmentations_are_crops(images):
    """Crops of a ramp have a smaller slope, and half of them are mirrored."""
    ramp = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    crops = vqgan_clip.augment(ramp, generators_of(0), AugmentationParams(64, 0.5, 0.0))
    assert crops.shape == (64, 3, 32, 32) and crops.abs().max() <= 1
    slopes = crops[:, 0, 16, 20] - crops[:, 0, 16, 12]
    full = 8 * 2 / 31
    assert (slopes.abs() <= full + 1e-4).all() and (slopes.abs() >= full / 2 - 1e-4).all()
    assert 16 <= (slopes < 0).sum() <= 48
    flat = vqgan_clip.augment(torch.zeros(1, 3, 32, 32), generators_of(0), AugmentationParams(64, 0.5, 0.1))
    assert flat.mean().abs() < 0.01 and flat.std(dim=(1, 2, 3)).min() > 0 and flat.std(dim=(1, 2, 3)).max() < 0.11
    same = vqgan_clip.augment(images[:2], generators_of(3, 4), AugmentationParams(1, 1.0, 0.0))
    for image, crop in zip(images, same):
        assert torch.allclose(image, crop, atol=1e-5) or torch.allclose(image.flip(-1), crop, atol=1e-5)
    first = vqgan_clip.augment(images[:3], generators_of(3, 4, 5), AugmentationParams(4, 0.5, 0.1))
    alone = vqgan_clip.augment(images[1:2], generators_of(4), AugmentationParams(4, 0.5, 0.1))
    torch.testing.assert_close(first[4:8], alone)  # by its own generator


def test_latents_are_codes_with_a_straight_through_gradient(tiny_vqgan):
    latents = vqgan_clip.Latents(tiny_vqgan, generators_of(1, 2), 4)
    codes = tiny_vqgan.codebook.detach()
    assert latents.z.shape == (2, 8, 4, 4)
    nearest = (latents.z.detach().permute(0, 2, 3, 1).reshape(-1, 1, 8) - codes).norm(dim=2)
    assert nearest.min(dim=1).values.max() == 0
    indices = nearest.argmin(dim=1).view(2, 4, 4)
    torch.testing.assert_close(latents.images(), tiny_vqgan.decode(indices))
    with torch.no_grad():
        latents.z += 0.05 * torch.randn(latents.z.shape)  # a little aside: the same codes
    images = latents.images()
    torch.testing.assert_close(images, tiny_vqgan.decode(indices))
    z_q = tiny_vqgan.active_model.quantize.indices_to_codes(indices).detach().requires_grad_()
    (expected,) = torch.autograd.grad(tiny_vqgan.decode_latents(z_q).square().sum(), z_q)
    gradient = torch.autograd.grad(images.square().sum(), latents.z)[0]
    torch.testing.assert_close(gradient, expected, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def shapes() -> TextToImage:
    return TextToImage.load("shapes")


@torch.no_grad()
def cosines(pipe, images, targets) -> Tensor:
    return (pipe.clip.encode_image(images) * targets).sum(dim=1)


def test_optimization_raises_the_clip_score(shapes):
    targets = shapes.embed("a large blue ring on a white background").repeat(2, 1)
    start, end = (
        vqgan_clip.vqgan_clip(shapes.vqgan, shapes.clip, targets, steps=steps, cutouts=8, seed=0, batch_size=2)
        for steps in (0, 40)
    )
    assert start.shape == end.shape == (2, 3, 32, 32) and end.abs().max() <= 1
    assert (cosines(shapes, end, targets) > cosines(shapes, start, targets) + 0.3).all()
    assert all(parameter.grad is None for parameter in shapes.vqgan.parameters())


def test_images_do_not_depend_on_each_other(shapes):
    """An image is the same alone, among others, and when repeated; another seed gives another image."""
    targets = shapes.clip.encode_text(
        ["a large blue ring on a white background", "a small red star on a black background"]
    )
    options = dict(steps=5, cutouts=4, image_size=16)
    both = vqgan_clip.vqgan_clip(shapes.vqgan, shapes.clip, targets, seed=[7, 3], **options)
    alone = vqgan_clip.vqgan_clip(shapes.vqgan, shapes.clip, targets[1:], seed=3, **options)
    assert both.shape == (2, 3, 16, 16) and torch.equal(both[1:], alone)
    other = vqgan_clip.vqgan_clip(shapes.vqgan, shapes.clip, targets[1:], seed=4, **options)
    assert not torch.equal(other, alone)
    together = vqgan_clip.vqgan_clip(shapes.vqgan, shapes.clip, targets, seed=[7, 3], batch_size=2, **options)
    assert (together - both).abs().mean() < 0.02  # rounding apart


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"cutouts": 0}, "cutouts must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite, got 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate must be above 0 and finite, got inf"),
        ({"smallest_cut": 1.5}, r"smallest_cut must be in \(0, 1\], got 1.5"),
        ({"noise": -0.1}, "noise must be at least 0, got -0.1"),
        ({"image_size": 30}, "image_size must be divisible by 4, got 30"),
    ],
)
def test_invalid_arguments_are_refused(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        vqgan_clip.vqgan_clip(shapes.vqgan, shapes.clip, torch.zeros(1, 64), **options)
    with pytest.raises(ValueError, match=r"clip_embedding must be \(B, 64\), got \(1, 3\)"):
        vqgan_clip.vqgan_clip(shapes.vqgan, shapes.clip, torch.zeros(1, 3))
