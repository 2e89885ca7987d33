"""Save and load the VQ-GAN and CLIP of a transformer, in the folder of a run, a pipeline or a token cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import open_clip

from clipgen.bundled import BUNDLED
from clipgen.checkpoint import clip_folder, model_folder
from clipgen.clip import FrozenCLIP
from clipgen.models.conditioning import Conditioner
from clipgen.storage.atomic_folder import replace_folder
from clipgen.storage.files import flush_to_disk, read_json, write_json
from clipgen.storage.links import check_inside, file_inside
from clipgen.vqgan import VQGAN

# Environment variable: a CLIP that clip.json may name besides the folder's own.
ALLOW_CLIP_VARIABLE = "CLIPGEN_ALLOW_CLIP"


def save_frozen(root: Path, vqgan: VQGAN, clip: Conditioner, half: bool = False) -> None:
    """Write the tokenizer to ``vqgan/`` and the name of the CLIP to ``clip.json``.

    A CLIP from a folder, a file or the hub is copied to ``clip/``, so that the folder can be moved.

    Raises:
        TypeError: the conditioner is not a FrozenCLIP.
    """
    if not isinstance(clip, FrozenCLIP):
        raise TypeError(f"the conditioner must be a FrozenCLIP to be saved, got {type(clip).__name__}")
    check_clip_folder(root / "clip")
    root.mkdir(parents=True, exist_ok=True)
    vqgan.save(root / "vqgan", half)
    write_json(root / "clip.json", save_clip(root / "clip", clip))


def save_clip(target: Path, clip: FrozenCLIP) -> dict[str, Any]:
    """Copy a CLIP without a public name to a folder; return the content of ``clip.json``."""
    own = {"model_name": "clip", "pretrained": None}
    if is_own_or_public(clip.model_name, clip.pretrained):
        return clip.config()
    if clip.folder:
        if clip.folder != target.resolve():
            copy_clip(clip.folder, target)
        return own
    config = open_clip.get_model_config(clip.model_name)
    # A text encoder of Hugging Face can only be built by its name.
    if config is None or config["text_cfg"].get("hf_model_name"):
        return clip.config()
    preprocessing = {
        "mean": clip.mean.flatten().tolist(),
        "std": clip.std.flatten().tolist(),
        "interpolation": clip.interpolation.value,
        "resize_mode": clip.resize_mode,
    }
    with replace_folder(target, names_in(target) | set(clip_folder.CLIP_FILES)) as partial:
        clip_folder.write_folder(partial, config, preprocessing, clip.model.state_dict())
        if config["text_cfg"].get("hf_tokenizer_name"):
            clip.tokenizer.save_pretrained(partial)
    return own


def names_in(folder: Path) -> set[str]:
    """Return the names of the entries of a folder; an empty set if there is no folder."""
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def check_clip_folder(path: Path) -> None:
    """Raise FileExistsError if the path exists and is not a CLIP folder."""
    if path.exists() and not (path / clip_folder.CLIP_CONFIG).is_file():
        raise FileExistsError(f"{path} exists and is not a CLIP folder: move it away, or name another place")


def copy_clip(folder: Path, target: Path) -> None:
    """Copy the files of a CLIP folder, replacing all files of another CLIP."""
    files = clip_folder.files_of(folder)
    with replace_folder(target, names_in(target) | {file.name for file in files}) as partial:
        for file in files:
            shutil.copyfile(file, partial / file.name)


def copy_frozen(source: Path, root: Path) -> None:
    """Copy the frozen models of one folder, which is not trusted, into another."""
    check_inside(source, "vqgan", "clip", "clip.json")
    if (source / "vqgan").is_dir():
        (root / "vqgan").mkdir(parents=True, exist_ok=True)
        for name in model_folder.MODEL_FILES:
            shutil.copyfile(file_inside(source / "vqgan", name), root / "vqgan" / name)
            flush_to_disk(root / "vqgan" / name)
    config = read_clip_json(source)
    if config["model_name"] == "clip":
        copy_clip(source / "clip", root / "clip")
    write_json(root / "clip.json", config)


def load_clip(root: Path) -> FrozenCLIP:
    """Load the CLIP of a folder: its own ``clip/``, or a model and tag of open_clip that ``clip.json`` names.

    Raises:
        FileNotFoundError: there is no ``clip.json``.
        ValueError: it names any other CLIP; the message says how to allow it.
    """
    config = read_clip_json(root)
    name = config["model_name"]
    if name == "clip":
        check_inside(root, "clip")
        return FrozenCLIP(str(root / "clip"))
    return FrozenCLIP(name, config["pretrained"])


def read_clip_json(root: Path) -> dict[str, Any]:
    """Read and check ``clip.json`` of a folder; raises the errors of ``load_clip``."""
    path = root / "clip.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no clip.json in {root}: a pipeline folder or a run of `clipgen-train stage=transformer` has one"
        )
    check_inside(root, "clip.json")
    config = read_json(path, "model_name", "pretrained")
    name = config["model_name"]
    tag = config["pretrained"]
    if not isinstance(name, str) or not isinstance(tag, (str, type(None))):
        raise ValueError(f"{path} must name a CLIP by two strings, got {str(name)[:80]!r} and {str(tag)[:80]!r}")
    if name == "clip" and not (root / "clip").is_dir():
        raise ValueError(f"{path} names the CLIP in {root / 'clip'}, which is missing: copy the whole folder")
    if not is_own_or_public(name, tag):
        full = name if tag is None else f"{name}:{tag}"
        if os.environ.get(ALLOW_CLIP_VARIABLE) != full:
            raise ValueError(
                f"{path} names the CLIP {full[:200]!r}, which is neither in the folder nor a model and tag of "
                f"open_clip: if you trust it, set the environment variable {ALLOW_CLIP_VARIABLE} to this name"
            )
    return {"model_name": name, "pretrained": tag}


def is_own_or_public(name: str, tag: str | None) -> bool:
    """Return whether a CLIP is the folder's own, the bundled one, or one that open_clip publishes under a tag."""
    if name == "clip" or name in BUNDLED:
        return tag is None
    if name not in open_clip.list_models() or tag is None:
        return False
    names = (name, name.removesuffix("-quickgelu"))
    return any(tag in open_clip.list_pretrained_tags_by_model(model) for model in names)


def run_folder(path: str | Path) -> Path:
    """Return the run or pipeline folder that contains ``path``, or ``path`` itself."""
    path = Path(path).expanduser()
    # Such as RUN/checkpoints/last.ckpt.
    if path.is_file():
        return path.parent.parent
    # Such as RUN/transformer.
    if (path / "config.json").is_file():
        return path.parent
    return path
