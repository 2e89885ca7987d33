"""The folder that a command writes to."""

from __future__ import annotations

from pathlib import Path

from clipgen.storage.output_folder import output_folder as output_folder


def free_folder(folder: Path, pattern: str) -> Path:
    """Return the folder, or the first of FOLDER-2, FOLDER-3, ..., that holds no file that matches a pattern."""
    name = folder.name.strip(".") or "samples"
    candidate = folder
    number = 1
    while any(candidate.glob(pattern)):
        number += 1
        candidate = folder.parent / f"{name}-{number}"
    return candidate
