"""Feature spaces in which sets of images are compared."""

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
from clipgen.checkpoint.safe_load import check_download, check_weights_file, only_weights, read_checkpoint
from clipgen.clip import FrozenCLIP
from clipgen.evaluation.classifier import ImageClassifier, load_classifier
from clipgen.images import to_bytes
from clipgen.storage.files import one_line

FORMATS = (
    "inception[-clean][:FILE], clip:MODEL[:TAG], classifier:FILE, torchvision:MODEL[:FILE], timm:MODEL[:FILE] or "
    "module:function"
)
INCEPTION_SIZE = 299  # input size in pixels
Preprocess = Callable[[Tensor], Tensor]  # images in [0, 1] -> the network's input


class Features(nn.Module):
    """A frozen function from images (B, 3, H, W) in [-1, 1] to features (B, ``num_features``).

    Args:
        function: returns the features, or the features and the logits (B, C) of a classifier.
        identity: distinguishes this space from all others, weights and resizing included.
    """

    def __init__(self, function: Any, identity: str = ""):
        super().__init__()
        self.function = function
        self.identity = identity
        # Register the network of a bound method as a submodule, so that ``to`` moves it, too.
        self.owner = getattr(function, "__self__", None)
        with torch.no_grad():
            features, logits = self.classify(torch.zeros(2, 3, 64, 64))
        self.num_features = features.shape[1]
        self.num_classes = 0 if logits is None else logits.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, F)."""
        return self.classify(images)[0]

    def classify(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the features (B, F), and the logits (B, C) if the function is a classifier."""
        outputs = self.function(images)
        features, logits = outputs if isinstance(outputs, tuple) else (outputs, None)
        if not isinstance(features, Tensor) or features.shape[:1] != images.shape[:1] or features.ndim != 2:
            raise ValueError(f"features must be ({len(images)}, F), got {getattr(features, 'shape', type(features))}")
        return features.float(), None if logits is None else logits.float()


def feature_extractor(name: str) -> Features:
    """Load a feature space by name.

    Args:
        name: one of

            - ``"inception"``: torch-fidelity's Inception-v3, 2048 features, resized as in TensorFlow 1.
              ``"inception-clean"``: the same network after clean-fid's antialiased resize (arXiv:2104.11222). The
              weights are torch-fidelity's download, or a file: ``"inception:FILE"``.
            - ``"clip:MODEL"`` or ``"clip:MODEL:TAG"``: an image encoder, named as for ``FrozenCLIP``.
            - ``"classifier:FILE"``: the classifier of small images that ``python -m clipgen train_classifier`` trains.
            - ``"torchvision:MODEL"``, ``"timm:MODEL"``: the input of a classifier's last layer, with the model's own
              preprocessing. The weights are the usual download, or a file: ``"torchvision:MODEL:FILE"``.
            - ``"module:function"``: any function of images (B, 3, H, W) in [-1, 1] that returns (B, F).

    Raises:
        ValueError: the name is unknown, or the weights cannot be loaded.
    """
    prefix, _, rest = name.partition(":")
    if prefix in ("inception", "inception-clean"):
        return inception_features(name, clean=prefix == "inception-clean", weights=rest or None)
    if not rest:
        raise ValueError(f"features must be {FORMATS}, got {name!r}")
    if prefix == "clip":
        clip = FrozenCLIP.from_spec(rest)
        return Features(clip.encode_image, f"{name} {fingerprint(clip.state_dict())}")
    if prefix == "classifier":
        return image_classifier_features(load_classifier(Path(rest).expanduser())[0])
    if prefix in CLASSIFIERS:
        return classifier_features(name)
    return imported_features(name)


# -------------------------------------------------------------------------------------------------- imported functions


def imported_features(name: str) -> Features:
    """Import a user's function; the content of its file is part of the identity."""
    module, _, function_name = name.partition(":")
    try:
        function = import_function(module, function_name)
        return Features(function, f"{name} {source_hash(function)}")
    # OSError, TypeError: the function has no source in Python.
    except (ImportError, AttributeError, OSError, TypeError) as error:
        raise ValueError(f"features {name!r} cannot be loaded: {error}") from error


def import_function(module: str, name: str) -> Any:
    """Import ``name`` from a module; the current folder is searched, too, as it is not by installed commands.

    Raises:
        ImportError, AttributeError, ValueError: it does not exist.
    """
    current_folder = str(Path.cwd())
    sys.path.insert(0, current_folder)
    try:
        return getattr(import_module(module), name)
    finally:
        sys.path.remove(current_folder)


def source_hash(function: Any) -> str:
    """Return a hash of the file that defines a function or module."""
    source = inspect.getsource(inspect.getmodule(function) or function)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------- Inception


def inception_features(name: str, clean: bool, weights: str | None) -> Features:
    """Load torch-fidelity's Inception-v3, with TensorFlow's resize or the clean one."""
    try:
        network = load_inception(weights)
    # The package, its download or the file is missing: what to do is the same.
    except Exception as error:
        raise ValueError(
            f"features {name!r} need torch-fidelity and its weights ({one_line(error)}): pip install "
            "torch-fidelity and go online once, or name a file, inception:FILE, or other features: "
            "clip:MODEL[:TAG], module:function"
        ) from error
    identity = f"{name.partition(':')[0]} {fingerprint(network.state_dict())}"
    return Features(CleanInception(network) if clean else BytesInception(network), identity)


