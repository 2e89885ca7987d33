"""Class-conditional generators under one interface: ``images = generator(noise, class_indices)``.

    noise          (B, noise_dim), standard normal
    class_indices  (B,) int64
    images         (B, 3, H, W) in [-1, 1]

A generator also has ``noise_dim``, ``class_names``, and ``device``, the device of its inputs.
``ClassConditionalGenerator`` is the project's own; ``load_generator`` loads others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from clipgen.baselines import GENERATOR_FORMS
from clipgen.baselines.class_conditional import ClassConditionalGenerator
from clipgen.baselines.gan_files import is_gan_file, load_gan_file
from clipgen.data.class_names import NAME_LISTS, name_list, read_names
from clipgen.evaluation.features import import_function
from clipgen.storage.files import one_line

TOLERANCE = 0.05  # distance from [-1, 1] that is accepted as rounding


class Generator(Protocol):
    """A generator that ``search`` can search."""

    noise_dim: int
    class_names: list[str]

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        ...

    def __call__(self, noise: Tensor, class_indices: Tensor) -> Tensor:
        """Generate images: (B, noise_dim) standard normal, (B,) int64 -> (B, 3, H, W) in [-1, 1]."""
        ...


class ExternalGenerator:
    """A generator that calls a user's function, whose output is checked and clamped to [-1, 1].

    Args:
        function: function from (noise, class_indices) to images.
        name: name of the function in errors.
        noise_dim: dimension of the noise.
        class_names: names of the classes, in order.
        device: device of the function's inputs.
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
        self.function = function
        self.name = name
        self.noise_dim = noise_dim
        self.class_names = list(class_names)
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, noise: Tensor, class_indices: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: the function failed, or returned something else.
        """
        try:
            images = self.function(noise, class_indices)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-300:]
            shapes = f"noise {tuple(noise.shape)} and class_indices {tuple(class_indices.shape)}"
            raise ValueError(f"{self.name} failed on {shapes}: {reason}") from error
        check_output(images, len(noise), self.name)
        return images.float().clamp(-1, 1)


def check_output(images: Any, batch_size: int, name: str) -> None:
    """Raise ValueError unless a generator returned images (batch_size, 3, H, W) in [-1, 1]."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[:2] != (batch_size, 3):
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{name} must return images ({batch_size}, 3, H, W), got {got}")
    if not images.isfinite().all():
        raise ValueError(f"{name} must return images in [-1, 1], got NaN or infinite pixels")
    low = images.min().item()
    high = images.max().item()
    if low < -1 - TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(f"{name} must return images in [-1, 1], got pixels from {low:.3g} to {high:.3g}")


def load_generator(
    source: str,
    noise_dim: int | None = None,
    class_names: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    sampling: Mapping[str, Any] | None = None,
    truncation: float | None = None,
) -> Generator:
    """Load a generator by name.

    Args:
        source: one of

            - a run folder of the class-conditional transformer,
            - ``biggan:FILE_OR_FOLDER`` or ``sagan:FILE``, published weights, see ``load_gan_file``,
            - a TorchScript file (``.pt``, ``.pth``, ``.ts``) whose forward takes (noise, class_indices),
            - ``module:function``, an importable function or object; the current folder is also searched.
        noise_dim: dimension of the noise; None uses the attribute of this name of the function or module.
        class_names: names of the classes; None uses the attribute of this name.
        device: device of the generator.
        sampling: sampling parameters that replace those of a run folder, by name.
        truncation: truncation of a BigGAN or SAGAN, in (0, 1]; None uses the noise as it is.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: it cannot be loaded, or something is missing.
    """
    path = Path(source).expanduser()
    if is_gan_file(source) and not sampling:
        return load_gan_file(source, noise_dim, class_names, device, truncation)
    if truncation is not None:
        raise ValueError(f"truncation applies to biggan: and sagan: only, got {truncation} for {source}")
    if is_run(source):
        return ClassConditionalGenerator.load(path, **(sampling or {})).to(device)
    if sampling:
        raise ValueError(f"sampling parameters apply to a run folder only, got {dict(sampling)} for {source}")
    return wrap_function(load_external(source, path, device), source, noise_dim, class_names, device)


def is_run(source: str) -> bool:
    """Return whether a generator is a run of the class-conditional transformer."""
    path = Path(source).expanduser()
    return not is_gan_file(source) and (path.is_dir() or path.suffix == ".ckpt")


def load_external(source: str, path: Path, device: str | torch.device) -> Any:
    """Load a user's generator, as a function of (noise, class_indices)."""
    if path.suffix in (".pt", ".pth", ".ts"):
        return load_torchscript(path, device)
    module, colon, name = source.partition(":")
    if colon:
        return load_function(module, name)
    raise FileNotFoundError(f"generator must be {GENERATOR_FORMS}, got {source}, which does not exist")


def wrap_function(
    function: Any,
    name: str,
    noise_dim: int | None,
    class_names: Sequence[str] | None,
    device: str | torch.device,
) -> ExternalGenerator:
    """Wrap a function as a generator; arguments that are None are taken from the function's attributes."""
    noise_dim = noise_dim or getattr(function, "noise_dim", None)
    class_names = class_names or getattr(function, "class_names", None)
    if not noise_dim:
        raise ValueError(f"noise_dim must be given for {name}, which has no such attribute")
    if not class_names:
        raise ValueError(f"class_names must be given for {name}, which has no such attribute")
    return ExternalGenerator(function, name, int(noise_dim), class_names, device)


def load_torchscript(path: Path, device: str | torch.device) -> Any:
    """Load a TorchScript module in evaluation mode."""
    if not path.is_file():
        raise FileNotFoundError(f"no TorchScript file {path}")
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = one_line(error, 200)
        raise ValueError(
            f"{path} is not a TorchScript file; name a state dict biggan:FILE or sagan:FILE ({reason})"
        ) from error


def load_function(module: str, name: str) -> Any:
    """Import a callable from a module; the current folder is also searched."""
    try:
        function = import_function(module, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"generator {module}:{name} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"generator {module}:{name} must be callable, got a {type(function).__name__}")
    return function


def read_class_names(source: str) -> list[str]:
    """Read class names from a file, or return a list by its name, such as ``"imagenet"``."""
    return name_list(source) if source in NAME_LISTS else read_names(source)
