"""Where a command writes to: file names, and a folder that is checked before the work and removed if it fails."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def output_folder(folder: Path, keep: str = "") -> Iterator[None]:
    """Make a folder for the work inside the ``with``; where that fails and the folder was new, it is removed.

    Args:
        keep: pattern of files that are worth keeping although the work failed.

    Raises:
        OSError: nothing can be written there.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]  # innermost first
    ours = folder in new or (folder.is_dir() and not any(folder.iterdir()))
    try:
        check_writable(folder)
        yield
    except BaseException:
        if ours and not (keep and any(folder.glob(keep))):
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # others may have begun to use them
                for parent in new[1:]:
                    parent.rmdir()
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
