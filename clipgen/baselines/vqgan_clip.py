"""VQGAN-CLIP (Crowson et al. 2022, arXiv:2204.08583): optimize a VQ-GAN's latents until CLIP matches the prompt.

Nothing is trained: each image is an optimization of its own that starts from random codes. This is the row "VQGAN+CLIP"
of CLIP-GEN's Table 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from clipgen.clip import FrozenCLIP
from clipgen.sampling import per_sample_seeds
from clipgen.vqgan import VQGAN

LossCallback = Callable[[int, Tensor], None]  # step, loss of each image (B,)
RandomGenerators = Sequence[torch.Generator]


@dataclass(frozen=True)
class AugmentationParams:
    """Augmentation of images before CLIP sees them.

    Args:
        cutouts: augmented views per step.
        smallest_cut: side of the smallest crop, as a fraction of the image's.
        noise: largest standard deviation of the noise.

    Raises:
        ValueError: a value is out of range.
    """

    cutouts: int = 32
    smallest_cut: float = 0.5
    noise: float = 0.1

    def __post_init__(self) -> None:
        if self.cutouts < 1:
            raise ValueError(f"cutouts must be at least 1, got {self.cutouts}")
        if not 0 < self.smallest_cut <= 1:
            raise ValueError(f"smallest_cut must be in (0, 1], got {self.smallest_cut}")
        if not self.noise >= 0:
            raise ValueError(f"noise must be at least 0, got {self.noise}")


def vqgan_clip(
    vqgan: VQGAN,
    clip: FrozenCLIP,
    clip_embedding: Tensor,
    *,
    steps: int = 300,
    learning_rate: float = 0.1,
    cutouts: int = 32,
    smallest_cut: float = 0.5,
    noise: float = 0.1,
    image_size: int | None = None,
    seed: int | Sequence[int] | None = None,
    batch_size: int = 1,
    callback: LossCallback | None = None,
) -> Tensor:
    """Return images that CLIP finds similar to embeddings, by Adam on the latents of a VQ-GAN.

    Each step quantizes, decodes and augments, and minimizes the squared great-circle distance to the target.

    Args:
        vqgan: the tokenizer.
        clip: the CLIP model.
        clip_embedding: targets (B, E), unit norm.
        steps: optimizer steps.
        learning_rate: learning rate of Adam.
        cutouts: augmented views per step.
        smallest_cut: side of the smallest crop, as a fraction of the image's.
        noise: largest standard deviation of the added noise.
        image_size: height and width in pixels; None uses the VQ-GAN's training resolution.
        seed: image i uses ``seed + i``; or one seed per image.
        batch_size: images per batch; with 1 they do not depend on each other, not even by floating-point rounding.
        callback: called after each step.

    Returns:
        (B, 3, image_size, image_size) in [-1, 1].

    Raises:
        ValueError: an argument is out of range.
    """
    augmentation = AugmentationParams(cutouts, smallest_cut, noise)
    size = image_size or vqgan.autoencoder_config.resolution
    check_arguments(vqgan, clip, clip_embedding, size, steps, learning_rate, batch_size)
    seeds = per_sample_seeds(seed, len(clip_embedding))
    images = []
    for start in range(0, len(seeds), batch_size):
        batch = slice(start, start + batch_size)
        generators = [torch.Generator(vqgan.device).manual_seed(image_seed) for image_seed in seeds[batch]]
        latents = Latents(vqgan, generators, size // vqgan.downsampling)
        images.append(optimize(latents, clip, clip_embedding[batch], augmentation, steps, learning_rate, callback))
    return torch.cat(images)


def check_arguments(
    vqgan: VQGAN,
    clip: FrozenCLIP,
    clip_embedding: Tensor,
    image_size: int,
    steps: int,
    learning_rate: float,
    batch_size: int,
) -> None:
    """Raise ValueError if an argument of ``vqgan_clip`` is out of range."""
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be above 0 and finite, got {learning_rate}")
    if image_size < 1 or image_size % vqgan.downsampling:
        raise ValueError(f"image_size must be divisible by {vqgan.downsampling}, got {image_size}")
    if clip_embedding.ndim != 2 or clip_embedding.shape[1] != clip.embed_dim:
        raise ValueError(f"clip_embedding must be (B, {clip.embed_dim}), got {tuple(clip_embedding.shape)}")


def optimize(
    latents: Latents,
    clip: FrozenCLIP,
    target: Tensor,
    augmentation: AugmentationParams,
    steps: int,
    learning_rate: float,
    callback: LossCallback | None,
) -> Tensor:
    """Optimize the latents of a batch and return their images; the arguments are those of ``vqgan_clip``."""
    target = target.detach()
    optimizer = torch.optim.Adam([latents.z], lr=learning_rate)
    cutouts = augmentation.cutouts
    for step in range(steps):
        views = augment(latents.images(), latents.generators, augmentation)
        distance = great_circle(clip.encode_image(views), target.repeat_interleave(cutouts, dim=0))
        loss = rearrange(distance, "(b n) -> b n", n=cutouts).mean(dim=1)  # (B,)
        # Not ``backward``, which would also compute gradients of the models' weights.
        (latents.z.grad,) = torch.autograd.grad(loss.sum(), latents.z)
        optimizer.step()
        latents.clamp_()
        if callback:
            callback(step, loss.detach())
    with torch.no_grad():
        return latents.images().clamp(-1, 1)


class Latents:
    """The optimized variables: latents ``z`` (B, D, h, w) in the space of the codebook, which any quantizer has.

    They start as random codes and are clamped to the range of the codebook.

    Args:
        vqgan: the tokenizer.
        generators: one random generator per image.
        side: height and width of the latents.
    """

    def __init__(self, vqgan: VQGAN, generators: RandomGenerators, side: int):
        self.vqgan = vqgan
        self.generators = generators
        self.codebook = vqgan.codebook.detach()
        indices = [torch.randint(len(self.codebook), (side, side), generator=g, device=g.device) for g in generators]
        codes = self.codebook[torch.stack(indices)]
        self.z = rearrange(codes, "b h w d -> b d h w").clone().requires_grad_()
        self.low = self.codebook.min(dim=0).values[:, None, None]
        self.high = self.codebook.max(dim=0).values[:, None, None]

    def images(self) -> Tensor:
        """Decode the nearest codes, (B, 3, H, W), with a straight-through gradient to ``z``."""
        flat = rearrange(self.z.detach(), "b d h w -> (b h w) d")
        # The squared distance without the norm of the latent, which is the same for all codes.
        distance = self.codebook.square().sum(1) - 2 * flat @ self.codebook.T  # (B*h*w, K)
        codes = self.codebook[distance.argmin(dim=1)]
        batch_size, _, height, width = self.z.shape
        z_q = rearrange(codes, "(b h w) d -> b d h w", b=batch_size, h=height, w=width)
        return self.vqgan.decode_latents(z_q + self.z - self.z.detach())

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp ``z`` to the range of the codebook in each dimension."""
        self.z.copy_(self.z.clamp(self.low, self.high))


