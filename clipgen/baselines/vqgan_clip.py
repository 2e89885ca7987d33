"""VQGAN-CLIP (Crowson et al. 2022, arXiv:2204.08583): a tokenizer's latents, optimised until CLIP likes the picture.

No training: every picture is an optimisation of its own, from random codes. This is the row "VQGAN+CLIP" of CLIP-GEN's
Table 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from clipgen.clip import FrozenCLIP
from clipgen.sampling import per_sample_seeds
from clipgen.vqgan import VQGAN

Watch = Callable[[int, Tensor], None]  # (step, loss of each row (B,))


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
    watch: Watch | None = None,
) -> Tensor:
    """Images that CLIP finds near to embeddings, by Adam on the latents of a VQ-GAN.

    Each step quantises the latents (straight through), decodes them, augments the picture ``cutouts`` times, and goes
    down the mean squared great-circle distance of CLIP's embeddings to the target. Latents begin as random codes and
    stay within the codebook's range.

    Args:
        clip_embedding: (B, E), unit norm.
        steps, learning_rate: of Adam. cutouts: augmented views a step.
        smallest_cut: side of the smallest crop, in parts of the image's. noise: largest standard deviation added.
        image_size: height and width in pixels; None: as the VQ-GAN was trained.
        seed: row i draws from ``seed + i``; or one seed a row.
        batch_size: rows at a time. At 1 a picture does not depend on its neighbours at all; with more, which suits a
            GPU, up to rounding, which many steps enlarge.
        watch: called after each step.

    Returns:
        (B, 3, image_size, image_size) in [-1, 1].

    Raises:
        ValueError: an argument is out of range.
    """
    size = image_size or vqgan.autoencoder_config.resolution
    for name, value, least in (("steps", steps, 0), ("cutouts", cutouts, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be above 0, got {learning_rate}")
    if not 0 < smallest_cut <= 1:
        raise ValueError(f"smallest_cut must be in (0, 1], got {smallest_cut}")
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    if size < 1 or size % vqgan.downsampling:
        raise ValueError(f"image_size must be divisible by {vqgan.downsampling}, got {size}")
    if clip_embedding.ndim != 2 or clip_embedding.shape[1] != clip.embed_dim:
        raise ValueError(f"clip_embedding must be (B, {clip.embed_dim}), got {tuple(clip_embedding.shape)}")
    seeds, images = per_sample_seeds(seed, len(clip_embedding)), []
    for rows in torch.arange(len(seeds)).split(batch_size):
        generators = [torch.Generator(vqgan.device).manual_seed(seeds[row]) for row in rows]
        latents = Latents(vqgan, generators, size // vqgan.downsampling)
        optimizer = torch.optim.Adam([latents.z], lr=learning_rate)
        target = clip_embedding[rows.to(clip_embedding.device)].detach()
        for step in range(steps):
            views = augment(latents.images(), generators, cutouts, smallest_cut, noise)
            loss = great_circle(clip.encode_image(views), target.repeat_interleave(cutouts, dim=0))
            loss = rearrange(loss, "(b n) -> b n", n=cutouts).mean(dim=1)  # (B,)
            (latents.z.grad,) = torch.autograd.grad(loss.sum(), latents.z)  # the models' own weights get none
            optimizer.step()
            latents.clamp_()
            if watch:
                watch(step, loss.detach())
        with torch.no_grad():
            images.append(latents.images().clamp(-1, 1))
    return torch.cat(images)


class Latents:
    """What is optimised: latents ``z`` (B, D, h, w) in the space of the codebook, which any quantizer has."""

    def __init__(self, vqgan: VQGAN, generators: Sequence[torch.Generator], side: int):
        self.vqgan, self.codebook = vqgan, vqgan.codebook.detach()
        start = [torch.randint(len(self.codebook), (side, side), generator=g, device=g.device) for g in generators]
        self.z = rearrange(self.codebook[torch.stack(start)], "b h w d -> b d h w").clone().requires_grad_()
        self.low, self.high = (bound.values[:, None, None] for bound in (self.codebook.min(0), self.codebook.max(0)))

    def images(self) -> Tensor:
        """The picture of the nearest codes, (B, 3, H, W); its gradient goes to ``z`` as if they were no others."""
        flat = rearrange(self.z.detach(), "b d h w -> (b h w) d")
        distance = self.codebook.square().sum(1) - 2 * flat @ self.codebook.T  # (BT, K), but for what no code changes
        codes = self.codebook[distance.argmin(dim=1)]
        b, _, h, w = self.z.shape
        z_q = rearrange(codes, "(b h w) d -> b d h w", b=b, h=h, w=w)
        return self.vqgan.decode_latents(z_q + self.z - self.z.detach())

    @torch.no_grad()
    def clamp_(self) -> None:
        """Back into the codebook's range, dimension by dimension."""
        self.z.copy_(self.z.clamp(self.low, self.high))


def great_circle(a: Tensor, b: Tensor) -> Tensor:
    """Squared great-circle distance of unit vectors, halved: (N, E), (N, E) -> (N,); ``angle ** 2 / 2``."""
    return 2 * ((a - b).norm(dim=-1) / 2).clamp(max=1 - 1e-6).arcsin().square()


def augment(
    images: Tensor, generators: Sequence[torch.Generator], cutouts: int, smallest_cut: float, noise: float
) -> Tensor:
    """Random square crops, half of them mirrored, with noise: (B, 3, H, W) -> (B * cutouts, 3, H, W), differentiable.

    A row's crops and noise come from its own generator.
    """
    random = torch.stack([torch.rand(cutouts, 5, generator=g, device=g.device) for g in generators]).flatten(0, 1)
    scale = smallest_cut + (1 - smallest_cut) * random[:, 0]  # side of the crop
    x, y = ((2 * random[:, 1:3] - 1) * (1 - scale)[:, None]).T  # centre, in [-1, 1]
    mirror = torch.where(random[:, 3] < 0.5, -1.0, 1.0)
    none = torch.zeros_like(scale)
    theta = torch.stack([scale * mirror, none, x, none, scale, y], dim=1).view(-1, 2, 3)
    many = repeat(images, "b c h w -> (b n) c h w", n=cutouts)
    grid = F.affine_grid(theta, list(many.shape), align_corners=False)
    crops = F.grid_sample(many, grid, padding_mode="border", align_corners=False)
    if noise == 0:
        return crops
    shape = (cutouts, *images.shape[1:])
    grain = torch.cat([torch.randn(shape, generator=g, device=g.device) for g in generators])
    return crops + grain * (noise * random[:, 4])[:, None, None, None]
