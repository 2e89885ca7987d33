"""Published GAN generators by file: ``biggan:FILE_OR_FOLDER`` and ``sagan:FILE``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipgen.baselines.biggan import BigGAN, BigGANDeep, load_biggan
from clipgen.baselines.gan_layers import truncated_normal
from clipgen.baselines.sagan import SAGAN, load_sagan
from clipgen.data.class_names import name_list

IMAGENET_CLASSES = 1000
DOWNLOADED_PREFIX = "biggan-deep-"  # names of the files that Hugging Face's package used to download


def is_gan_file(source: str) -> bool:
    """Return whether a generator is named as a file of BigGAN or SAGAN; the prefix decides before the file's ending."""
    return source.startswith(("biggan:", "sagan:", DOWNLOADED_PREFIX))


def load_gan(source: str) -> BigGAN | BigGANDeep | SAGAN:
    """Load the network of ``biggan:FILE_OR_FOLDER`` or ``sagan:FILE``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it contains something else, or not all of the network.
    """
    if source.startswith(DOWNLOADED_PREFIX):
        raise ValueError(
            f"{source} is not downloaded: name its file, biggan:FILE_OR_FOLDER, with pytorch_model.bin and config.json"
        )
    kind, _, path = source.partition(":")
    if not path:
        raise ValueError(f"generator must name a file, {kind}:FILE, got {source!r}")
    return load_biggan(path) if kind == "biggan" else load_sagan(path)


def load_gan_file(
    source: str,
    noise_dim: int | None = None,
    class_names: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    truncation: float | None = None,
) -> FileGenerator:
    """Load ``biggan:FILE_OR_FOLDER`` or ``sagan:FILE`` as a generator.

    Args:
        source: prefix and path.
        noise_dim: dimension of the noise that is expected; None accepts that of the file.
        class_names: names of the classes; None uses ImageNet's, if there are a thousand classes.
        device: device of the generator.
        truncation: see ``FileGenerator``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it cannot be loaded, or an argument does not fit it.
    """
    model = load_gan(source)
    if noise_dim is not None and noise_dim != model.noise_dim:
        raise ValueError(f"noise_dim must be {model.noise_dim} for {source}, got {noise_dim}")
    return FileGenerator(model.to(device), source, class_names, truncation)


def check_truncation(truncation: float) -> None:
    """Raise ValueError unless a truncation is in (0, 1]."""
    if not 0 < truncation <= 1:
        raise ValueError(f"truncation must be in (0, 1], got {truncation}")


class FileGenerator:
    """A GAN's network as a generator of ``search``.

    Args:
        model: the network.
        name: name of the generator in error messages.
        class_names: names of the classes; None uses ImageNet's, if there are a thousand classes, else none.
        truncation: in (0, 1]: noise is cut at two standard deviations and scaled by it, and BigGAN-deep uses its
            statistics of that truncation. None uses the noise as it is, and the statistics of truncation 1.
    """

    def __init__(
        self,
        model: BigGAN | BigGANDeep | SAGAN,
        name: str,
        class_names: Sequence[str] | None = None,
        truncation: float | None = None,
    ):
        if truncation is not None:
            check_truncation(truncation)
        if class_names and len(class_names) != model.num_classes:
            raise ValueError(f"class_names must name the {model.num_classes} classes of {name}, got {len(class_names)}")
        self.model = model
        self.name = name
        self.truncation = truncation
        self.noise_dim = model.noise_dim
        self.class_names = list(class_names or [])
        if not self.class_names and model.num_classes == IMAGENET_CLASSES:
            self.class_names = name_list("imagenet")

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return self.model.first.weight.device

    @torch.no_grad()
    def __call__(self, noise: Tensor, class_indices: Tensor) -> Tensor:
        """Generate images: (B, noise_dim) standard normal, (B,) int64 -> (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: noise or classes have another shape or range.
        """
        self.check_inputs(noise, class_indices)
        if self.truncation is None:
            return self.model(noise, class_indices)
        return self.model(truncated_normal(noise, self.truncation), class_indices, self.truncation)

    def check_inputs(self, noise: Tensor, class_indices: Tensor) -> None:
        """Raise ValueError unless noise and classes are of this generator."""
        if noise.ndim != 2 or noise.shape[1] != self.noise_dim:
            raise ValueError(f"noise must be (B, {self.noise_dim}) for {self.name}, got {tuple(noise.shape)}")
        if class_indices.shape != noise.shape[:1]:
            raise ValueError(f"class_indices must be ({len(noise)},), got {tuple(class_indices.shape)}")
        classes = self.model.num_classes
        if len(noise) and not 0 <= int(class_indices.min()) <= int(class_indices.max()) < classes:
            raise ValueError(f"class_indices must be in [0, {classes}), got {class_indices.tolist()[:20]}")
