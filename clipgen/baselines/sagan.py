"""SAGAN (Zhang et al. 2018, arXiv:1805.08318) as StudioGAN trained it on ImageNet, from its state dict.

Two layouts are read: that of 2021, whose norms contain one embedding per class, and that of 2022, whose norms are
linear in the one-hot class. Every size is read from the state dict, so no configuration file is needed.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.baselines.gan_layers import FixedBatchNorm, ResidualBlock, SelfAttention
from clipgen.baselines.gan_weights import (
    fold_spectral_norms,
    load_completely,
    number_blocks,
    read_generator_state,
    rename,
)
from clipgen.checkpoint.safe_load import State

NORM_EPS = 1e-4  # StudioGAN's value for batch norms, which it does not store
SAGAN_NAMES = (
    (r"\.bn\.running_", "."),
    (r"\.running_", "."),
    (r"\.embed0\.", ".gain."),
    (r"\.embed1\.", ".bias."),
    (r"\.bn(\d)\.", r".norm\1."),
    (r"\.conv2d0\.", ".shortcut."),
    (r"\.conv2d([12])\.", r".conv\1."),
    (r"conv1x1_attn\.", "o."),
    (r"conv1x1_", ""),
    (r"\.sigma$", ".gamma"),
    (r"^linear0\.", "first."),
    (r"^bn\d+\.", "norm."),
    (r"^conv2d\d+\.", "to_rgb."),
)


class SAGAN(nn.Module):
    """StudioGAN's residual generator with self-attention.

    Args:
        noise_dim: width of the noise.
        num_classes: classes.
        channels: channels of the first map and after each block, which doubles the resolution.
        attention_after: blocks that self-attention follows, counted from 0.
    """

    def __init__(self, noise_dim: int, num_classes: int, channels: list[int], attention_after: list[int]):
        super().__init__()
        self.noise_dim = noise_dim
        self.num_classes = num_classes
        self.first = nn.Linear(noise_dim, 16 * channels[0])
        self.blocks = nn.ModuleList()
        for channels_in, channels_out in pairwise(channels):
            self.blocks.append(ResidualBlock(channels_in, channels_out, num_classes, NORM_EPS))
        self.attention = nn.ModuleDict({str(i): SelfAttention(channels[i + 1]) for i in attention_after})
        self.norm = FixedBatchNorm(channels[-1], NORM_EPS)
        self.to_rgb = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, noise: Tensor, class_indices: Tensor, truncation: float = 1.0) -> Tensor:
        """Generate images: (B, noise_dim), (B,) -> (B, 3, H, W) in [-1, 1]; ``truncation`` has no effect here."""
        one_hot = F.one_hot(class_indices.long(), self.num_classes).to(noise)
        x = self.first(noise).view(len(noise), -1, 4, 4)
        for i, block in enumerate(self.blocks):
            x = block(x, one_hot)
            if str(i) in self.attention:
                x = self.attention[str(i)](x)
        return self.to_rgb(self.norm(x).relu()).tanh()


def load_sagan(path: str | Path) -> SAGAN:
    """Load StudioGAN's SAGAN, in the layout of 2021 or of 2022.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it contains something else, or not all of the network.
    """
    state = read_generator_state(path)
    check_layout(state, path)
    folded = rename(fold_spectral_norms(without_counters(state), path), SAGAN_NAMES, path)
    if any(".embed0." in name for name in state):
        folded = transpose_embeddings(folded)
    return build_sagan(number_blocks(folded, r"blocks\.(NUMBER)\.0\.(.+)", -1), path)


def check_layout(state: State, path: str | Path) -> None:
    """Raise ValueError unless the names are those of StudioGAN's SAGAN."""
    if "embeddings.weight" in state or {"shared.weight", "linear.weight"} <= state.keys():
        raise ValueError(f"{path} must be a SAGAN, got a BigGAN: name it biggan:{path}")
    studiogan = "linear0.bias" in state
    if studiogan and any(name.startswith("shared.") for name in state):
        raise ValueError(f"{path} must be StudioGAN's SAGAN, got its BigGAN, which is not supported")
    conditional = any(".bn1.embed0." in name or ".bn1.gain." in name for name in state)
    if not studiogan or not conditional:
        raise ValueError(
            f"{path} must be StudioGAN's SAGAN, got another model: "
            "there is no linear0 with class-conditional norms in it"
        )


def without_counters(state: State) -> State:
    """Return the state dict without the step counters of batch norms."""
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def transpose_embeddings(state: State) -> State:
    """Turn tables (classes, C) of the layout of 2021 into linear maps of the one-hot class, (C, classes)."""
    tables = (".gain.weight", ".bias.weight")
    transposed = {}
    for name, tensor in state.items():
        is_table = name.endswith(tables) and tensor.ndim == 2
        transposed[name] = tensor.T if is_table else tensor
    return transposed


def build_sagan(state: State, path: str | Path) -> SAGAN:
    """Return the network whose sizes are those of the (renamed) state dict."""
    try:
        noise_dim = state["first.weight"].shape[1]
        num_classes = state["blocks.0.norm1.gain.weight"].shape[1]
        channels = [len(state["first.bias"]) // 16]
        while f"blocks.{len(channels) - 1}.conv1.weight" in state:
            channels.append(len(state[f"blocks.{len(channels) - 1}.conv1.weight"]))
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is incomplete: the sizes of its SAGAN cannot be read ({error})") from error
    places = [re.match(r"attention\.(-?\d+)\.", name) for name in state]
    attention_after = sorted({int(place[1]) for place in places if place})
    if attention_after and not 0 <= attention_after[0] <= attention_after[-1] < len(channels) - 1:
        raise ValueError(f"{path} is incomplete: its attention must follow a block, got none before it")
    with torch.device("meta"):
        model = SAGAN(noise_dim, num_classes, channels, attention_after)
    load_completely(model, state, path)
    return model
