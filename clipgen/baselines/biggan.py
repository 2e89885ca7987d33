"""BigGAN and BigGAN-deep (Brock et al. 2018, arXiv:1809.11096) from their published state dicts.

Two layouts are read, and recognized by their keys: BigGAN-deep of Hugging Face's pytorch-pretrained-biggan, and BigGAN
of ajbrock's BigGAN-PyTorch. Sizes are read from the state dict. The epsilons, and which blocks of BigGAN-deep double
the resolution, are taken from ``config.json`` next to the file. Without that file they are those of the published
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.baselines.gan_layers import FixedBatchNorm, ResidualBlock, SelfAttention, affine, upsample
from clipgen.baselines.gan_weights import (
    fold_power_iteration,
    fold_spectral_norms,
    load_completely,
    number_blocks,
    read_generator_state,
    rename,
    squeeze_gamma,
)
from clipgen.checkpoint.safe_load import State
from clipgen.storage.files import read_json

DEEP_EPS = 1e-4
NORM_EPS = 1e-5  # ajbrock's value for batch norms
SPECTRAL_EPS = 1e-6
CONVERTED_EPS = 1e-4  # both, in the files converted from TF Hub, which have no sv0
GENERATOR_FILES = ("pytorch_model.bin", "G_ema.pth")
DEEP_NAMES = (
    (r"^embeddings\.", "classes."),
    (r"^generator\.gen_z\.", "first."),
    (r"^generator\.bn\.", "norm."),
    (r"^generator\.conv_to_rgb\.", "to_rgb."),
    (r"^generator\.layers\.", "layers."),
    (r"\.bn_(\d)\.", r".norms.\1."),
    (r"\.conv_(\d)\.", r".convs.\1."),
    (r"\.scale\.", ".gain."),
    (r"\.offset\.", ".bias."),
    (r"\.running_", "."),
    (r"\.snconv1x1_o_conv\.", ".o."),
    (r"\.snconv1x1_", "."),
)
AJBROCK_NAMES = (
    (r"^shared\.", "classes."),
    (r"^linear\.", "first."),
    (r"^blocks\.(\d+)\.0\.", r"blocks.\1."),
    (r"^blocks\.(\d+)\.1\.", r"attention.\1."),
    (r"\.bn(\d)\.", r".norm\1."),
    (r"\.conv_sc\.", ".shortcut."),
    (r"\.stored_", "."),
    (r"^output_layer\.0\.gain$", "norm.weight"),
    (r"^output_layer\.0\.", "norm."),
    (r"^output_layer\.2\.", "to_rgb."),
)


# --------------------------------------------------------------------------------------------------------- BigGAN-deep


class StatisticsTable(nn.Module):
    """Mean and variance of a batch norm, measured at truncations 0 to 1.

    Args:
        rows: number of truncations, evenly spaced.
        channels: channels of the input.
    """

    means: Tensor
    vars: Tensor

    def __init__(self, rows: int, channels: int):
        super().__init__()
        self.register_buffer("means", torch.zeros(rows, channels))
        self.register_buffer("vars", torch.ones(rows, channels))

    def normalize(self, x: Tensor, truncation: float, eps: float) -> Tensor:
        """Normalize x (B, C, H, W) with the statistics of a truncation."""
        return F.batch_norm(
            x, interpolate_rows(self.means, truncation), interpolate_rows(self.vars, truncation), eps=eps
        )


def interpolate_rows(table: Tensor, truncation: float) -> Tensor:
    """Return the row of a truncation, interpolated linearly between its neighbors: (N, C) -> (C,).

    The published code swaps the two weights, and misses rows by floating-point rounding.
    """
    position = truncation * (len(table) - 1)
    if abs(position - round(position)) < 1e-6:
        return table[round(position)]
    row = int(position)
    return torch.lerp(table[row], table[row + 1], position - row)


class DeepConditionalNorm(StatisticsTable):
    """Conditional batch norm of BigGAN-deep.

    Args:
        rows: number of truncations.
        channels: channels of the input.
        condition_dim: width of the condition.
        eps: added to the variance.
    """

    def __init__(self, rows: int, channels: int, condition_dim: int, eps: float):
        super().__init__(rows, channels)
        self.gain = nn.Linear(condition_dim, channels, bias=False)
        self.bias = nn.Linear(condition_dim, channels, bias=False)
        self.eps = eps

    def forward(self, x: Tensor, condition: Tensor, truncation: float) -> Tensor:
        """Normalize, then scale and shift by the condition: (B, C, H, W), (B, D) -> (B, C, H, W)."""
        x = self.normalize(x, truncation, self.eps)
        return affine(x, 1 + self.gain(condition), self.bias(condition))


class DeepFixedNorm(StatisticsTable):
    """Last batch norm of BigGAN-deep, without a condition.

    Args:
        rows: number of truncations.
        channels: channels of the input.
        eps: added to the variance.
    """

    def __init__(self, rows: int, channels: int, eps: float):
        super().__init__(rows, channels)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor, truncation: float) -> Tensor:
        """Normalize, scale and shift: (B, C, H, W) -> (B, C, H, W)."""
        return affine(self.normalize(x, truncation, self.eps), self.weight[None], self.bias[None])


class DeepBlock(nn.Module):
    """Bottleneck block of BigGAN-deep (arXiv:1809.11096, Fig. 16b); its shortcut has no weights.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output; not more than those of the input.
        condition_dim: width of the condition.
        rows: number of truncations of the statistics.
        doubles: double the resolution.
        eps: epsilon of the norms.
    """

    def __init__(self, channels_in: int, channels_out: int, condition_dim: int, rows: int, doubles: bool, eps: float):
        super().__init__()
        width = channels_in // 4
        inputs = (channels_in, width, width, width)
        outputs = (width, width, width, channels_out)
        self.norms = nn.ModuleList(DeepConditionalNorm(rows, channels, condition_dim, eps) for channels in inputs)
        self.convs = nn.ModuleList()
        for a, b, kernel in zip(inputs, outputs, (1, 3, 3, 1)):
            self.convs.append(nn.Conv2d(a, b, kernel, padding=kernel // 2))
        self.channels_out = channels_out
        self.doubles = doubles

    def forward(self, x: Tensor, condition: Tensor, truncation: float) -> Tensor:
        """Apply the block: (B, C, H, W), (B, D) -> (B, C', H, W), or (B, C', 2H, 2W) if it doubles."""
        hidden = x
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs)):
            hidden = norm(hidden, condition, truncation).relu()
            if i == 1 and self.doubles:
                hidden = upsample(hidden)
            hidden = conv(hidden)
        shortcut = x[:, : self.channels_out]
        return hidden + (upsample(shortcut) if self.doubles else shortcut)


class BigGANDeep(nn.Module):
    """BigGAN-deep.

    Args:
        noise_dim: width of the noise and of the class embedding.
        num_classes: classes.
        channels: channels of the first map and after each block.
        doubles: for each block, whether it doubles the resolution.
        attention_before: blocks that self-attention precedes, counted from 0.
        rgb_channels: output channels of the last convolution, of which three are used.
        rows: number of truncations of the statistics.
        eps: epsilon of the norms.
    """

    def __init__(
        self,
        noise_dim: int,
        num_classes: int,
        channels: Sequence[int],
        doubles: Sequence[bool],
        attention_before: Sequence[int],
        rgb_channels: int,
        rows: int,
        eps: float = DEEP_EPS,
    ):
        super().__init__()
        self.noise_dim = noise_dim
        self.num_classes = num_classes
        self.num_layers = len(doubles) + 1
        self.layer_noise_dim = noise_dim
        self.classes = nn.Linear(num_classes, noise_dim, bias=False)
        self.first = nn.Linear(2 * noise_dim, 16 * channels[0])
        self.blocks = nn.ModuleList()
        for channels_in, channels_out, twice in zip(channels, channels[1:], doubles):
            self.blocks.append(DeepBlock(channels_in, channels_out, 2 * noise_dim, rows, twice, eps))
        self.attention = nn.ModuleDict({str(i): SelfAttention(channels[i]) for i in attention_before})
        self.norm = DeepFixedNorm(rows, channels[-1], eps)
        self.to_rgb = nn.Conv2d(channels[-1], rgb_channels, 3, padding=1)

    def forward(self, noise: Tensor, class_indices: Tensor, truncation: float = 1.0) -> Tensor:
        """Generate images: (B, noise_dim), (B,) -> (B, 3, H, W) in [-1, 1].

        Args:
            truncation: truncation whose statistics the norms use, in (0, 1]; the noise is used as it is.
        """
        one_hot = F.one_hot(class_indices.long(), self.num_classes).to(noise)
        layers = (len(noise), self.num_layers, -1)
        return self.generate(noise[:, None].expand(layers), one_hot[:, None].expand(layers), truncation)

    def generate(self, noise: Tensor, class_weights: Tensor, truncation: float = 1.0) -> Tensor:
        """Generate images from one condition per layer: the first map, then each block.

        Args:
            noise: (B, num_layers, noise_dim).
            class_weights: (B, num_layers, num_classes).
            truncation: truncation whose statistics the norms use, in (0, 1].

        Returns:
            (B, 3, H, W) in [-1, 1].
        """
        conditions = torch.cat([noise, self.classes(class_weights)], dim=-1)  # (B, num_layers, 2 * noise_dim)
        x = self.first(conditions[:, 0])
        x = x.view(len(x), 4, 4, -1).permute(0, 3, 1, 2)  # channels are last in the file
        for i, block in enumerate(self.blocks):
            if str(i) in self.attention:
                x = self.attention[str(i)](x)
            x = block(x, conditions[:, i + 1], truncation)
        return self.to_rgb(self.norm(x, truncation).relu())[:, :3].tanh()


# -------------------------------------------------------------------------------------------------------------- BigGAN


class BigGAN(nn.Module):
    """BigGAN with one piece of the noise per block.

    Args:
        noise_dim: width of the noise.
        num_classes: classes.
        class_dim: width of the class embedding, which all blocks share.
        channels: channels of the first map and after each block, which doubles the resolution.
        attention_after: blocks that self-attention follows, counted from 0.
        eps: epsilon of the norms.
    """

    def __init__(
        self,
        noise_dim: int,
        num_classes: int,
        class_dim: int,
        channels: Sequence[int],
        attention_after: Sequence[int],
        eps: float = NORM_EPS,
    ):
        super().__init__()
        self.noise_dim = noise_dim
        self.num_classes = num_classes
        self.num_layers = len(channels)
        self.layer_noise_dim = noise_dim // len(channels)
        self.classes = nn.Embedding(num_classes, class_dim)
        self.first = nn.Linear(self.layer_noise_dim, 16 * channels[0])
        self.blocks = nn.ModuleList()
        for channels_in, channels_out in pairwise(channels):
            self.blocks.append(ResidualBlock(channels_in, channels_out, class_dim + self.layer_noise_dim, eps))
        self.attention = nn.ModuleDict({str(i): SelfAttention(channels[i + 1]) for i in attention_after})
        self.norm = FixedBatchNorm(channels[-1], eps)
        self.to_rgb = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, noise: Tensor, class_indices: Tensor, truncation: float = 1.0) -> Tensor:
        """Generate images: (B, noise_dim), (B,) -> (B, 3, H, W) in [-1, 1]; ``truncation`` has no effect here."""
        pieces = noise.unflatten(1, (self.num_layers, -1))
        return self.render(pieces, self.classes(class_indices)[:, None].expand(-1, self.num_layers, -1))

    def generate(self, noise: Tensor, class_weights: Tensor, truncation: float = 1.0) -> Tensor:
        """Generate images from one condition per layer: the first map, which depends on no class, then each block.

        Args:
            noise: (B, num_layers, layer_noise_dim).
            class_weights: (B, num_layers, num_classes).
            truncation: has no effect here.

        Returns:
            (B, 3, H, W) in [-1, 1].
        """
        return self.render(noise, class_weights @ self.classes.weight)

    def render(self, noise: Tensor, class_embeddings: Tensor) -> Tensor:
        """Generate images from noise and class embedding per layer: (B, R, piece), (B, R, D) -> (B, 3, H, W)."""
        conditions = torch.cat([class_embeddings, noise], dim=2)
        x = self.first(noise[:, 0]).view(len(noise), -1, 4, 4)
        for i, block in enumerate(self.blocks):
            x = block(x, conditions[:, i + 1])
            if str(i) in self.attention:
                x = self.attention[str(i)](x)
        return self.to_rgb(self.norm(x).relu()).tanh()


# ------------------------------------------------------------------------------------------------------------- loading


def load_biggan(path: str | Path) -> BigGAN | BigGANDeep:
    """Load a BigGAN from its file, or from the folder that contains it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it contains something else, or not all of the network.
    """
    file = find_file(Path(path).expanduser())
    state = read_generator_state(file)
    config = read_config(file)
    if {"embeddings.weight", "generator.gen_z.bias"} <= state.keys():
        return load_deep(state, config, file)
    if {"shared.weight", "linear.bias"} <= state.keys():
        return load_ajbrock(state, config, file)
    raise ValueError(f"{file} must be a BigGAN, got {describe_other_model(state, file)}")


def find_file(path: Path) -> Path:
    """Return the generator's file of a folder: a published name, or the only one that contains weights."""
    if not path.is_dir():
        return path
    for name in GENERATOR_FILES:
        if (path / name).is_file():
            return path / name
    files = sorted(file for file in path.iterdir() if file.suffix in (".bin", ".pth", ".pt"))
    if len(files) == 1:
        return files[0]
    raise FileNotFoundError(
        f"{path} must contain {' or '.join(GENERATOR_FILES)}, got {len(files)} other files of weights: name one"
    )


