"""Save and load models: model folders (JSON and safetensors), training checkpoints, and run folders.

A model folder contains ``config.json`` (name of the model, its constructor's arguments) and ``model.safetensors``. A
run folder is written by a training run: ``checkpoints/`` while it trains, and a model folder named after the model once
it is finished.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

import clipgen
from clipgen.bundled import BUNDLED
from clipgen.checkpoint.pickle_stubs import stubs_to_plain
from clipgen.checkpoint.safe_load import (
    State,
    check_finite,
    check_safetensors_header,
    check_tensors,
    read_checkpoint,
    strip_wrappers,
)
from clipgen.checkpoint.verified_build import build_verified
from clipgen.model_kinds import COMMANDS, MODEL_FOLDER_NAMES
from clipgen.storage.atomic_folder import finish_swap, replace_folder
from clipgen.storage.files import check_size, one_line, read_json
from clipgen.storage.links import check_inside

MODEL_FILES = ("config.json", "model.safetensors")
REQUIRED_WEIGHT = {  # a weight that every such model has; it reveals a prefix that a wrapper has added
    "VQGAN": "autoencoder.encoder.conv_in.weight",
    "ConditionalTransformer": "gpt.clip_proj.weight",
    "ClassConditionalTransformer": "gpt.clip_proj.weight",
}
CODEBOOKS = ("quantize.embedding.weight", "quantize.embed.weight")
MAX_CONFIG = 2**24  # bytes of config.json
REPOSITORY = r"[\w-][\w.-]*/[\w-][\w.-]*(@\S+)?"  # OWNER/NAME or OWNER/NAME@REVISION on the hub
ModelContent = tuple[dict[str, Any], State]  # constructor's arguments and weights


def model_name_of(model: type) -> str:
    """Return the model name stored in files: the class name, or that of the clipgen base class of a subclass."""
    return next(parent.__name__ for parent in model.__mro__ if parent.__name__ in MODEL_FOLDER_NAMES)


def save_folder(path: str | Path, model: str, arguments: dict[str, Any], state: State, half: bool = False) -> Path:
    """Write a model folder atomically, in the place of an older one.

    Args:
        path: model folder.
        model: name of the model.
        arguments: constructor arguments.
        state: weights.
        half: store floating-point weights in 16 bits.

    Raises:
        FileExistsError: the path contains something other than a model folder.
    """
    path = Path(path)
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in state.items():
        stored = tensor.half() if half and tensor.is_floating_point() else tensor
        # Cloned, because safetensors refuses tied weights, which share memory.
        tensors[name] = stored.detach().cpu().clone().contiguous()
    config = {"model": model, "clipgen": clipgen.__version__, "arguments": arguments}
    with replace_folder(path, MODEL_FILES) as partial:
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (partial / "model.safetensors").write_bytes(save(tensors))
    return path


def check_replaceable(path: Path) -> None:
    """Raise FileExistsError if a path contains something other than a model folder."""
    if path.exists() and not (path.is_dir() and {entry.name for entry in path.iterdir()} <= set(MODEL_FILES)):
        raise FileExistsError(f"{path} exists and is more than a model folder: move it away, or name another place")


def resolve_path(path_or_name: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Return a path, that of a bundled model, or that of a downloaded ``"hf-hub:OWNER/NAME"``.

    Args:
        path_or_name: a path or a name; ``"hf-hub:OWNER/NAME@REVISION"`` also names a revision.
        revision: branch, tag or commit of a repository on the hub.
        token: access token for a private repository; None uses that of ``hf auth login``, or ``HF_TOKEN``.

    Raises:
        FileNotFoundError: the repository cannot be downloaded.
        ValueError: a revision of something that is not on the hub, or two revisions.
    """
    name = str(path_or_name)
    if not name.startswith("hf-hub:"):
        if revision is not None:
            raise ValueError(f"revision must be None for {name}, which is not on the hub, got {revision}")
        # A Path is always a path, also if it looks like a name.
        return Path(BUNDLED.get(name, name) if isinstance(path_or_name, str) else name).expanduser()
    from huggingface_hub import snapshot_download

    repository, _, named_revision = name.removeprefix("hf-hub:").partition("@")
    if named_revision and revision not in (None, named_revision):
        raise ValueError(f"revision must be {named_revision}, as in {name}, got {revision}")
    try:
        return Path(snapshot_download(repository, revision=named_revision or revision, token=token))
    except (OSError, ValueError) as error:  # no network, no such name, or no permission
        raise FileNotFoundError(f"{name} could not be downloaded: {one_line(error)}") from error


def hub_name(name: str | Path) -> str | Path:
    """Return ``"hf-hub:OWNER/NAME"`` for ``"OWNER/NAME"``, unless it is a local path; anything else as it is."""
    is_repository = isinstance(name, str) and re.fullmatch(REPOSITORY, name) is not None
    return f"hf-hub:{name}" if is_repository and not Path(name).exists() else name


