"""The losses of both stages as functions of tensors. LPIPS has a file of its own.

Losses are means over elements, samples or tokens. The paper prints sums and norms, so its weights of loss terms cannot
be compared with ours where the number of elements differs, as in Eq. 4 (pixels and codes) and Eq. 10 (tokens and
images); both modules have an option that turns the means into sums.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.models.config import CLIP_LOSS_ESTIMATORS, GAN_LOSSES


def reconstruction_loss(images: Tensor, reconstruction: Tensor, loss_type: str) -> Tensor:
    """Return the mean error per pixel and channel.

    Args:
        images: (B, 3, H, W).
        reconstruction: the same shape.
        loss_type: ``"l2"`` for the squared error (Eq. 4 of CLIP-GEN), ``"l1"`` for the absolute one (VQ-GAN's code).

    Returns:
        A scalar.

    Raises:
        ValueError: the loss type is unknown.
    """
    if loss_type == "l2":
        return F.mse_loss(reconstruction, images)
    if loss_type == "l1":
        return F.l1_loss(reconstruction, images)
    raise ValueError(f"loss.reconstruction must be 'l1' or 'l2', got {loss_type!r}")


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor, loss_type: str) -> Tensor:
    """Return the loss that the discriminator minimizes.

    Args:
        logits_real: logits (B, 1, h', w') of real images, high where a patch looks real.
        logits_fake: logits (B, 1, h', w') of reconstructions.
        loss_type: ``"hinge"`` (arXiv:1705.02894), ``"minimax"`` for the negative of Eq. 5, or ``"log"`` for half of it.

    Returns:
        A scalar.

    Raises:
        ValueError: the loss type is unknown.
    """
    if loss_type == "hinge":
        return (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean()) / 2
    if loss_type == "log":
        return (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()) / 2
    if loss_type == "minimax":
        return F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()
    raise ValueError(f"gan.loss must be one of {', '.join(GAN_LOSSES)}, got {loss_type!r}")


def generator_loss(logits_fake: Tensor, loss_type: str) -> Tensor:
    """Return the adversarial loss that the autoencoder minimizes.

    Args:
        logits_fake: the discriminator's logits (B, 1, h', w') of reconstructions.
        loss_type: ``"hinge"`` for -D(I'); ``"minimax"`` for log(1 - D(I')), the part of Eq. 5 that depends on the
            autoencoder; or ``"log"`` for -log D(I'), its non-saturating form, whose gradient does not vanish when the
            discriminator recognizes all reconstructions (arXiv:1406.2661, Sec. 3).

    Returns:
        A scalar.

    Raises:
        ValueError: the loss type is unknown.
    """
    if loss_type == "hinge":
        return -logits_fake.mean()
    if loss_type == "log":
        return F.softplus(-logits_fake).mean()
    if loss_type == "minimax":
        return -F.softplus(logits_fake).mean()
    raise ValueError(f"gan.loss must be one of {', '.join(GAN_LOSSES)}, got {loss_type!r}")


def adaptive_weight(
    reconstruction: Tensor,
    last_layer: Tensor,
    recon_grad: Tensor,
    adv_grad: Tensor,
    maximum: float = 1e4,
) -> Tensor:
    """Return VQ-GAN's adaptive weight of the adversarial loss (lambda in arXiv:2012.09841, Eq. 7).

    The weight is the ratio of the two losses' gradient norms at the decoder's last layer, so that the weighted
    gradients have equal norms there.

    Args:
        reconstruction: the decoder's output, (B, 3, H, W).
        last_layer: the weight of the decoder's last layer, which computed ``reconstruction``.
        recon_grad: gradient of the reconstruction losses w.r.t. the reconstruction, the same shape.
        adv_grad: gradient of the adversarial loss w.r.t. the reconstruction, the same shape.
        maximum: upper bound of the weight.

    Returns:
        A scalar in [0, maximum], without a gradient.
    """

    def norm_at_last_layer(grad: Tensor) -> Tensor:
        upstream = grad.to(reconstruction)
        return torch.autograd.grad(reconstruction, last_layer, upstream, retain_graph=True)[0].float().norm()

    recon_norm = norm_at_last_layer(recon_grad)
    adv_norm = norm_at_last_layer(adv_grad)
    return (recon_norm / (adv_norm + 1e-4)).clamp(0, maximum).detach()


class LeCam(nn.Module):
    """LeCam regularization of the discriminator (arXiv:2104.03310), which stabilizes training on small datasets.

    It penalizes logits that drift from the running mean of the logits of the opposite class (real or fake).

    Args:
        decay: decay of the running means.
    """

    means: Tensor

    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("means", torch.zeros(2))  # means of the real and of the fake logits

    def forward(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        """Update the running means and return E[relu(D(I) - mean_fake)^2] + E[relu(mean_real - D(I'))^2], a scalar.

        Args:
            logits_real: logits D(I) of real images, (B, 1, h', w').
            logits_fake: logits D(I') of reconstructions, (B, 1, h', w').
        """
        with torch.no_grad():
            batch_means = torch.stack([logits_real.float().mean(), logits_fake.float().mean()])
            if dist.is_initialized():
                # All ranks keep the same means.
                dist.all_reduce(batch_means)
                batch_means /= dist.get_world_size()
            self.means.lerp_(batch_means, 1 - self.decay)
        mean_real, mean_fake = self.means
        return F.relu(logits_real - mean_fake).square().mean() + F.relu(mean_real - logits_fake).square().mean()


def clip_loss(generated: Tensor, target: Tensor, loss_type: str = "log") -> Tensor:
    """Return the mean distance of CLIP embeddings.

    Args:
        generated: embeddings of generated images, unit vectors (B, E).
        target: embeddings of the condition, unit vectors (B, E).
        loss_type: ``"log"`` for -log s (Eq. 9) with s = (1 + cos) / 2, because the paper does not define the
            similarity s in (0, 1] and the cosine itself can be negative; or ``"cosine"`` for 1 - cos, whose gradient
            does not depend on the distance.

    Returns:
        A scalar of at least 0.

    Raises:
        ValueError: the loss type is unknown.
    """
    cosine = (generated * target).sum(dim=-1)
    if loss_type == "log":
        return -((1 + cosine) / 2).clamp(min=1e-6).log().mean()
    if loss_type == "cosine":
        return (1 - cosine).mean()
    raise ValueError(f"clip_loss.type must be 'log' or 'cosine', got {loss_type!r}")


def differentiable_codes(logits: Tensor, codebook: Tensor, estimator: str) -> Tensor:
    """Return the codes that logits select, with gradients: (B, T, K), (K, D) -> (B, T, D).

    Args:
        logits: (B, T, K).
        codebook: (K, D).
        estimator: ``"expected"`` returns the mean code, p @ codebook. ``"straight_through"`` returns the most likely
            code with the gradient of the mean code (arXiv:1308.3432). ``"gumbel"`` samples a code by the Gumbel-max
            trick, with the gradient of the mean code under the same noise (straight-through Gumbel-softmax at
            temperature 1, arXiv:1611.01144).

    Raises:
        ValueError: the estimator is unknown.
    """
    if estimator not in CLIP_LOSS_ESTIMATORS:
        raise ValueError(f"clip_loss.estimator must be one of {', '.join(CLIP_LOSS_ESTIMATORS)}, got {estimator!r}")
    if estimator == "gumbel":
        noise = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
        logits = logits - noise.exponential_().log()
    mean_code = logits.softmax(dim=-1) @ codebook
    if estimator == "expected":
        return mean_code
    selected_code = F.embedding(logits.argmax(dim=-1), codebook)
    return mean_code + (selected_code - mean_code).detach()


class Averages:
    """Means over all samples of all ranks, independent of the number of ranks and of their batch sizes.

    Ranks communicate in ``compute`` only, so a rank with fewer batches does not make the others wait.
    """

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, int]] = {}  # name -> (sum of values, number of samples)

    def reset(self) -> None:
        """Reset all averages."""
        self.sums = {}

    def add(self, means: dict[str, Tensor], batch_size: int) -> None:
        """Add the means over the samples of one batch."""
        for name, mean in means.items():
            value = mean.detach()
            if value.device.type != "mps":  # MPS does not support float64
                value = value.double()
            total, count = self.sums.get(name, (torch.zeros_like(value), 0))
            self.sums[name] = (total + value * batch_size, count + batch_size)

    def compute(self) -> dict[str, float]:
        """Return the means, on every rank."""
        sums_by_rank: list[dict[str, tuple[float, int]]] = [
            {name: (total.item(), count) for name, (total, count) in self.sums.items()}
        ]
        if dist.is_initialized():
            own_sums = sums_by_rank[0]
            sums_by_rank = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(sums_by_rank, own_sums)
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        for sums in sums_by_rank:
            for name, (total, count) in sums.items():
                totals[name] = totals.get(name, 0.0) + total
                counts[name] = counts.get(name, 0) + count
        return {name: totals[name] / counts[name] for name in totals}
