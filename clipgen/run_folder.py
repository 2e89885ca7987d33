"""The frozen pair beside a transformer: its tokenizer and CLIP in the folder of a run, a pipeline or a cache."""

from __future__ import annotations

import shutil
from pathlib import Path

from clipgen.clip import BUNDLED_CLIPS, FrozenCLIP, find_folder
from clipgen.files import read_json, write_json
from clipgen.vqgan import VQGAN


def save_frozen(root: Path, vqgan: VQGAN, clip: FrozenCLIP, half: bool = False) -> None:
    """Write what a transformer needs beside it: ``vqgan/``, and ``clip.json`` with the CLIP's name.

    A CLIP that lives in a folder of its own is copied to ``clip/``, so that the whole can be moved.
    """
    config, copied = clip.config(), root / "clip"
    folder = None if clip.model_name in BUNDLED_CLIPS else find_folder(clip.model_name)
    if folder and copied.exists() and not (copied / "open_clip_config.json").is_file():
        raise FileExistsError(f"{copied} exists and is no CLIP: move it away, or name another place")
    root.mkdir(parents=True, exist_ok=True)
    vqgan.save(root / "vqgan", half)
    if folder:
        if folder != copied.resolve():
            shutil.rmtree(copied, ignore_errors=True)  # nothing of another CLIP may stay: a vocabulary would
            shutil.copytree(folder, copied)
        config["model_name"] = "clip"
    write_json(root / "clip.json", config)


def copy_frozen(source: Path, root: Path) -> None:
    """What ``save_frozen`` left in one folder, into another."""
    for name in ("vqgan", "clip"):
        if (source / name).is_dir():
            shutil.copytree(source / name, root / name, dirs_exist_ok=True)
    shutil.copy(source / "clip.json", root / "clip.json")


def load_clip(root: Path) -> FrozenCLIP:
    """The CLIP that ``clip.json`` of a folder names."""
    if not (root / "clip.json").is_file():
        raise FileNotFoundError(
            f"no clip.json in {root}: a pipeline folder or a run of `clipgen-train stage=transformer` has one"
        )
    config = read_json(root / "clip.json", "model_name", "pretrained")
    name = config["model_name"]
    return FrozenCLIP(str(root / name) if (root / name).is_dir() else name, config["pretrained"])


def run_folder(path: str | Path) -> Path:
    """The folder of a run or pipeline, to which a model folder or a checkpoint inside it belongs, or which it is."""
    path = Path(path).expanduser()
    return path.parent.parent if path.is_file() else path.parent if (path / "config.json").is_file() else path
