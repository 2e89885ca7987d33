"""Files inside an untrusted folder, whose links must not lead out of it."""

from __future__ import annotations

import os
from pathlib import Path


def file_inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder; links may not leave it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a regular file, or a link out of the folder.
    """
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    if not path.is_file():
        raise ValueError(f"{path} must be a regular file")
    if not contained(path, folder):
        raise ValueError(f"{path} must lie in {folder}, got a link to {path.resolve()}: copy the file itself")
    return path


def contained(path: Path, folder: Path) -> bool:
    """Return whether a path stays in a folder when all links are followed.

    The folder of a snapshot in the hub's cache includes the store that the snapshot links to.
    """
    target = path.resolve()
    root = folder.resolve()
    if target.is_relative_to(root):
        return True
    for parent in root.parents:  # models--OWNER--NAME/snapshots/REVISION links to models--OWNER--NAME/blobs
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return target.parent == parent.parent / "blobs"
    return False


def check_inside(root: Path, *names: str) -> None:
    """Raise ValueError if an entry of a folder is a link to outside of the folder."""
    for name in names:
        if not contained(root / name, root):
            raise ValueError(f"{root / name} must lie in {root}, got a link to {(root / name).resolve()}")


def refuse_links(output: Path) -> None:
    """Raise ValueError if a folder contains a link that leaves it, a pipe or a device, because writing would follow it.

    A run or a token cache may be untrusted: a link called ``metrics.csv`` could lead to any file of the user.
    """
    for folder, folders, files in os.walk(output):
        for name in [*folders, *files]:
            path = Path(folder, name)
            if not contained(path, output):
                raise ValueError(f"{path} must lie in {output}, got a link to {path.resolve()}: copy the file itself")
            # Temporary files of other processes may disappear in the meantime.
            if not path.is_file() and not path.is_dir() and os.path.lexists(path):
                raise ValueError(f"{path} must be a regular file or a folder")
