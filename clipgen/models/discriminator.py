"""The PatchGAN discriminator of pix2pix (arXiv:1611.07004): one logit a patch."""

from __future__ import annotations

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) -> logits (B, 1, h', w'): high where a patch looks real.

    Args:
        ndf: channels of the first layer, doubled layer by layer up to eight times.
        n_layers: strided layers; 3 sees patches of 70 x 70 pixels (the paper).
    """

    def __init__(self, ndf: int = 64, n_layers: int = 3):
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, got {n_layers}")
        width = [min(2**i, 8) * ndf for i in range(n_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, n_layers + 1):
            stride = 2 if i < n_layers else 1
            layers += [nn.Conv2d(width[i - 1], width[i], 4, stride=stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width[i]), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(width[-1], 1, 4, padding=1))
        self.apply(init_weights)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


def init_weights(module: nn.Module) -> None:
    """pix2pix' initialisation: N(0, 0.02) for convolutions, N(1, 0.02) for the gains of batch norm."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def sizes_of(state: dict[str, Tensor]) -> dict[str, int]:
    """``ndf`` and ``n_layers`` of a PatchGAN, read off its convolutions; nothing where there is none."""
    kernels = [tensor for tensor in state.values() if tensor.ndim == 4]
    return {"ndf": kernels[0].shape[0], "n_layers": len(kernels) - 2} if kernels else {}