def read_config(file: Path) -> dict[str, Any]:
    """Return ``config.json`` next to a file; empty if there is none."""
    config = file.with_name("config.json")
    return read_json(config) if config.is_file() else {}


def describe_other_model(state: State, file: Path) -> str:
    """Describe a state dict that is not of a BigGAN."""
    if "linear0.bias" not in state:
        return "another network: there are neither generator.gen_z nor shared and linear weights in it"
    if any(name.startswith("shared.") for name in state):
        return "StudioGAN's BigGAN, which is not supported: use ajbrock's or Hugging Face's"
    return f"StudioGAN's SAGAN: name it sagan:{file}"


def load_deep(state: State, config: dict[str, Any], file: Path) -> BigGANDeep:
    """Build BigGAN-deep from Hugging Face's layout."""
    folded = number_blocks(rename(fold_spectral_norms(state, file), DEEP_NAMES, file), r"layers\.(NUMBER)\.(.+)", 0)
    try:
        noise_dim, num_classes = folded["classes.weight"].shape
        rows = len(folded["norm.means"])
        channels = [len(folded["first.bias"]) // 16]
        while f"blocks.{len(channels) - 1}.convs.3.bias" in folded:
            channels.append(len(folded[f"blocks.{len(channels) - 1}.convs.3.bias"]))
        rgb_channels = len(folded["to_rgb.bias"])
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{file} is incomplete: the sizes of its BigGAN-deep cannot be read ({error})") from error
    doubles = doubling_blocks(config, channels, file)
    eps = read_fraction(config, "eps", DEEP_EPS, file)
    attention = attention_of(folded, len(doubles), file)
    with torch.device("meta"):
        model = BigGANDeep(noise_dim, num_classes, channels, doubles, attention, rgb_channels, rows, eps)
    load_completely(model, folded, file)
    return model


def attention_of(state: State, blocks: int, file: Path) -> list[int]:
    """Return the block numbers of the attention layers of a renamed state dict."""
    places = {name.split(".")[1] for name in state if name.startswith("attention.")}
    if not all(place.isdigit() and int(place) < blocks for place in places):
        raise ValueError(f"{file} is incomplete: its attention must belong to one of its {blocks} blocks")
    return sorted(int(place) for place in places)


def doubling_blocks(config: dict[str, Any], channels: list[int], file: Path) -> list[bool]:
    """Return, for each block, True if it doubles the resolution: as in config.json, else every second block."""
    blocks = len(channels) - 1
    layers = config.get("layers")
    if layers is None:
        return [i % 2 == 1 for i in range(blocks)]
    width = config.get("channel_width")
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"{file.with_name('config.json')}: channel_width must be at least 1, got {width!r:.100}")
    sizes: list[list[int]] = []
    doubles: list[bool] = []
    expected = [[channels[i] / width, channels[i + 1] / width] for i in range(blocks)]
    try:
        for flag, channels_in, channels_out in layers:
            sizes.append([channels_in, channels_out])
            doubles.append(bool(flag))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file.with_name('config.json')}: layers must be [doubles, in, out] each ({error})"
        ) from error
    if sizes != expected:
        raise ValueError(f"{file.with_name('config.json')} must describe {file.name}, got layers of other sizes")
    return doubles