def great_circle(a: Tensor, b: Tensor) -> Tensor:
    """Return half the squared great-circle distance, ``angle ** 2 / 2``, of unit vectors (N, E), (N, E) -> (N,)."""
    return 2 * ((a - b).norm(dim=-1) / 2).clamp(max=1 - 1e-6).arcsin().square()


def augment(images: Tensor, generators: RandomGenerators, params: AugmentationParams) -> Tensor:
    """Return random square crops, half of them mirrored, with noise: (B, 3, H, W) -> (B * cutouts, 3, H, W).

    Differentiable. The crops and noise of an image come from its own generator.
    """
    uniforms = torch.stack([torch.rand(params.cutouts, 5, generator=g, device=g.device) for g in generators])
    uniforms = uniforms.flatten(0, 1)  # (B * cutouts, 5)
    crops = random_crops(repeat(images, "b c h w -> (b n) c h w", n=params.cutouts), uniforms, params.smallest_cut)
    if params.noise == 0:
        return crops
    shape = (params.cutouts, *images.shape[1:])
    gaussian = torch.cat([torch.randn(shape, generator=g, device=g.device) for g in generators])
    return crops + gaussian * (params.noise * uniforms[:, 4])[:, None, None, None]


def random_crops(images: Tensor, uniforms: Tensor, smallest_cut: float) -> Tensor:
    """Return a crop of each image (N, 3, H, W), at its size, by four uniform numbers (N, 4): side, x, y, mirror."""
    side = smallest_cut + (1 - smallest_cut) * uniforms[:, 0]
    # Centers in [-1, 1], such that the crop stays inside the image.
    x, y = ((2 * uniforms[:, 1:3] - 1) * (1 - side)[:, None]).T
    mirror = torch.where(uniforms[:, 3] < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(side)
    theta = torch.stack([side * mirror, zero, x, zero, side, y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
