"""The losses of both stages, as functions of tensors; LPIPS has a file of its own."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.models.config import CLIP_LOSS_ESTIMATORS


def reconstruction_loss(images: Tensor, reconstruction: Tensor, kind: str) -> Tensor:
    """``"l2"``: ||I - I'||^2 (Eq. 4 of CLIP-GEN); ``"l1"``: VQ-GAN's code. Means over elements."""
    if kind == "l2":
        return F.mse_loss(reconstruction, images)
    if kind == "l1":
        return F.l1_loss(reconstruction, images)
    raise ValueError(f"loss.reconstruction must be 'l1' or 'l2', got {kind!r}")


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor, kind: str) -> Tensor:
    """What the discriminator minimises: ``"hinge"`` (arXiv:1705.02894), or ``"log"``: the negative of Eq. 5."""
    if kind == "hinge":
        return (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean()) / 2
    if kind == "log":
        return (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()) / 2
    raise ValueError(f"gan.loss must be 'hinge' or 'log', got {kind!r}")


def generator_loss(logits_fake: Tensor, kind: str) -> Tensor:
    """What the generator minimises: -D(I') for ``"hinge"``; -log D(I') for ``"log"``, Eq. 5's non-saturating form."""
    if kind == "hinge":
        return -logits_fake.mean()
    if kind == "log":
        return F.softplus(-logits_fake).mean()
    raise ValueError(f"gan.loss must be 'hinge' or 'log', got {kind!r}")


def adaptive_weight(
    reconstruction: Tensor, last_layer: Tensor, gradient: Tensor, adversarial: Tensor, maximum: float = 1e4
) -> Tensor:
    """VQ-GAN's lambda (arXiv:2012.09841, Eq. 7): makes both gradients equally long at the decoder's last layer.

    Args:
        reconstruction: made by ``last_layer``. gradient, adversarial: of the two losses, at the reconstruction.
        maximum: bound of the result.
    """
    ours, theirs = (
        torch.autograd.grad(reconstruction, last_layer, part.to(reconstruction), retain_graph=True)[0].float().norm()
        for part in (gradient, adversarial)
    )
    return (ours / (theirs + 1e-4)).clamp(0, maximum).detach()


class LeCam(nn.Module):
    """LeCam's regularisation of the discriminator (arXiv:2104.03310): keeps its logits near the running mean of the
    other kind's, so that it does not win where images are few."""

    means: Tensor

    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("means", torch.zeros(2))  # of real and fake logits

    def forward(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        """E[relu(D(I) - mean_fake)^2] + E[relu(mean_real - D(I'))^2]; moves the running means."""
        with torch.no_grad():
            now = torch.stack([logits_real.float().mean(), logits_fake.float().mean()])
            if dist.is_initialized():  # the same on every rank
                dist.all_reduce(now)
                now /= dist.get_world_size()
            self.means.lerp_(now, 1 - self.decay)
        real, fake = self.means
        return F.relu(logits_real - fake).square().mean() + F.relu(real - logits_fake).square().mean()


def clip_loss(generated: Tensor, target: Tensor, kind: str = "log") -> Tensor:
    """How far unit vectors (B, E) are apart: ``"log"``: -log s (Eq. 9), with s = (1 + cos) / 2 in (0, 1]; or
    ``"cosine"``: 1 - cos, whose gradient is as long for far pairs as for near ones."""
    cosine = (generated * target).sum(dim=-1)
    if kind == "log":
        return -((1 + cosine) / 2).clamp(min=1e-6).log().mean()
    if kind == "cosine":
        return (1 - cosine).mean()
    raise ValueError(f"clip_loss.type must be 'log' or 'cosine', got {kind!r}")


def differentiable_codes(logits: Tensor, codebook: Tensor, kind: str) -> Tensor:
    """Codes that logits choose, with gradients: (B, T, K), (K, D) -> (B, T, D).

    ``"expected"``: the mean code, p @ codebook. ``"straight_through"``: the most likely code, with the gradient of
    the mean one (arXiv:1308.3432). ``"gumbel"``: a drawn code by the Gumbel-max trick, with the gradient of the mean
    one under the same noise (straight-through Gumbel-softmax at temperature 1, arXiv:1611.01144).
    """
    if kind not in CLIP_LOSS_ESTIMATORS:
        raise ValueError(f"clip_loss.estimator must be one of {', '.join(CLIP_LOSS_ESTIMATORS)}, got {kind!r}")
    if kind == "gumbel":
        noise = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
        logits = logits - noise.exponential_().log()
    mean = logits.softmax(dim=-1) @ codebook
    if kind == "expected":
        return mean
    return mean + (F.embedding(logits.argmax(dim=-1), codebook) - mean).detach()


class Averages:
    """Means over all rows of all ranks, the same on any number of ranks, however unequal their batches are.

    Ranks meet in ``compute`` alone, so that one without a batch keeps nobody waiting before.
    """

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, int]] = {}  # of values, and their number of rows

    def reset(self) -> None:
        """Begin again."""
        self.sums = {}

    def add(self, means: dict[str, Tensor], rows: int) -> None:
        """Take in the means over the rows of a batch."""
        for name, mean in means.items():
            value = mean.detach()
            value = (value if value.device.type == "mps" else value.double()) * rows  # MPS has no double
            total, count = self.sums.get(name, (torch.zeros_like(value), 0))
            self.sums[name] = total + value, count + rows

    def compute(self) -> dict[str, float]:
        """Return the means, on every rank."""
        ranks: list[dict[str, tuple[float, int]]] = [{name: (t.item(), n) for name, (t, n) in self.sums.items()}]
        if dist.is_initialized():
            mine, ranks = ranks[0], [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(ranks, mine)
        names = dict.fromkeys(name for rank in ranks for name in rank)
        found = {name: [rank[name] for rank in ranks if name in rank] for name in names}
        return {name: sum(t for t, _ in parts) / sum(n for _, n in parts) for name, parts in found.items()}
