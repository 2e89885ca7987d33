"""LPIPS, the perceptual loss (arXiv:1801.03924): torchmetrics' network with torchvision's VGG-16."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn


def build_lpips() -> Any:
    """Build the frozen network: the linear layers have the published weights, VGG-16 has random ones."""
    # Imported here because it imports torchvision's models, which takes time.
    from torchmetrics.functional.image.lpips import _LPIPS

    network: Any = _LPIPS(net="vgg", pnet_rand=True)
    network.net = VGGSlices(network.net)
    return network.eval().requires_grad_(False)


class VGGSlices(nn.Module):
    """VGG-16 slices of torchmetrics' LPIPS; returns the list of feature maps.

    The original forward creates a namedtuple class per call, which makes torch.compile recompile.

    Args:
        network: torchmetrics' VGG-16, whose slices keep their names.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        for name, vgg_slice in network.named_children():
            self.add_module(name, vgg_slice)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = [images]
        for vgg_slice in self.children():
            features.append(vgg_slice(features[-1]))
        return features[1:]


def lpips_from_state(state: dict[str, Tensor]) -> nn.Module:
    """Build LPIPS with the weights of a published checkpoint or of a model folder."""
    network = build_lpips()
    # The network registers its linear layers twice: as lin0, lin1, ... and in the list lins.
    aliases = {f"lins.{name[3:]}": tensor for name, tensor in state.items() if re.match(r"lin\d", name)}
    network.load_state_dict(state | aliases)
    return network


def copy_vgg_(network: Any, vgg: dict[str, Tensor]) -> nn.Module:
    """Copy ``features.N.*`` of torchvision's VGG-16 into the slices of LPIPS, which keep the layer numbers N."""
    for name, parameter in network.net.named_parameters():
        layer = name.split(".", 1)[1]  # slice1.0.weight -> 0.weight
        parameter.data.copy_(vgg[f"features.{layer}"])
    return network