def load_inception(weights: str | None) -> Any:
    """Load the network from a file, or from torch-fidelity's download."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    if weights is None:
        check_download(URL_INCEPTION_V3)
    else:
        read_checkpoint(weights)
    # torch-fidelity's own loading would execute code.
    with only_weights():
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights)


class BytesInception(nn.Module):
    """torch-fidelity's network as published: it takes 8-bit pixels and contains TensorFlow 1's bilinear resize."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (B, 2048) and logits (B, 1008) of images in [-1, 1]."""
        return self.network(to_bytes(images))


class CleanInception(BytesInception):
    """The same network after clean-fid's resize: bicubic, antialiased, without rounding afterwards.

    The forward pass of the network accepts bytes only, but a clean resize returns floats. So the network is called on
    a placeholder of the right size, which passes its own resize unchanged, and a hook replaces the input of the first
    convolution by the resized images.
    """

    def __init__(self, network: Any):
        super().__init__(network)
        self.resized: Tensor | None = None
        network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: (self.resized,))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (B, 2048) and logits (B, 1008) of images in [-1, 1]."""
        self.resized = (clean_resize(to_bytes(images).float()) - 128) / 128
        placeholder = torch.zeros(len(images), 3, INCEPTION_SIZE, INCEPTION_SIZE, dtype=torch.uint8)
        return self.network(placeholder.to(images.device))


def clean_resize(pixels: Tensor, size: int = INCEPTION_SIZE) -> Tensor:
    """Resize pixels (B, 3, H, W) in [0, 255] as clean-fid does; torch's antialiased bicubic filter is Pillow's."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 255)


# --------------------------------------------------------------------------------------------------------- classifiers


def image_classifier_features(classifier: ImageClassifier) -> Features:
    """Return a classifier's features and logits. The weights alone identify it, wherever its file lies."""
    return Features(classifier.classify, f"classifier {fingerprint(classifier.state_dict())}")


def classifier_features(name: str) -> Features:
    """Load a pretrained classifier, ``LIBRARY:MODEL[:FILE]``: the input of its last layer, and its logits."""
    library, model, weights = [*name.split(":", 2), ""][:3]
    try:
        classifier = CLASSIFIERS[library](model, weights)
    # An unknown name, no network, a file of something else.
    except Exception as error:
        raise ValueError(f"features {name!r} cannot be loaded: {one_line(error)}") from error
    return Features(classifier, f"{library}:{model} {classifier.fingerprint}")


class TorchvisionClassifier(nn.Module):
    """A torchvision classifier, cut before its last layer by ``create_feature_extractor``.

    Args:
        model: name of the model.
        weights: path of a state dict; empty for the default weights.
    """

    def __init__(self, model: str, weights: str):
        from torchvision.models import get_model, get_model_weights
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        super().__init__()
        default: Any = get_model_weights(model)["DEFAULT"]
        if not weights:
            check_download(default.url)
        with only_weights():
            network = get_model(model, weights=None if weights else default).eval().requires_grad_(False)
        if weights:
            network.load_state_dict(read_checkpoint(weights))
        self.fingerprint = fingerprint(network.state_dict())
        self.preprocess: Preprocess = default.transforms()
        # The last node of the graph returns the logits, and takes the output of the node before it.
        _, nodes = get_graph_node_names(network, suppress_diff_warning=True)
        self.network = create_feature_extractor(
            network, {nodes[-2]: "features", nodes[-1]: "logits"}, suppress_diff_warning=True
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (B, F) and logits (B, C) of images in [-1, 1]."""
        outputs = self.network(self.preprocess((images + 1) / 2))
        return outputs["features"], outputs["logits"]


class TimmClassifier(nn.Module):
    """A timm classifier, with its features before the logits.

    Args:
        model: name of the model.
        weights: path of a checkpoint; empty for the default weights.
    """

    def __init__(self, model: str, weights: str):
        import timm

        super().__init__()
        if weights:
            check_weights_file(Path(weights))
        with only_weights():
            network = timm.create_model(model, pretrained=not weights, checkpoint_path=weights)
        self.network: Any = network.eval().requires_grad_(False)
        self.fingerprint = fingerprint(network.state_dict())
        self.config = timm.data.resolve_model_data_config(network)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize, crop and normalize images in [0, 1] as the model was evaluated."""
        size = list(self.config["input_size"][-2:])
        short_side = int(min(size) / self.config["crop_pct"])
        interpolation = TF.InterpolationMode(self.config["interpolation"])
        resized = TF.resize(images, [short_side], interpolation, antialias=True)
        return TF.normalize(TF.center_crop(resized, size), self.config["mean"], self.config["std"])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (B, F) and logits (B, C) of images in [-1, 1]."""
        feature_map = self.network.forward_features(self.preprocess((images + 1) / 2))
        features = self.network.forward_head(feature_map, pre_logits=True)
        return features, self.network.forward_head(feature_map)


CLASSIFIERS: dict[str, Callable[[str, str], Any]] = {"torchvision": TorchvisionClassifier, "timm": TimmClassifier}
