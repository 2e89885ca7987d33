"""The feature spaces in which sets of images are compared."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor, nn

from clipgen.checkpoint.model_folder import fingerprint
from clipgen.clip import FrozenCLIP
from clipgen.files import one_line
from clipgen.images import to_bytes

KINDS = "inception[-clean][:FILE], clip:MODEL[:TAG], torchvision:MODEL[:FILE], timm:MODEL[:FILE] or module:function"
INCEPTION_SIZE = 299


class Features(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> features (B, ``num_features``), by a frozen function.

    Args:
        function: returns the features, or features and the logits (B, C) of a classifier.
        identity: tells this space from all others, weights and resize included.
    """

    def __init__(self, function: Any, identity: str = ""):
        super().__init__()
        self.function, self.identity = function, identity
        self.owner = getattr(function, "__self__", None)  # a method's network moves to other devices with this one
        with torch.no_grad():
            features, logits = self.classify(torch.zeros(2, 3, 64, 64))
        self.num_features, self.num_classes = features.shape[1], 0 if logits is None else logits.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(images)[0]

    def classify(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, F), and the logits (B, C) where the space is a classifier's."""
        found = self.function(images)
        features, logits = found if isinstance(found, tuple) else (found, None)
        if not isinstance(features, Tensor) or features.shape[:1] != images.shape[:1] or features.ndim != 2:
            raise ValueError(f"features must be ({len(images)}, F), got {getattr(features, 'shape', type(features))}")
        return features.float(), None if logits is None else logits.float()


def feature_extractor(name: str) -> Features:
    """The features of a name.

    Args:
        name: ``"inception"``: torch-fidelity's Inception-v3, 2048 features, resized as TensorFlow 1 did;
            ``"inception-clean"``: the same network after clean-fid's antialiased resize (arXiv:2104.11222); weights by
            torch-fidelity's download, or ``"inception:FILE"``;
            ``"clip:MODEL"`` or ``"clip:MODEL:TAG"``: an image encoder, named as for ``FrozenCLIP``;
            ``"torchvision:MODEL"``, ``"timm:MODEL"``: what enters the last linear layer of a classifier, with its own
            preprocessing; weights by the usual download, or ``"torchvision:MODEL:FILE"``;
            ``"module:function"``: anything that takes images (B, 3, H, W) in [-1, 1] and returns (B, F).

    Raises:
        ValueError: there is no such extractor, or its weights cannot be loaded.
    """
    kind, _, rest = name.partition(":")
    if kind in ("inception", "inception-clean"):
        return inception(name, clean=kind == "inception-clean", weights=rest or None)
    if not rest:
        raise ValueError(f"features must be {KINDS}, got {name!r}")
    if kind == "clip":
        clip = FrozenCLIP.from_spec(rest)
        return Features(clip.encode_image, f"{name} {fingerprint(clip.state_dict())}")
    if kind in ("torchvision", "timm"):
        model, _, weights = rest.partition(":")
        return classifier_features(name, load_torchvision if kind == "torchvision" else load_timm, model, weights)
    return imported(name, kind, rest)


def imported(name: str, module: str, function: str) -> Features:
    """A user's own function; its file's content is part of the identity."""
    try:
        found = import_function(module, function)
        return Features(found, f"{name} {source_hash(found)}")
    except (ImportError, AttributeError, OSError, TypeError) as error:  # no such thing, or it has no source in Python
        raise ValueError(f"features {name!r} cannot be loaded: {error}") from error


def import_function(module: str, name: str) -> Any:
    """``name`` of a module that can be imported, also from the current folder, where installed commands do not look.

    Raises:
        ImportError, AttributeError, ValueError: there is none.
    """
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return getattr(import_module(module), name)
    finally:
        sys.path.remove(here)


def source_hash(thing: Any) -> str:
    """A hash of the file in which a module or function is written."""
    return hashlib.sha256(inspect.getsource(inspect.getmodule(thing) or thing).encode()).hexdigest()[:16]


