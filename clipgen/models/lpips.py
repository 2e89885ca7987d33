"""LPIPS, the perceptual loss (arXiv:1801.03924): torchmetrics' network and torchvision's VGG-16 weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipgen.storage.files import one_line


class MissingWeightsError(ValueError):
    """VGG-16's weights could not be loaded; the message says how to provide them or do without."""


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


def load_lpips(vgg_weights: str | None = None) -> nn.Module:
    """Load the frozen LPIPS: two batches of images (B, 3, H, W) in [-1, 1] -> distances (B, 1, 1, 1).

    Args:
        vgg_weights: file of torchvision's VGG-16 weights; None uses torchvision's cache or downloads them.

    Returns:
        A module that must stay in evaluation mode, because its linear layers contain dropout.

    Raises:
        MissingWeightsError: the weights cannot be loaded.
    """
    from torchvision.models import VGG16_Weights

    try:
        if vgg_weights is None:
            vgg = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=False)
        else:
            vgg = torch.load(Path(vgg_weights).expanduser(), map_location="cpu", weights_only=True)
        return copy_vgg_(build_lpips(), vgg)
    # Missing file, no network, wrong content: the remedy is the same.
    except Exception as error:
        source = f"of {vgg_weights}" if vgg_weights else "of VGG-16 from torchvision"
        raise MissingWeightsError(
            f"the perceptual loss needs the weights {source}, which cannot be loaded ({one_line(error)}): put "
            f"vgg16-397923af.pth into torchvision's cache ({torch.hub.get_dir()}/checkpoints), set "
            "model.loss.vgg_weights=PATH, or disable the loss with model.loss.perceptual_weight=0"
        ) from error


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
