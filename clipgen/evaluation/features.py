"""The feature spaces in which sets of images are compared."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from clipgen.clip import FrozenCLIP


class Features(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> features (B, ``num_features``), by a frozen function."""

    def __init__(self, function: Any):
        super().__init__()
        self.function = function
        with torch.no_grad():
            self.num_features = self(torch.zeros(2, 3, 64, 64)).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        features = self.function(images)
        if not isinstance(features, Tensor) or features.shape[:1] != images.shape[:1] or features.ndim != 2:
            raise ValueError(f"features must be ({len(images)}, F), got {getattr(features, 'shape', type(features))}")
        return features.float()


def feature_extractor(name: str) -> Features:
    """The features of a name.

    Args:
        name: ``"inception"``: torch-fidelity's Inception-v3, 2048 features, by its own download;
            ``"clip:MODEL"`` or ``"clip:MODEL:TAG"``: an image encoder, named as for ``FrozenCLIP``;
            ``"module:function"``: anything that takes images (B, 3, H, W) in [-1, 1] and returns (B, F).

    Raises:
        ValueError: there is no such extractor, or its weights cannot be had.
    """
    kind, _, rest = name.partition(":")
    if name == "inception":
        return Features(inception())
    if not rest:
        raise ValueError(f"features must be inception, clip:MODEL[:TAG] or module:function, got {name!r}")
    if kind == "clip":
        model, _, tag = rest.partition(":")
        return Features(FrozenCLIP(model, tag or None).encode_image)
    try:
        return Features(getattr(import_module(kind), rest))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features {name!r} cannot be had: {error}") from error


def inception() -> Any:
    """torch-fidelity's Inception-v3, as torchmetrics wraps it."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        network = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except Exception as error:  # the package or its download is missing: the way out is the same
        raise ValueError(
            f"features 'inception' need torch-fidelity and its weights ({' '.join(str(error).split())}): pip install "
            "torch-fidelity and go online once, or name others: clip:MODEL[:TAG], module:function"
        ) from error
    return lambda images: network(((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
