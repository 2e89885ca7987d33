"""Load LPIPS, the perceptual loss, with the weights of torchvision's VGG-16."""

from __future__ import annotations

from typing import Any

import torch
import torchmetrics
from torch import nn

from clipgen.checkpoint.safe_load import State, check_download, only_weights, read_checkpoint
from clipgen.models.lpips import build_lpips, copy_vgg_
from clipgen.storage.files import one_line


class MissingWeightsError(ValueError):
    """VGG-16's weights could not be loaded; the message says how to provide them or do without."""


class UnknownNetworkError(ValueError):
    """The installed version of torchmetrics has another network."""


def load_lpips(vgg_weights: str | None = None) -> nn.Module:
    """Load the frozen LPIPS: two batches of images (B, 3, H, W) in [-1, 1] -> distances (B, 1, 1, 1).

    Args:
        vgg_weights: file of torchvision's VGG-16 weights; None uses torchvision's cache or downloads them.

    Returns:
        A module that must stay in evaluation mode, because its linear layers contain dropout.

    Raises:
        MissingWeightsError: the weights cannot be loaded.
        UnknownNetworkError: this version of torchmetrics has another network.
    """
    try:
        weights = published_vgg() if vgg_weights is None else read_checkpoint(vgg_weights)
        return copy_vgg_(build_network(), weights)
    except UnknownNetworkError:
        raise
    # Missing file, no network, wrong content: the remedy is the same.
    except Exception as error:
        source = f"of {vgg_weights}" if vgg_weights else "of VGG-16 from torchvision"
        raise MissingWeightsError(
            f"the perceptual loss needs the weights {source}, which cannot be loaded ({one_line(error)}): put "
            f"vgg16-397923af.pth into torchvision's cache ({torch.hub.get_dir()}/checkpoints), set "
            "model.loss.vgg_weights=PATH, or disable the loss with model.loss.perceptual_weight=0"
        ) from error


def build_network() -> Any:
    """Build the network with random weights; the network of another torchmetrics is not called missing weights."""
    try:
        return build_lpips()
    except (ImportError, AttributeError, TypeError) as error:
        raise UnknownNetworkError(
            f"torchmetrics {torchmetrics.__version__} does not work as clipgen expects ({one_line(error)}): "
            "pip install 'torchmetrics>=1.5,<2'"
        ) from error


def published_vgg() -> State:
    """Return torchvision's weights of VGG-16, from its cache or its download."""
    from torchvision.models import VGG16_Weights

    published = VGG16_Weights.IMAGENET1K_V1
    check_download(published.url)
    with only_weights():
        weights: State = published.get_state_dict(progress=False, check_hash=True)
    return weights