def inception(name: str, clean: bool, weights: str | None) -> Features:
    """torch-fidelity's Inception-v3, with one of two resizes."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if weights is not None:  # torch-fidelity would run what a crafted file asks for
            torch.load(weights, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights)
    except Exception as error:  # the package, its download or the file is missing: the way out is the same
        raise ValueError(
            f"features {name!r} need torch-fidelity and its weights ({one_line(error)}): pip install "
            '"clipgen[eval]" and go online once, or name a file, inception:FILE, or other features: '
            "clip:MODEL[:TAG], module:function"
        ) from error
    return Features(
        CleanInception(network) if clean else BytesInception(network),
        f"{name.split(':')[0]} {fingerprint(network.state_dict())}",
    )


class BytesInception(nn.Module):
    """torch-fidelity's network as it is: 8-bit pixels, and TensorFlow 1's bilinear resize inside."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(to_bytes(images))


class CleanInception(BytesInception):
    """The same behind clean-fid's resize: bicubic, antialiased, not rounded afterwards.

    The network's own forward takes bytes alone, so the resized image is put in where it enters the first convolution.
    """

    def __init__(self, network: Any):
        super().__init__(network)
        self.resized: Tensor | None = None
        network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: (self.resized,))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.resized = (clean_resize(to_bytes(images).float()) - 128) / 128
        placeholder = torch.zeros(len(images), 3, INCEPTION_SIZE, INCEPTION_SIZE, dtype=torch.uint8)
        return self.network(placeholder.to(images.device))


def clean_resize(pixels: Tensor, size: int = INCEPTION_SIZE) -> Tensor:
    """clean-fid's resize of pixels (B, 3, H, W) in [0, 255]; torch's antialiased bicubic is Pillow's."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 255)


Load = Callable[[str, str], tuple[nn.Module, Callable[[Tensor], Tensor]]]  # model, weights -> network, preprocessing


def classifier_features(name: str, load: Load, model: str, weights: str) -> Features:
    """A pretrained classifier's last hidden layer and logits."""
    try:
        network, preprocess = load(model, weights)
    except Exception as error:  # an unknown name, no network, a file of something else
        raise ValueError(f"features {name!r} cannot be loaded: {one_line(error)}") from error
    identity = f"{name.split(':')[0]}:{model} {fingerprint(network.state_dict())}"
    return Features(Classifier(network, preprocess), identity)


class Classifier(nn.Module):
    """Images in [-1, 1] -> what enters a classifier's last linear layer, and what leaves it."""

    def __init__(self, network: nn.Module, preprocess: Callable[[Tensor], Tensor]):
        super().__init__()
        self.network, self.preprocess = network.eval().requires_grad_(False), preprocess
        layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise ValueError("features need a classifier with a linear layer, got a network without one")
        layers[-1].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.last = (inputs[0], output)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.network(self.preprocess((images + 1) / 2))
        return self.last


def load_torchvision(model: str, weights: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A torchvision classifier by name; its default weights, or those of a file."""
    from torchvision.models import get_model, get_model_weights

    default: Any = get_model_weights(model)["DEFAULT"]
    network = get_model(model, weights=None if weights else default)
    if weights:
        network.load_state_dict(torch.load(Path(weights).expanduser(), map_location="cpu", weights_only=True))
    return network, default.transforms()


def load_timm(model: str, weights: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A timm classifier by name; its default weights, or those of a file."""
    import timm

    network = timm.create_model(model, pretrained=not weights, checkpoint_path=weights)
    config = timm.data.resolve_model_data_config(network)
    size, mode = config["input_size"][-2:], TF.InterpolationMode(config["interpolation"])

    def preprocess(images: Tensor) -> Tensor:
        short = int(min(size) / config["crop_pct"])
        resized = TF.resize(images, [short], mode, antialias=True)
        return TF.normalize(TF.center_crop(resized, list(size)), config["mean"], config["std"])

    return network, preprocess
