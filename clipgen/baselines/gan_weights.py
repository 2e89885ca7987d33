"""State dicts of published GANs: read without executing anything, spectral norms folded, loaded completely."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.checkpoint.safe_load import State, check_dense, check_finite, read_checkpoint

WRAPPER = "module."  # torch.nn.DataParallel


def read_generator_state(path: str | Path) -> State:
    """Return the weights of a generator's file, without the prefix of ``DataParallel``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a checkpoint, or contains an optimizer, the state of a training run, or a discriminator.
    """
    checkpoint = read_checkpoint(path)
    nested = checkpoint.get("state_dict")
    named: Mapping[Any, Any] = nested if isinstance(nested, Mapping) else checkpoint
    refuse_other_files(named, path)
    state = {str(name): value for name, value in named.items()}
    while state and all(name.startswith(WRAPPER) for name in state):
        state = {name.removeprefix(WRAPPER): value for name, value in state.items()}
    refuse_discriminators(state, path)
    for name, value in state.items():
        check_dense(name, value, path)
    check_finite(state, path)
    return {name: value.float() for name, value in state.items()}


def refuse_other_files(state: Mapping[Any, Any], path: str | Path) -> None:
    """Raise ValueError for the files that training scripts write next to the generator's."""
    if "param_groups" in state:
        raise ValueError(
            f"{path} must contain a generator, got an optimizer's state: take the generator's file next to it, "
            "such as G_ema.pth"
        )
    if "itr" in state and "epoch" in state:
        raise ValueError(
            f"{path} must contain a generator, got the counters of a training run: take the generator's file next "
            "to it, such as G_ema.pth"
        )


def refuse_discriminators(state: State, path: str | Path) -> None:
    """Raise ValueError for a discriminator: it embeds classes last, and has no first map from noise."""
    embeds = {"embed.weight", "embed.weight_orig", "embedding.weight", "embedding.weight_orig"}
    last = {"linear1.weight", "linear1.weight_orig"}
    if "linear0.bias" not in state and (embeds | last) & state.keys():
        raise ValueError(
            f"{path} must contain a generator, got a discriminator: take the generator's file next to it, "
            "such as G_ema.pth or model=G-...pth"
        )


# ----------------------------------------------------------------------------------------------------- spectral norms


def fold_spectral_norms(state: State, path: str | Path) -> State:
    """Divide the weights of ``torch.nn.utils.spectral_norm`` by their singular values ``u^T W v``.

    ``weight_orig``, ``weight_u`` and ``weight_v`` become ``weight``. In evaluation mode u and v are the stored ones,
    converged or not (Miyato et al. 2018, arXiv:1802.05957, Eq. 8).
    """
    folded = dict(state)
    for name in state:
        if not name.endswith("weight_orig"):
            continue
        stem = name.removesuffix("_orig")
        weight = folded.pop(name)
        u = pop_tensor(folded, f"{stem}_u", path)
        v = pop_tensor(folded, f"{stem}_v", path)
        if stem in state:
            raise ValueError(f"{path} must contain {stem} or {name}, got both")
        folded[stem] = weight / singular_value(weight, u, v, stem, path)
    return folded


def fold_power_iteration(state: State, plain: Sequence[str], eps: float, path: str | Path) -> State:
    """Divide the weights of ajbrock's spectral norm by the singular value after one power iteration from ``u0``.

    ``sv0`` is a record of training that evaluation does not use.

    Args:
        plain: weights without a spectral norm.
        eps: smallest norm of a vector that is normalized.
    """
    folded = dict(state)
    normed = any(name.endswith(".u0") for name in state)
    logged = any(name.endswith(".sv0") for name in state)
    for name in state:
        if not normed or not name.endswith(".weight") or name in plain:
            continue
        stem = name.removesuffix("weight")
        u = pop_tensor(folded, f"{stem}u0", path)
        if logged:
            pop_tensor(folded, f"{stem}sv0", path)
        folded[name] = state[name] / power_iteration(state[name], u, name, eps, path)
    return folded


