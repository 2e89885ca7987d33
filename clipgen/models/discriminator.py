"""The PatchGAN discriminator of pix2pix (arXiv:1611.07004): one logit per patch."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Map images (B, 3, H, W) to logits (B, 1, h', w'), which are high if a patch looks real.

    Args:
        channels: channels of the first layer; doubled after each strided layer, up to 8 x ``channels``.
        num_layers: strided layers; 3 sees patches of 70 x 70 pixels (the paper).
    """

    def __init__(self, channels: int = 64, num_layers: int = 3):
        super().__init__()
        width = [min(2**i, 8) * channels for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [nn.Conv2d(width[i - 1], width[i], 4, stride=stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width[i]), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(width[-1], 1, 4, padding=1))
        self.apply(init_weights)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


def init_weights(module: nn.Module) -> None:
    """Initialize as pix2pix: N(0, 0.02) for convolutions, N(1, 0.02) for the gains of batch norm."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def sizes_from_state(state: dict[str, Tensor]) -> dict[str, int]:
    """Return ``channels`` and ``num_layers`` of a PatchGAN from its convolutions; {} if the state is empty."""
    kernels = [tensor for tensor in state.values() if tensor.ndim == 4]
    if not kernels:
        return {}
    return {"channels": kernels[0].shape[0], "num_layers": len(kernels) - 2}


def average_statistics(module: nn.Module) -> None:
    """Replace the running statistics of batch norms by their averages over all ranks, which saw different images."""
    if not dist.is_initialized():
        return
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None:
            for statistic in (norm.running_mean, norm.running_var):
                dist.all_reduce(statistic)
                statistic /= dist.get_world_size()