def read_fraction(config: dict[str, Any], key: str, default: float, file: Path) -> float:
    """Return a number in (0, 1) from the configuration."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{file.with_name('config.json')}: {key} must be in (0, 1), got {value!r:.100}")
    return float(value)


def load_ajbrock(state: State, config: dict[str, Any], file: Path) -> BigGAN:
    """Build BigGAN from ajbrock's layout, also as converted from TF Hub, which has no ``sv0``."""
    refuse_variants(state, file)
    converted = not any(name.endswith(".sv0") for name in state)
    spectral_eps = read_fraction(config, "SN_eps", CONVERTED_EPS if converted else SPECTRAL_EPS, file)
    eps = read_fraction(config, "BN_eps", CONVERTED_EPS if converted else NORM_EPS, file)
    folded = rename(fold_power_iteration(state, ["shared.weight"], spectral_eps, file), AJBROCK_NAMES, file)
    folded = {name: squeeze_gamma(name, tensor) for name, tensor in folded.items()}
    try:
        num_classes, class_dim = folded["classes.weight"].shape
        channels = [len(folded["first.bias"]) // 16]
        while f"blocks.{len(channels) - 1}.conv1.bias" in folded:
            channels.append(len(folded[f"blocks.{len(channels) - 1}.conv1.bias"]))
        noise_dim = folded["first.weight"].shape[1] * len(channels)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ValueError(f"{file} is incomplete: the sizes of its BigGAN cannot be read ({error})") from error
    attention = attention_of(folded, len(channels) - 1, file)
    with torch.device("meta"):
        model = BigGAN(noise_dim, num_classes, class_dim, channels, attention, eps)
    load_completely(model, folded, file)
    return model


def refuse_variants(state: State, file: Path) -> None:
    """Raise ValueError for options of ajbrock's training that change the network."""
    if any(".bn1.bn." in name for name in state):
        raise ValueError(f"{file} was trained with --cross_replica or --mybn, which is not supported")
    gain = state.get("blocks.0.0.bn1.gain.weight")
    shared = state["shared.weight"]
    if gain is not None and gain.shape[-1:] == shared.shape[-1:]:
        raise ValueError(f"{file} was trained without --hier, which is not supported: its blocks get no noise")