def power_iteration(weight: Tensor, u: Tensor, name: str, eps: float, path: str | Path) -> Tensor:
    """Return the singular value (1,) of weight (O, ...) after one step from u (1, O)."""
    matrix = as_matrix(weight, name, path)
    if u.shape != (1, len(matrix)):
        raise ValueError(f"{path} must contain a vector (1, {len(matrix)}) for {name}, got {tuple(u.shape)}")
    v = F.normalize(u @ matrix, eps=eps)  # (1, I)
    u = F.normalize(v @ matrix.T, eps=eps)  # (1, O)
    return singular_value(weight, u[0], v[0], name, path)


def singular_value(weight: Tensor, u: Tensor, v: Tensor, name: str, path: str | Path) -> Tensor:
    """Return ``u^T W v`` with W (O, I), u (O,) and v (I,)."""
    matrix = as_matrix(weight, name, path)
    if (*u.shape, *v.shape) != tuple(matrix.shape):
        raise ValueError(
            f"{path} must contain vectors for the {tuple(matrix.shape)} matrix of {name}, "
            f"got {tuple(u.shape)} and {tuple(v.shape)}"
        )
    sigma = u @ (matrix @ v)
    if not sigma.abs() > 0:
        raise ValueError(f"{path} is damaged: the spectral norm of {name} must not be 0")
    return sigma


def as_matrix(weight: Tensor, name: str, path: str | Path) -> Tensor:
    """Return a weight (O, ...) as (O, I)."""
    if weight.ndim < 2:
        raise ValueError(f"{path} must contain a matrix or kernel at {name}, got {tuple(weight.shape)}")
    return weight.flatten(1)


def pop_tensor(state: State, name: str, path: str | Path) -> Tensor:
    """Remove a tensor from the state dict and return it."""
    if name not in state:
        raise ValueError(f"{path} is incomplete: it must contain {name}, got none")
    return state.pop(name)


# ------------------------------------------------------------------------------------------------------------ loading


def rename(state: State, patterns: Sequence[tuple[str, str]], path: str | Path) -> State:
    """Return the state dict with each regular expression replaced in all names, in order."""
    renamed = {}
    for old, tensor in state.items():
        name = old
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise ValueError(f"{path} contains another network: {old!r:.100} has no place in it")
        renamed[name] = tensor
    return renamed


def number_blocks(state: State, pattern: str, attention_shift: int) -> State:
    """Number residual blocks and attention layers, which a file counts together, separately from 0.

    Names become ``blocks.N.*``, and ``attention.N.*`` for layers with a weight called gamma.

    Args:
        state: the state dict.
        pattern: regular expression of the names to change, with the groups NUMBER and rest.
        attention_shift: 0 names attention by the number of the block behind it, -1 by that of the block before it.
    """
    # A number with leading zeros would be a second name of the same layer.
    expression = re.compile(pattern.replace("NUMBER", "0|[1-9][0-9]{0,5}"))
    matches = {name: expression.fullmatch(name) for name in state}
    numbers = {int(match[1]) for match in matches.values() if match}
    attention_numbers = {int(match[1]) for match in matches.values() if match and match[2] == "gamma"}
    places = {}
    blocks = 0
    for number in sorted(numbers):
        if number in attention_numbers:
            places[number] = f"attention.{blocks + attention_shift}"
        else:
            places[number] = f"blocks.{blocks}"
            blocks += 1
    renamed = {}
    for name, tensor in state.items():
        match = matches[name]
        new_name = f"{places[int(match[1])]}.{match[2]}" if match else name
        renamed[new_name] = squeeze_gamma(new_name, tensor)
    return renamed


def squeeze_gamma(name: str, tensor: Tensor) -> Tensor:
    """Return the gain of an attention layer without dimensions; any other tensor as it is."""
    return tensor.reshape(()) if name.endswith(".gamma") and tensor.numel() == 1 else tensor


def load_completely(model: nn.Module, state: State, path: str | Path) -> nn.Module:
    """Load a state dict of which every tensor is used, into a model of which none is missing; in evaluation mode.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape.
    """
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unused = sorted(state.keys() - expected.keys())
    if missing:
        raise ValueError(
            f"{path} is incomplete: {len(missing)} of {len(expected)} tensors are missing, such as {missing[0]}"
        )
    if unused:
        raise ValueError(
            f"{path} contains another network: {len(unused)} of its tensors have no place, such as {unused[0]!r:.100}"
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{path} contains another network: {name} must be {tuple(tensor.shape)}, got {tuple(state[name].shape)}"
            )
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()
