"""CLIPs in untrusted folders: ``open_clip_config.json``, one file of weights, and a tokenizer.

open_clip would pass the settings of such a folder to transformers and timm, which run Python files in the folder and
download what it names. So this module reads the folder itself: settings are compared with a list of allowed
names and values, and sizes are compared with the weights before any memory is allocated. ``clip_tokenizer`` reads the
tokenizer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from clipgen.checkpoint.clip_rules import (
    ANYTHING,
    MODEL,
    MULTIMODAL,
    PREPROCESSING,
    TEXT,
    VISION,
    abbreviate,
    check_rules,
)
from clipgen.checkpoint.safe_load import State, check_safetensors_header, read_checkpoint
from clipgen.storage.files import one_line, read_json, write_json
from clipgen.storage.links import file_inside

CLIP_CONFIG = "open_clip_config.json"
# A CLIP folder with this file reads whole words instead of byte pairs.
VOCABULARY = "vocabulary.json"
CLIP_WEIGHTS = (  # the first that exists is used, as in open_clip
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
TOKENIZER_DATA = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
CLIP_FILES = (CLIP_CONFIG, VOCABULARY, *CLIP_WEIGHTS, *TOKENIZER_DATA, *TOKENIZER_SETTINGS)
BYTE_PAIRS = 49408  # tokens of open_clip's own tokenizer


def read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read and check a CLIP folder's settings.

    Returns:
        (model_cfg, preprocess_cfg), as open_clip calls them.

    Raises:
        ValueError: a key or value is not allowed; names the file and the key.
    """
    path = file_inside(folder, CLIP_CONFIG)
    config = read_json(path, "model_cfg")
    model = config["model_cfg"]
    preprocessing = config.get("preprocess_cfg") or {}
    check_rules(path, "preprocess_cfg", preprocessing, PREPROCESSING)
    nested = {"vision_cfg": VISION, "text_cfg": TEXT, "multimodal_cfg": MULTIMODAL}
    check_rules(path, "model_cfg", model, MODEL | dict.fromkeys(nested, ANYTHING))
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in model:
            raise ValueError(f"model_cfg of {path} must contain {key!r}")
    for key, rules in nested.items():
        if key in model:
            check_rules(path, f"model_cfg.{key}", model[key], rules)
            if model[key].get("output_tokens") and "multimodal_cfg" not in model:
                raise ValueError(f"model_cfg.{key}.output_tokens of {path} must be false, got true")
    return model, preprocessing


# ------------------------------------------------------------------------------------------------------- which files


def weights_file(folder: Path) -> Path:
    """Return the file of weights of a CLIP folder: the first of the usual names, or the only one there is.

    Raises:
        ValueError: there is none, or several of unusual names.
    """
    usual = [name for name in CLIP_WEIGHTS if (folder / name).is_file()]
    others = [entry.name for entry in folder.iterdir() if entry.suffix in (".safetensors", ".bin", ".pth")]
    names = usual[:1] or others
    if len(names) != 1:
        what = "got none" if not names else f"got {', '.join(sorted(map(abbreviate, names)))}"
        raise ValueError(
            f"the weights of CLIP {folder} cannot be loaded: it must contain one of {', '.join(CLIP_WEIGHTS)}, {what}"
        )
    return file_inside(folder, names[0])


def files_of(folder: Path) -> list[Path]:
    """Return the files that a CLIP folder is made of, and no others."""
    model, _ = read_settings(folder)
    names = [VOCABULARY] if (folder / VOCABULARY).exists() else []
    if not names and model["text_cfg"].get("hf_tokenizer_name"):
        names = [name for name in (*TOKENIZER_DATA, *TOKENIZER_SETTINGS) if (folder / name).exists()]
    return [file_inside(folder, CLIP_CONFIG), weights_file(folder), *(file_inside(folder, name) for name in names)]


def write_folder(target: Path, config: dict[str, Any], preprocessing: dict[str, Any], state: State) -> None:
    """Write a CLIP folder of settings and weights."""
    write_json(target / CLIP_CONFIG, {"model_cfg": config, "preprocess_cfg": preprocessing})
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    (target / CLIP_WEIGHTS[0]).write_bytes(save(tensors))


