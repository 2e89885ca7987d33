"""Random state dicts of the four published layouts of GAN generators, as small as they come, written key by key."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

State = dict[str, Tensor]
CHANNELS = (16, 8, 8)  # of the first map and after each block


def hook_norm(state: State, name: str, *shape: int, bias: bool = False) -> None:
    """Add a weight under torch's spectral norm: ``weight_orig``, ``weight_u``, ``weight_v``."""
    weight = torch.randn(shape)
    if bias:
        state[f"{name}.bias"] = torch.randn(shape[0])
    state[f"{name}.weight_orig"] = weight
    state[f"{name}.weight_u"] = torch.nn.functional.normalize(torch.randn(shape[0]), dim=0)
    v = state[f"{name}.weight_u"] @ weight.flatten(1)
    state[f"{name}.weight_v"] = torch.nn.functional.normalize(v, dim=0)


def power_norm(state: State, name: str, *shape: int, bias: bool = False) -> None:
    """Add a weight under ajbrock's spectral norm: ``weight``, ``u0``, ``sv0``."""
    state[f"{name}.weight"] = torch.randn(shape)
    if bias:
        state[f"{name}.bias"] = torch.randn(shape[0])
    state[f"{name}.u0"] = torch.randn(1, shape[0])
    state[f"{name}.sv0"] = torch.rand(1)


def deep_state(noise_dim: int = 4, classes: int = 5, rows: int = 51) -> State:
    """Return BigGAN-deep of Hugging Face: attention at index 1 of three layers, 8 x 8 pixels."""
    state: State = {"embeddings.weight": torch.randn(noise_dim, classes)}
    hook_norm(state, "generator.gen_z", 16 * CHANNELS[0], 2 * noise_dim, bias=True)
    for layer, c_in, c_out in ((0, CHANNELS[0], CHANNELS[1]), (2, CHANNELS[1], CHANNELS[2])):
        place, mid = f"generator.layers.{layer}", c_in // 4
        shapes = ((c_in, mid, 1), (mid, mid, 3), (mid, mid, 3), (mid, c_out, 1))
        for j, (a, b, kernel) in enumerate(shapes):
            state[f"{place}.bn_{j}.running_means"] = torch.randn(rows, a)
            state[f"{place}.bn_{j}.running_vars"] = torch.rand(rows, a) + 0.5
            hook_norm(state, f"{place}.bn_{j}.scale", a, 2 * noise_dim)
            hook_norm(state, f"{place}.bn_{j}.offset", a, 2 * noise_dim)
            hook_norm(state, f"{place}.conv_{j}", b, a, kernel, kernel, bias=True)
    c = CHANNELS[1]
    state["generator.layers.1.gamma"] = torch.ones(1)
    for name, a, b in (("theta", c // 8, c), ("phi", c // 8, c), ("g", c // 2, c), ("o_conv", c, c // 2)):
        hook_norm(state, f"generator.layers.1.snconv1x1_{name}", a, b, 1, 1)
    c = CHANNELS[-1]
    state["generator.bn.weight"], state["generator.bn.bias"] = torch.randn(c), torch.randn(c)
    state["generator.bn.running_means"] = torch.randn(rows, c)
    state["generator.bn.running_vars"] = torch.rand(rows, c) + 0.5
    hook_norm(state, "generator.conv_to_rgb", c, c, 3, 3, bias=True)
    return state


def biggan_state(piece: int = 2, shared: int = 3, classes: int = 5) -> State:
    """Return BigGAN of ajbrock: two blocks, attention after the first, 16 x 16 pixels."""
    state: State = {"shared.weight": torch.randn(classes, shared)}
    power_norm(state, "linear", 16 * CHANNELS[0], piece, bias=True)
    for i, (c_in, c_out) in enumerate(pairwise(CHANNELS)):
        power_norm(state, f"blocks.{i}.0.conv1", c_out, c_in, 3, 3, bias=True)
        power_norm(state, f"blocks.{i}.0.conv2", c_out, c_out, 3, 3, bias=True)
        power_norm(state, f"blocks.{i}.0.conv_sc", c_out, c_in, 1, 1, bias=True)
        for norm, c in (("bn1", c_in), ("bn2", c_out)):
            state[f"blocks.{i}.0.{norm}.stored_mean"] = torch.randn(c)
            state[f"blocks.{i}.0.{norm}.stored_var"] = torch.rand(c) + 0.5
            power_norm(state, f"blocks.{i}.0.{norm}.gain", c, shared + piece)
            power_norm(state, f"blocks.{i}.0.{norm}.bias", c, shared + piece)
    c = CHANNELS[1]
    state["blocks.0.1.gamma"] = torch.ones(())
    for name, a, b in (("theta", c // 8, c), ("phi", c // 8, c), ("g", c // 2, c), ("o", c, c // 2)):
        power_norm(state, f"blocks.0.1.{name}", a, b, 1, 1)
    c = CHANNELS[-1]
    for name in ("gain", "bias", "stored_mean"):
        state[f"output_layer.0.{name}"] = torch.randn(c)
    state["output_layer.0.stored_var"] = torch.rand(c) + 0.5
    power_norm(state, "output_layer.2", 3, c, 3, 3, bias=True)
    return state


def sagan_state(year: int = 2021, noise_dim: int = 4, classes: int = 5) -> State:
    """Return StudioGAN's SAGAN of 2021 or 2022: two blocks, attention between them, 16 x 16 pixels."""
    state: State = {}
    hook_norm(state, "linear0", 16 * CHANNELS[0], noise_dim, bias=True)
    for place, c_in, c_out in (("blocks.0.0", CHANNELS[0], CHANNELS[1]), ("blocks.2.0", CHANNELS[1], CHANNELS[2])):
        for norm, c in (("bn1", c_in), ("bn2", c_out)):
            batch_norm(state, f"{place}.{norm}.bn", c)
            for name in ("embed0", "embed1") if year == 2021 else ("gain", "bias"):
                hook_norm(state, f"{place}.{norm}.{name}", *((classes, c) if year == 2021 else (c, classes)))
        hook_norm(state, f"{place}.conv2d0", c_out, c_in, 1, 1, bias=True)
        hook_norm(state, f"{place}.conv2d1", c_out, c_in, 3, 3, bias=True)
        hook_norm(state, f"{place}.conv2d2", c_out, c_out, 3, 3, bias=True)
    c = CHANNELS[1]
    state["blocks.1.0.sigma"] = torch.ones(1)
    for name, a, b in (("theta", c // 8, c), ("phi", c // 8, c), ("g", c // 2, c), ("attn", c, c // 2)):
        hook_norm(state, f"blocks.1.0.conv1x1_{name}", a, b, 1, 1)
    c = CHANNELS[-1]
    state["bn4.weight"], state["bn4.bias"] = torch.randn(c), torch.randn(c)
    batch_norm(state, "bn4", c)
    hook_norm(state, "conv2d5", 3, c, 3, 3, bias=True)
    return state


def batch_norm(state: State, name: str, channels: int) -> None:
    """Add the running statistics of torch's batch norm."""
    state[f"{name}.running_mean"] = torch.randn(channels)
    state[f"{name}.running_var"] = torch.rand(channels) + 0.5
    state[f"{name}.num_batches_tracked"] = torch.tensor(7)
