"""BigGAN-CLIP (CLIP-GEN, Sec. 4.3, Figs. 4 and 5): latents and classes of a BigGAN, optimized to match a prompt.

The algorithm is that of big-sleep, with its constants. Unlike the original, an image follows from its seed: all random
numbers come from one generator per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.clip import FrozenCLIP
from clipgen.sampling import per_sample_seeds

CLASS_LOGIT_MEAN = -3.9
CLASS_LOGIT_STD = 0.3
# Side of a cutout, relative to the image's.
CUT_MEAN = 0.8
CUT_STD = 0.3
CUT_MIN = 0.5
CUT_MAX = 0.95
SIMILARITY_WEIGHT = 100
CLASS_WEIGHT = 50
VARIANCE_WEIGHT = 4

# Receives the number of the image, the step, the loss, and a function that returns the current image (1, 3, H, W).
OptimizationCallback = Callable[[int, int, float, Callable[[], Tensor]], None]


class LayeredGenerator(Protocol):
    """A generator with one condition per layer, such as ``BigGANDeep`` and ``BigGAN``."""

    num_layers: int
    layer_noise_dim: int
    num_classes: int

    def generate(self, noise: Tensor, class_weights: Tensor, truncation: float = 1.0) -> Tensor:
        """Map noise (B, num_layers, layer_noise_dim) and classes (B, num_layers, num_classes) to images in [-1, 1]."""
        ...


@dataclass(frozen=True)
class BigGANCLIPParams:
    """Settings of the optimization; the defaults are big-sleep's, but for the number of steps (21 000 there).

    Args:
        steps: steps of Adam.
        learning_rate: learning rate of Adam.
        cutouts: views of the image per step.
        center_bias: place views near the center, instead of uniformly.
        max_classes: number of classes per layer; None uses all, each with a weight of its own.
        class_temperature: temperature of the softmax over classes, with ``max_classes``.
        ema_decay: decay of the average of the latents, of which the image is generated.
        keep_best_every: compare the averaged image after this many steps, and keep the best; None keeps the last.
    """

    steps: int = 500
    learning_rate: float = 0.07
    cutouts: int = 128
    center_bias: bool = False
    max_classes: int | None = None
    class_temperature: float = 2.0
    ema_decay: float = 0.99
    keep_best_every: int | None = None

    def __post_init__(self) -> None:
        for name, value, minimum in (("steps", self.steps, 0), ("cutouts", self.cutouts, 1)):
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0 and finite, got {self.learning_rate}")
        if not self.class_temperature > 0:
            raise ValueError(f"class_temperature must be above 0, got {self.class_temperature}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.keep_best_every is not None and self.keep_best_every < 1:
            raise ValueError(f"keep_best_every must be at least 1, got {self.keep_best_every}")


def biggan_clip(
    generator: LayeredGenerator,
    clip: FrozenCLIP,
    prompts: Tensor,
    penalized: Tensor | None = None,
    *,
    num_images: int = 1,
    seed: int | Sequence[int] | None = None,
    params: BigGANCLIPParams | None = None,
    callback: OptimizationCallback | None = None,
) -> Tensor:
    """Generate images near the prompts, and far from the penalized prompts, by Adam on latents and class logits.

    Args:
        generator: a frozen generator on the device of ``clip``.
        clip: the CLIP model.
        prompts: embeddings of the prompts, all of which every image should match, (P, E).
        penalized: embeddings of prompts that it should not match, (Q, E).
        num_images: number of images.
        seed: image i uses ``seed + i``; or one seed per image.
        params: settings of the optimization.
        callback: called after each step.

    Returns:
        (num_images, 3, H, W) in [-1, 1].

    Raises:
        ValueError: an argument is out of range.
    """
    params = params or BigGANCLIPParams()
    if params.max_classes is not None and not 1 <= params.max_classes <= generator.num_classes:
        raise ValueError(f"max_classes must be in [1, {generator.num_classes}], got {params.max_classes}")
    for name, embeddings in (("prompts", prompts), ("penalized", penalized)):
        if embeddings is not None and (embeddings.ndim != 2 or embeddings.shape[1] != clip.embed_dim):
            raise ValueError(f"{name} must be (N, {clip.embed_dim}), got {tuple(embeddings.shape)}")
    images = []
    for number, image_seed in enumerate(per_sample_seeds(seed, num_images)):
        run = Optimization(generator, clip, prompts, penalized, params, image_seed)
        images.append(run.optimize(number, callback))
    return torch.cat(images)


class Optimization:
    """The optimization of one image; arguments as in ``biggan_clip``."""

    def __init__(
        self,
        generator: LayeredGenerator,
        clip: FrozenCLIP,
        prompts: Tensor,
        penalized: Tensor | None,
        params: BigGANCLIPParams,
        seed: int,
    ):
        self.generator = generator
        self.clip = clip
        self.params = params
        self.seed = seed
        self.prompts = prompts.detach()
        self.penalized = prompts[:0].detach() if penalized is None else penalized.detach()
        self.random = torch.Generator().manual_seed(seed)  # on the CPU, so that all devices get the same numbers
        layers = generator.num_layers
        noise = torch.randn(layers, generator.layer_noise_dim, generator=self.random)
        logits = torch.randn(layers, generator.num_classes, generator=self.random)
        self.noise = noise.to(clip.device).requires_grad_()
        self.logits = (CLASS_LOGIT_MEAN + CLASS_LOGIT_STD * logits).to(clip.device).requires_grad_()
        self.average = AveragedLatents([self.noise, self.logits], params.ema_decay)

    def optimize(self, number: int, callback: OptimizationCallback | None) -> Tensor:
        """Return the image (1, 3, H, W) of the averaged latents after all steps, or the best of them."""
        optimizer = torch.optim.Adam([self.noise, self.logits], lr=self.params.learning_rate)
        interval = self.params.keep_best_every
        best = None
        best_loss = float("inf")
        for step in range(self.params.steps):
            loss = self.step(optimizer)
            if callback:
                callback(number, step, loss, self.averaged_image)
            if interval and (step + 1) % interval == 0:
                image = self.averaged_image()
                image_loss = self.score(image)
                if image_loss < best_loss:
                    best = image
                    best_loss = image_loss
        return self.averaged_image() if best is None else best

    def step(self, optimizer: torch.optim.Optimizer) -> float:
        """Make one step of Adam, and return the loss before it."""
        weights = self.class_weights(self.logits)
        image = self.generator.generate(self.noise[None], weights[None])
        loss = self.view_loss(image, self.random) + latent_loss(self.noise) + class_loss(weights)
        gradients = torch.autograd.grad(loss, [self.noise, self.logits])
        self.noise.grad, self.logits.grad = gradients
        optimizer.step()
        self.average.update([self.noise, self.logits])
        return loss.item()

    def class_weights(self, logits: Tensor) -> Tensor:
        """Return the class weights of logits, (R, C) -> (R, C)."""
        return class_weights(logits, self.params.max_classes, self.params.class_temperature)

    def view_loss(self, image: Tensor, random: torch.Generator) -> Tensor:
        """Return the similarity loss of random views of an image (1, 3, H, W)."""
        views = cut_views(image, self.params.cutouts, self.clip.image_size, random, self.params.center_bias)
        return similarity_loss(self.clip.encode_image(views), self.prompts, self.penalized)

    @torch.no_grad()
    def averaged_image(self) -> Tensor:
        """Return the image (1, 3, H, W) of the averaged latents."""
        noise, logits = self.average.values()
        return self.generator.generate(noise[None], self.class_weights(logits)[None])

    @torch.no_grad()
    def score(self, image: Tensor) -> float:
        """Return the similarity loss on views that are the same for all steps of an image."""
        return self.view_loss(image, torch.Generator().manual_seed(self.seed)).item()


# -------------------------------------------------------------------------------------------------------------- losses


def class_weights(logits: Tensor, max_classes: int | None = None, temperature: float = 2.0) -> Tensor:
    """Return the weights of the classes in each layer, (R, C) -> (R, C).

    Without ``max_classes`` they are sigmoids. With it, the most probable class is taken ``max_classes`` times, each
    time by a softmax over the classes that are left; the others get 0.
    """
    if max_classes is None:
        return logits.sigmoid()
    weights = torch.zeros_like(logits)
    remaining = logits / temperature
    for _ in range(max_classes):
        probability, index = remaining.softmax(dim=1).max(dim=1, keepdim=True)  # (R, 1)
        weights = weights.scatter(1, index, probability)
        remaining = remaining.scatter(1, index, -torch.inf)
    return weights


def similarity_loss(views: Tensor, prompts: Tensor, penalized: Tensor) -> Tensor:
    """Return -100 times the mean cosine similarity to each prompt, plus that to each penalized prompt, summed.

    Args:
        views: embeddings of the views, (N, E); none of the embeddings needs unit norm.
        prompts: (P, E).
        penalized: (Q, E).
    """
    views = F.normalize(views, dim=-1)
    wanted = (F.normalize(prompts, dim=-1) @ views.T).mean(dim=1).sum()
    unwanted = (F.normalize(penalized, dim=-1) @ views.T).mean(dim=1).sum()
    return SIMILARITY_WEIGHT * (unwanted - wanted)


def latent_loss(noise: Tensor) -> Tensor:
    """Return the distance of each layer's noise (R, D) from a standard normal, by its first four moments."""
    mean = noise.mean(dim=1)
    centered = noise - mean[:, None]
    standard = centered / centered.square().mean(dim=1, keepdim=True).sqrt()
    skewness = standard.pow(3).mean(dim=1)
    excess_kurtosis = standard.pow(4).mean(dim=1) - 3
    moments = (1 - noise.std(dim=1)).abs() + mean.abs() + skewness.abs() + excess_kurtosis.abs()  # (R,)
    return moments.mean() + VARIANCE_WEIGHT * noise.square().mean().clamp(min=1)


