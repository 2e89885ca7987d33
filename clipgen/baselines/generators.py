"""Class-conditional generators under one interface: ``images = generator(noise, class_indices)``.

    noise          (B, noise_dim), standard normal
    class_indices  (B,) int64
    images         (B, 3, H, W) in [-1, 1]

with ``noise_dim`` and ``class_names``, and ``device``, where its inputs have to be. Ours is ``ClassConditionalGenerator``;
``load_generator`` brings others in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.baselines.class_conditional import ClassConditionalGenerator
from clipgen.data.webdataset import read_names
from clipgen.evaluation.features import import_function
from clipgen.files import one_line

TOLERANCE = 0.05  # how far outside [-1, 1] a picture may lie by rounding


class Generator(Protocol):
    """What ``search`` searches."""

    noise_dim: int
    class_names: list[str]

    @property
    def device(self) -> torch.device: ...

    def __call__(self, noise: Tensor, class_indices: Tensor) -> Tensor: ...


class ExternalGenerator:
    """Anybody's function as a generator: what it returns is checked, and clamped to [-1, 1].

    Args:
        function: (noise, class_indices) -> images. name: what errors call it.
        noise_dim, class_names: of the interface.
        device: where it wants its inputs.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        name: str,
        noise_dim: int,
        class_names: Sequence[str],
        device: str | torch.device = "cpu",
    ):
        if noise_dim < 1:
            raise ValueError(f"noise_dim must be at least 1, got {noise_dim}")
        if not class_names:
            raise ValueError(f"class_names must name the classes of {name}, got none")
        self.function, self.name, self.noise_dim = function, name, noise_dim
        self.class_names, self.device = list(class_names), torch.device(device)

    @torch.no_grad()
    def __call__(self, noise: Tensor, class_indices: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: the function returned something else.
        """
        try:
            images = self.function(noise, class_indices)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-300:]
            shapes = f"noise {tuple(noise.shape)} and class_indices {tuple(class_indices.shape)}"
            raise ValueError(f"{self.name} failed on {shapes}: {reason}") from error
        check_returned(images, len(noise), self.name)
        return images.float().clamp(-1, 1)


def check_returned(images: Any, rows: int, name: str) -> None:
    """Raise ValueError unless these are images (rows, 3, H, W) in [-1, 1]."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[:2] != (rows, 3):
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{name} must return images ({rows}, 3, H, W), got {found}")
    if not images.isfinite().all():
        raise ValueError(f"{name} must return images in [-1, 1], got NaN or infinite pixels")
    low, high = images.min().item(), images.max().item()
    if low < -1 - TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(f"{name} must return images in [-1, 1], got pixels from {low:.3g} to {high:.3g}")


def load_generator(
    source: str,
    noise_dim: int | None = None,
    class_names: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    **settings: Any,
) -> Generator:
    """A generator by name.

    Args:
        source: a run folder of the label-conditioned transformer; ``biggan-deep-128``, ``-256``, ``-512`` or
            ``biggan:FOLDER``, see ``load_biggan``; a TorchScript file (``.pt``, ``.pth``, ``.ts``) whose forward takes
            (noise, class_indices); or ``module:function``, an importable function or object of the interface (the
            current folder is searched too).
        noise_dim, class_names: of the interface; for the last two, where the object does not say itself.
        settings: of ``ClassConditionalGenerator``.

    Raises:
        FileNotFoundError, ValueError: there is none; says what is missing.
    """
    path = Path(source).expanduser()
    if path.is_dir() or path.suffix == ".ckpt":
        return ClassConditionalGenerator.load(path, **settings).to(device)
    if settings:
        raise ValueError(f"{', '.join(settings)} must be left to our own models, got {source}")
    if source.startswith(("biggan-deep-", "biggan:")):
        return complete(load_biggan(source.removeprefix("biggan:"), device), source, noise_dim, class_names, device)
    if path.suffix in (".pt", ".pth", ".ts"):
        return complete(load_torchscript(path, device), source, noise_dim, class_names, device)
    module, colon, name = source.partition(":")
    if not colon:
        raise FileNotFoundError(
            "generator must be a run folder, biggan-deep-256, a TorchScript file or module:function, "
            f"got {source}, which does not exist"
        )
    return complete(load_function(module, name), source, noise_dim, class_names, device)


def complete(
    function: Any, name: str, noise_dim: int | None, class_names: Sequence[str] | None, device: str | torch.device
) -> ExternalGenerator:
    """A function with the rest of the interface: as given, else as it says itself."""
    noise_dim = noise_dim or getattr(function, "noise_dim", None)
    class_names = class_names or getattr(function, "class_names", None)
    missing = [key for key, value in (("noise_dim", noise_dim), ("class_names", class_names)) if not value]
    if missing or not noise_dim or not class_names:
        raise ValueError(f"{name} does not tell its {' and '.join(missing)}: they must be given")
    return ExternalGenerator(function, name, int(noise_dim), class_names, device)


class BigGAN:
    """BigGAN-deep (arXiv:1809.11096) of the package pytorch-pretrained-biggan, untruncated: noise is N(0, I)."""

    def __init__(self, model: Any):
        self.model, self.noise_dim, self.classes = model, model.config.z_dim, model.config.num_classes
        self.class_names = names_of("imagenet") if self.classes == 1000 else None

    def __call__(self, noise: Tensor, class_indices: Tensor) -> Tensor:
        one_hot = F.one_hot(class_indices, self.classes).to(noise)
        return self.model(noise, one_hot, 1.0)


def load_biggan(name: str, device: str | torch.device) -> BigGAN:
    """DeepMind's BigGAN-deep on ImageNet, by the extra ``clipgen[biggan]``.

    Args:
        name: ``biggan-deep-128``, ``-256`` or ``-512``, which the package downloads; or a folder with the same files,
            ``config.json`` and ``pytorch_model.bin``.

    Raises:
        ImportError: the package is not installed.
        ValueError: the weights cannot be loaded.
    """
    try:
        import pytorch_pretrained_biggan as package
    except ImportError as error:
        raise ImportError(f"BigGAN needs pip install 'clipgen[biggan]': {error}") from error
    logging.getLogger(package.__name__).setLevel(logging.CRITICAL)  # says what it then raises
    try:
        model = package.BigGAN.from_pretrained(name)
    except Exception as error:  # of the network, of files, of torch
        reason = one_line(error, 200)
        raise ValueError(
            f"the weights of BigGAN {name} cannot be loaded; with its config.json and pytorch_model.bin in a folder, "
            f"biggan:FOLDER needs no network ({reason})"
        ) from error
    return BigGAN(model.to(device).eval())


def load_torchscript(path: Path, device: str | torch.device) -> Any:
    """A TorchScript module, in evaluation mode."""
    if not path.is_file():
        raise FileNotFoundError(f"no TorchScript file {path}")
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = one_line(error, 200)
        raise ValueError(f"{path} is no TorchScript file, as torch.jit.save writes them: {reason}") from error


def load_function(module: str, name: str) -> Any:
    """``name`` of a module that can be imported, also from the current folder."""
    try:
        found = import_function(module, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"generator {module}:{name} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"generator {module}:{name} must be callable, got a {type(found).__name__}")
    return found


def names_of(source: str) -> list[str]:
    """Class names from a file, or ``"imagenet"``: the thousand of ILSVRC-2012, in CLIP's wording."""
    if source == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    return read_names(source)
