"""Where a command writes to: file names, and a folder that is checked before the work and removed if it fails."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from clipgen.cli.run_lock import LOCK, claimed


@contextmanager
def output_folder(folder: Path, keep: str = "", lock: str | None = LOCK) -> Iterator[None]:
    """Make a folder for the work inside the ``with``; where that fails and the folder was new, it is removed.

    Args:
        keep: pattern of files that are worth keeping although the work failed.
        lock: name of the lock file that is held meanwhile; None shares the folder with other processes.

    Raises:
        OSError: nothing can be written there, or another process holds the lock.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]  # innermost first
    try:
        check_writable(folder)
        with claimed(folder, lock) if lock else nullcontext():
            # asked under the lock: another process may have finished its work there
            ours = all(path.name.startswith(LOCK) for path in folder.iterdir())
            with removed_on_failure(folder, keep) if ours else nullcontext():
                yield
    except BaseException:
        with suppress(OSError):  # others may have begun to use them
            for path in filter(Path.exists, new):
                path.rmdir()
        raise


@contextmanager
def removed_on_failure(folder: Path, keep: str) -> Iterator[None]:
    """Remove a folder with all that is in it if the work inside the ``with`` fails."""
    try:
        yield
    except BaseException:
        if not (keep and any(folder.glob(keep))):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def check_writable(folder: Path) -> None:
    """Make a folder, and raise OSError unless files can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise OSError(f"output must be a folder that can be written to, got {folder}: {error.strerror}") from error


def file_name(*parts: str) -> str:
    """The name of a picture, of what makes it; empty parts are left out."""
    return "_".join(filter(None, map(slug, parts))) + ".png"


def slug(prompt: str) -> str:
    """A prompt as part of a file name, of which systems take 255 bytes."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60].encode()[:100].decode(errors="ignore")
