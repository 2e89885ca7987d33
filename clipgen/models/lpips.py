"""LPIPS, the perceptual loss (arXiv:1801.03924): torchmetrics' network, with weights from where they can be had."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipgen.files import one_line


class MissingWeightsError(ValueError):
    """VGG-16's weights cannot be had; says how to provide them or to go without."""


def build_lpips() -> Any:
    """The network with random weights but for its linear layers, which come with torchmetrics; frozen."""
    from torchmetrics.functional.image.lpips import _LPIPS  # pulls torchvision's models: only where it is needed

    network: Any = _LPIPS(net="vgg", pnet_rand=True)
    network.net = VGGSlices(network.net)
    return network.eval().requires_grad_(False)


class VGGSlices(nn.Module):
    """The slices of torchmetrics' VGG-16, under their names: images -> what each gives. Its own ``forward`` makes a
    class at every call, for which torch.compile would compile what follows again and again."""

    def __init__(self, network: nn.Module):
        super().__init__()
        for name, part in network.named_children():
            self.add_module(name, part)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = [images]
        for part in self.children():
            features.append(part(features[-1]))
        return features[1:]


def load_lpips(vgg_weights: str | None = None) -> nn.Module:
    """images, images in [-1, 1] -> (B, 1, 1, 1), frozen.

    Args:
        vgg_weights: a file of torchvision's VGG-16 weights; None takes them from torchvision's cache or download.

    Returns:
        A module that must stay in evaluation mode: its linear layers hold dropout.

    Raises:
        MissingWeightsError: they cannot be loaded.
    """
    from torchvision.models import VGG16_Weights

    try:
        if vgg_weights is None:
            vgg = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=False)
        else:
            vgg = torch.load(Path(vgg_weights).expanduser(), map_location="cpu", weights_only=True)
        return copy_vgg_(build_lpips(), vgg)
    except Exception as error:  # a missing file, no network, a file of something else: the way out is the same
        source = f"of {vgg_weights}" if vgg_weights else "of VGG-16 from torchvision"
        raise MissingWeightsError(
            f"the perceptual loss needs the weights {source}, which cannot be loaded ({one_line(error)}): put "
            f"vgg16-397923af.pth into torchvision's cache ({torch.hub.get_dir()}/checkpoints), name the file in "
            "model.loss.vgg_weights=PATH, or go without by model.loss.perceptual_weight=0"
        ) from error


def lpips_from_state(state: dict[str, Tensor]) -> nn.Module:
    """With the weights that a published checkpoint or our own folder holds."""
    network = build_lpips()
    network.load_state_dict({**state, **{f"lins.{k[3:]}": v for k, v in state.items() if re.match(r"lin\d", k)}})
    return network


def copy_vgg_(network: Any, vgg: dict[str, Tensor]) -> nn.Module:
    """Put ``features.N.*`` of torchvision's VGG-16 into the slices of LPIPS, where layer N keeps its number."""
    for name, parameter in network.net.named_parameters():
        layer = name.split(".", 1)[1]  # slice1.0.weight -> 0.weight
        parameter.data.copy_(vgg[f"features.{layer}"])
    return network