def load_arguments_and_state(path: str | Path, model: str) -> ModelContent:
    """Load the constructor's arguments and the weights of a model folder, a run folder, a ``.ckpt``, or a public name.

    Raises:
        FileNotFoundError: there is no such model; the message names the command that makes one.
        ValueError: the file is damaged, or contains a model of the other stage.
    """
    place = resolve_path(path)
    for folder in (place, place / MODEL_FOLDER_NAMES[model]):
        finish_swap(folder)
    source = find_model(place, model)
    return load_ckpt(source, model) if source.is_file() else load_folder(source, model)


def load_model(cls: Any, path: str | Path, revision: str | None, token: str | None) -> Any:
    """Load a model of a class, in evaluation mode; arguments as in ``resolve_path``.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: the file is damaged, contains a model of the other stage, or does not fit the class.
    """
    place = resolve_path(path, revision, token)
    arguments, state = load_arguments_and_state(place, model_name_of(cls))
    return build_verified(cls, arguments, state, place)


def find_model(path: Path, model: str) -> Path:
    """Find the model folder or checkpoint in ``path``; in a run folder the finished model takes precedence.

    Raises:
        FileNotFoundError: there is no such model; the message names the command that makes one.
    """
    if path.is_file():
        return path
    places = [
        path,
        path / MODEL_FOLDER_NAMES[model],
        path / "checkpoints" / "best.ckpt",
        path / "checkpoints" / "last.ckpt",
    ]
    for place in places:
        if place.is_file() or (place / "config.json").is_file():
            return place
    others = [name for name in MODEL_FOLDER_NAMES if name != model and (path / MODEL_FOLDER_NAMES[name]).is_dir()]
    hint = f"it contains a {others[-1]}" if others else f"`{COMMANDS[model]}` makes one"
    state = "contains no such model" if path.is_dir() else "does not exist"
    raise FileNotFoundError(f"no {model} checkpoint: {path} {state}; {hint}")


def check_model(stored: str | None, model: str, path: Path) -> None:
    """Raise ValueError if a file contains another model than the one requested."""
    if stored != model:
        what = (
            f"a {stored} checkpoint (from `{COMMANDS[stored]}`)" if stored in COMMANDS else "not a clipgen checkpoint"
        )
        raise ValueError(f"{path} is {what}, but a {model} is needed; `{COMMANDS[model]}` makes one")


def load_folder(path: Path, model: str) -> ModelContent:
    """Read a model folder; the weights are checked to be finite, and memory-mapped.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or a link out of the folder, or belongs to another model.
    """
    check_inside(path, *MODEL_FILES)
    config = read_config(path / "config.json")
    weights = path / "model.safetensors"
    check_model(config["model"], model, path)
    if not weights.is_file():
        raise FileNotFoundError(f"no weights {weights}: the model folder is incomplete")
    check_safetensors_header(weights)
    try:
        state = load_file(weights)
    except (SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"{weights} is damaged: {one_line(error)}") from error
    check_finite(state, weights)
    for name, tensor in state.items():
        if tensor.dtype == torch.half:
            state[name] = tensor.float()
    return config["arguments"], state


def read_config(path: Path) -> dict[str, Any]:
    """Read ``config.json`` of a model folder: the name of the model and its constructor arguments.

    Raises:
        ValueError: it is damaged.
    """
    check_size(path, MAX_CONFIG)
    config = read_json(path, "model", "arguments")
    for key, expected in (("model", str), ("arguments", dict)):
        if not isinstance(config[key], expected):
            raise ValueError(f"{path} is damaged: {key!r} must be a {expected.__name__}, got {config[key]!r:.60}")
    return config


def codebook_rows(path: Path) -> int | None:
    """Return the number of codes in a tokenizer's folder, read from its header; None if it has no codebook.

    Raises:
        ValueError: the file is damaged.
    """
    weights = path / "model.safetensors"
    if not weights.is_file():
        return None
    check_safetensors_header(weights)
    try:
        with safe_open(weights, "pt") as file:
            names = [name for name in file.keys() if name in CODEBOOKS]  # noqa: SIM118
            return int(file.get_slice(names[0]).get_shape()[0]) if names else None
    except (SafetensorError, IndexError) as error:
        raise ValueError(f"{weights} is damaged: {one_line(error)}") from error


def load_ckpt(path: Path, model: str) -> ModelContent:
    """Read a training checkpoint; the weights are checked to be finite, and memory-mapped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is damaged, or belongs to another model.
    """
    checkpoint = read_checkpoint(path)
    stored = checkpoint.get("clipgen_model")
    check_model(stored if isinstance(stored, str) else None, model, path)
    arguments = stubs_to_plain(checkpoint.get("hyper_parameters"))
    state = checkpoint.get("state_dict")
    for key, value in (("hyper_parameters", arguments), ("state_dict", state)):
        if not isinstance(value, Mapping):
            got = "nothing" if value is None else f"a {type(value).__name__}"
            raise ValueError(f"{path} is damaged: its {key} must be a mapping, got {got}")
    for name in state:  # type: ignore[union-attr]
        if not isinstance(name, str):
            raise ValueError(f"{path} is damaged: the names of its weights must be strings, got {name!r:.60}")
    return dict(arguments), check_tensors(strip_wrappers(state, REQUIRED_WEIGHT[model], path), path)  # type: ignore[arg-type]


def fingerprint(state: State) -> str:
    """Return a short hash of weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