def class_loss(weights: Tensor) -> Tensor:
    """Return the mean square of 50 times the class weights (R, C), without the largest of each layer."""
    others = weights.topk(weights.shape[1] - 1, dim=1, largest=False).values
    return (CLASS_WEIGHT * others).square().mean() if others.numel() else weights.sum() * 0


class AveragedLatents:
    """Exponential moving average without bias towards its start.

    Args:
        values: initial values, which are the first update.
        decay: decay of each update.
    """

    def __init__(self, values: Sequence[Tensor], decay: float):
        self.decay = decay
        self.remainder = 1.0
        self.sums = [torch.zeros_like(value) for value in values]
        self.update(values)

    @torch.no_grad()
    def update(self, values: Sequence[Tensor]) -> None:
        """Add the current values."""
        self.remainder *= self.decay
        for total, value in zip(self.sums, values):
            total.mul_(self.decay).add_(value.detach(), alpha=1 - self.decay)

    def values(self) -> list[Tensor]:
        """Return the averages."""
        return [total / (1 - self.remainder) for total in self.sums]


# ------------------------------------------------------------------------------------------------------------- cutouts


def cut_views(image: Tensor, cutouts: int, size: int, random: torch.Generator, center_bias: bool = False) -> Tensor:
    """Return random square views of an image, (1, 3, W, W) -> (cutouts, 3, size, size), by nearest neighbor.

    Args:
        image: the image.
        cutouts: number of views.
        size: side of the views in pixels.
        random: source of sizes and offsets, on the CPU.
        center_bias: place views near the center, instead of uniformly.
    """
    width = image.shape[-1]
    views = []
    for _ in range(cutouts):
        scale = CUT_MEAN + CUT_STD * float(torch.randn((), generator=random))
        side = max(1, int(width * min(max(scale, CUT_MIN), CUT_MAX)))
        y = offset(width - side, random, center_bias)
        x = offset(width - side, random, center_bias)
        views.append(F.interpolate(image[:, :, y : y + side, x : x + side], size=(size, size)))
    return torch.cat(views)


def offset(largest: int, random: torch.Generator, center_bias: bool) -> int:
    """Return a random offset in [0, largest]."""
    if center_bias:
        value = int(largest / 2 + largest / 4 * float(torch.randn((), generator=random)))
        if 0 <= value <= largest:
            return value
    return int(torch.randint(largest + 1, (), generator=random))
