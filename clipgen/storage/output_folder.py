"""Output folders, which are checked and locked before the work and removed if it fails."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from clipgen.storage.run_lock import LOCK, hold_lock


@contextmanager
def output_folder(folder: Path, keep_pattern: str = "", lock: str | None = LOCK) -> Iterator[None]:
    """Create and lock a folder for the work inside the ``with``. If the work fails and the folder is new, remove it.

    Args:
        folder: the folder.
        keep_pattern: glob pattern of files for which the folder is kept although the work failed.
        lock: name of the lock file; None shares the folder with other processes.

    Raises:
        OSError: the folder cannot be written to, or another process has the lock.
    """
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]  # innermost first
    try:
        check_writable(folder)
        with hold_lock(folder, lock) if lock else nullcontext():
            # Look under the lock: another process may have finished its work there.
            is_empty = all(path.name.startswith(LOCK) for path in folder.iterdir())
            with removed_on_failure(folder, keep_pattern) if is_empty else nullcontext():
                yield
    except BaseException:
        remove_empty(new_folders)
        raise


@contextmanager
def removed_on_failure(folder: Path, keep_pattern: str) -> Iterator[None]:
    """Remove a folder and its files if the work inside the ``with`` fails."""
    try:
        yield
    except BaseException:
        if not (keep_pattern and any(folder.glob(keep_pattern))):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, up to the first one that another process has begun to use."""
    with suppress(OSError):
        for path in folders:
            if path.exists():
                path.rmdir()


def check_writable(folder: Path) -> None:
    """Create a folder, and raise OSError if no file can be created in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise OSError(f"output must be a folder that can be written to, got {folder}: {error.strerror}") from error


def free_folder(folder: Path, *patterns: str) -> Path:
    """Return the folder, or the first of FOLDER-2, FOLDER-3, ..., in which nothing matches any of the patterns."""
    name = folder.name.strip(".") or "samples"
    candidate = folder
    number = 1
    while any(path for pattern in patterns for path in candidate.glob(pattern)):
        number += 1
        candidate = folder.parent / f"{name}-{number}"
    return candidate
