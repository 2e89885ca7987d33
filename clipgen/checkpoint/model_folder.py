"""Models in and out of files: our folders (JSON + safetensors), training checkpoints, and run folders.

A model folder holds ``config.json`` (which model, its constructor's arguments) and ``model.safetensors``. A run folder
is what a training run leaves: ``checkpoints/`` while it trains, and a model folder named after the model once it is
finished.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import clipgen
from clipgen.checkpoint.safe_load import State, read_checkpoint
from clipgen.files import naming, one_line, read_json

COMMANDS = {
    "VQGAN": "clipgen-train stage=vqgan",
    "ConditionalTransformer": "clipgen-train stage=transformer",
    "ClassConditionalTransformer": "clipgen-train stage=transformer data=cached data.conditioning=class",
}
FOLDERS = {  # name of the model folder in a run folder
    "VQGAN": "vqgan",
    "ConditionalTransformer": "transformer",
    "ClassConditionalTransformer": "label_transformer",
}
FILES = ("config.json", "model.safetensors")
BUNDLED = {"shapes": Path(clipgen.__file__).parent / "bundled"}
Model = tuple[dict[str, Any], State]  # constructor's arguments and weights


def kind(model: type) -> str:
    """By which name files know a model: its own, or for a user's subclass that of ours."""
    return next(each.__name__ for each in model.__mro__ if each.__name__ in FOLDERS)


def plain(value: Any) -> Any:
    """A constructor's argument as JSON and safe checkpoints hold it: nothing of numpy, OmegaConf or pathlib."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return (tuple if isinstance(value, tuple) else list)(plain(each) for each in value)
    return value


def save_folder(path: str | Path, model: str, arguments: dict[str, Any], state: State, half: bool = False) -> Path:
    """Write a model folder; it appears whole or not at all, in the place of an older one.

    Args:
        half: store floating-point weights in 16 bits.

    Raises:
        FileExistsError: the path holds something else, which would be lost.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and {p.name for p in path.iterdir()} <= set(FILES)):
        raise FileExistsError(f"{path} exists and is more than a model folder: move it away, or name another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    # tied weights are stored once by name and cloned here: safetensors refuses shared memory
    tensors = {
        k: (v.half() if half and v.is_floating_point() else v).detach().cpu().clone().contiguous()
        for k, v in state.items()
    }
    config = {"model": model, "clipgen": clipgen.__version__, "arguments": arguments}
    prefix = f".{path.name}-"
    with naming(path), tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as partial:
        whole = Path(partial) / "folder"
        whole.mkdir()
        (whole / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (whole / "model.safetensors").write_bytes(save(tensors))
        replace(path, whole, Path(partial) / "old")
    return path


def replace(path: Path, new: Path, old: Path) -> None:
    """Put the folder ``new`` in the place of ``path``, which moves to ``old``; where that fails, ``path`` stays."""
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise


def located(path_or_name: str | Path) -> Path:
    """Where files are: a path; ``"shapes"``, the bundled models; or what ``"hf-hub:OWNER/NAME"`` downloads."""
    name = str(path_or_name)
    if not name.startswith("hf-hub:"):
        # a Path is one, whatever its name
        return Path(BUNDLED.get(name, name) if isinstance(path_or_name, str) else name).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name.removeprefix("hf-hub:")))
    except (OSError, ValueError) as error:  # no network, no such name, no right to it
        raise FileNotFoundError(f"{name} could not be downloaded: {one_line(error)}") from error


def load(path: str | Path, model: str) -> Model:
    """Constructor's arguments and weights of a model folder, a run folder, a ``.ckpt``, or what ``located`` knows.

    Raises:
        FileNotFoundError: nothing there; names the command that makes it.
        ValueError: the file is damaged, or of the other stage.
    """
    found = find(located(path), model)
    return load_ckpt(found, model) if found.is_file() else load_folder(found, model)


def find(path: Path, model: str) -> Path:
    """The model folder or checkpoint that ``path`` stands for; in a run folder the finished model comes first."""
    if path.is_file():
        return path
    places = [path, path / FOLDERS[model], path / "checkpoints" / "best.ckpt", path / "checkpoints" / "last.ckpt"]
    for place in places:
        if place.is_file() or (place / "config.json").is_file():
            return place
    others = [name for name in FOLDERS if name != model and (path / FOLDERS[name]).is_dir()]
    hint = f"it holds a {others[-1]}" if others else f"`{COMMANDS[model]}` makes one"
    state = "holds no such model" if path.is_dir() else "does not exist"
    raise FileNotFoundError(f"no {model} checkpoint: {path} {state}; {hint}")


def check_model(found: str | None, model: str, path: Path) -> None:
    """Raise ValueError where a file holds another model than the one asked for."""
    if found != model:
        what = f"a {found} checkpoint (from `{COMMANDS[found]}`)" if found in COMMANDS else "no clipgen checkpoint"
        raise ValueError(f"{path} is {what}, but a {model} is needed; `{COMMANDS[model]}` makes one")


def load_folder(path: Path, model: str) -> Model:
    """Read a model folder."""
    config = read_json(path / "config.json", "model", "arguments")
    check_model(config["model"], model, path)
    try:
        state = load_file(path / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{path / 'model.safetensors'} is damaged: {error}") from error
    return config["arguments"], {k: v.float() if v.dtype == torch.half else v for k, v in state.items()}


def load_ckpt(path: Path, model: str) -> Model:
    """Read a training checkpoint of ours."""
    checkpoint = read_checkpoint(path)
    check_model(checkpoint.get("clipgen_model"), model, path)
    return checkpoint["hyper_parameters"], checkpoint["state_dict"]


def fingerprint(state: State) -> str:
    """A short hash of weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def fitting(path: str | Path, model: str) -> Iterator[None]:
    """Say which file it was where arguments or weights do not fit the model that is built from them."""
    try:
        yield
    except (TypeError, RuntimeError, LookupError) as error:  # the last: of names that others' files should have
        what = "it lacks " if isinstance(error, KeyError) else ""
        reason = what + one_line(error)
        raise ValueError(f"{path} does not fit the {model} of clipgen {clipgen.__version__}: {reason}") from error