def download(name: str) -> Path:
    """Download a CLIP from the Hugging Face hub: its settings, one file of weights, its tokenizer's data.

    Raises:
        ValueError: it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = name.removeprefix("hf-hub:").partition("@")
    settings = [CLIP_CONFIG, VOCABULARY, *TOKENIZER_DATA, *TOKENIZER_SETTINGS]
    try:
        for weights in CLIP_WEIGHTS:
            folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=[*settings, weights]))
            if (folder / weights).is_file():
                break
    except (OSError, ValueError) as error:  # no network, no such name, or no permission
        raise ValueError(
            f"CLIP {name!r} cannot be downloaded ({one_line(error)}): download it once on a machine with a network"
        ) from error
    return folder


# --------------------------------------------------------------------------------------------------------- the model


@contextmanager
def open_clip_interface() -> Iterator[None]:
    """Turn the errors of an incompatible version of open_clip into a ValueError that names the version."""
    try:
        yield
    except (ImportError, TypeError, AttributeError, NameError) as error:
        raise ValueError(
            f"open_clip {open_clip.__version__} does not work as clipgen expects ({one_line(error)}): "
            "pip install 'open_clip_torch>=3.2,<4'"
        ) from error


def load_clip_model(folder: Path) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Build the CLIP of a folder, with its weights.

    Returns:
        (model, model_cfg, preprocess_cfg)

    Raises:
        ValueError: settings or weights are not allowed, or do not fit each other; nothing is allocated then.
    """
    config, preprocessing = read_settings(folder)
    weights = weights_file(folder)
    header = read_header(weights)
    with torch.device("meta"):
        plan = build_network(folder, config)
    check_fits_model(plan, rename_to_open_clip(header, plan), weights)
    state = rename_to_open_clip(read_state(weights), plan)
    model = build_network(folder, config)
    model.load_state_dict(state)
    check_finite_model(model, weights)
    return model, config, preprocessing


def build_network(folder: Path, config: dict[str, Any]) -> nn.Module:
    """Build open_clip's network from settings that were checked; nothing is downloaded."""
    arguments = copy.deepcopy(config)
    custom = arguments.pop("custom_text", False)
    arguments["vision_cfg"]["timm_model_pretrained"] = False
    with open_clip_interface():
        kind: Any = open_clip.CLIP
        if custom:
            kind = open_clip.CoCa if "multimodal_cfg" in arguments else open_clip.CustomTextCLIP
        try:
            return kind(**arguments)
        except (ValueError, AssertionError, ArithmeticError, RuntimeError, LookupError) as error:
            reason = one_line(error) or type(error).__name__
            raise ValueError(f"{folder / CLIP_CONFIG} does not describe a CLIP: {reason}") from error


def read_header(path: Path) -> State:
    """Read names, shapes and types of weights, as tensors without memory."""
    if path.suffix != ".safetensors":
        return {name: tensor.to("meta") for name, tensor in read_state(path).items()}
    check_safetensors_header(path)
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: meta_tensor(part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from error


def meta_tensor(shape: list[int], dtype: str) -> Tensor:
    """Return a tensor without memory, of one of safetensors' types."""
    integers = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
    others = {"BOOL": torch.bool, "C64": torch.complex64}
    kind = (integers | others).get(dtype, torch.float32 if dtype.startswith(("F", "BF")) else torch.int64)
    return torch.empty(shape, dtype=kind, device="meta")


def read_state(path: Path) -> State:
    """Read weights; nothing in the file is executed."""
    if path.suffix == ".safetensors":
        return load_file(path)
    content = read_checkpoint(path)
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} must contain weights by name")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def rename_to_open_clip(state: State, model: nn.Module) -> State:
    """Return weights under the names of this version of open_clip, as its own ``load_checkpoint`` does."""
    with open_clip_interface():
        state = open_clip.convert.convert_state_dict(model, state)
        if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
            state = open_clip.model.convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in own and state[name].numel() == own[name].numel() == 1:
            state[name] = state[name].reshape(own[name].shape)
    return {name: tensor for name, tensor in state.items() if name in own or not name.endswith("position_ids")}


def check_fits_model(model: nn.Module, state: State, path: Path) -> None:
    """Raise ValueError at the first weight whose name, shape or type does not fit the model."""
    own = model.state_dict()
    for name in [*own, *state]:
        if name not in state or name not in own:
            what = "lacks" if name in own else "must not contain"
            raise ValueError(f"{path} does not fit its {CLIP_CONFIG}: it {what} {abbreviate(name)}")
        ours = own[name]
        theirs = state[name]
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{path} does not fit its {CLIP_CONFIG}: {name} must be {tuple(ours.shape)}, got {tuple(theirs.shape)}"
            )
        if ours.is_floating_point() != theirs.is_floating_point():
            kind = "floating-point numbers" if ours.is_floating_point() else "whole numbers"
            raise ValueError(f"{name} of {path} must contain {kind}, got {str(theirs.dtype).removeprefix('torch.')}")


@torch.no_grad()
def check_finite_model(model: nn.Module, source: str | Path) -> None:
    """Raise ValueError at the first weight that contains NaN or an infinite number."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.aminmax()  # NaN wins
            if not math.isfinite(low) or not math.isfinite(high):
                raise ValueError(f"the weights of {source} must be finite, got NaN or an infinite number in {name}")
