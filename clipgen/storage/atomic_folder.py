"""Atomic replacement of a folder: an interrupted process leaves the old version or the new one, never a mixture.

``replace_folder`` writes the new version to ``.NAME.HOST.PID.xxx.partial`` next to the folder, or inside it if the
folder also contains other files. If the system can exchange two folders (Linux: ``renameat2``), the whole folder is
exchanged. Otherwise the entries are moved one by one from a folder whose name ends in ``.swapping``; every load and
save first calls ``finish_swap``, which completes interrupted moves.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from clipgen.storage.files import flush_to_disk, host_name, is_running, read_json, with_path_in_errors, write_json

# File that lists the new entries, in a folder whose moves have started.
NAMES_FILE = "names.json"
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<host>[\w-]+)\.(?P<pid>\d+)\.\w+\.(?P<state>partial|swapping)")
RENAME_EXCHANGE = 2
AT_FDCWD = -100


@contextmanager
def replace_folder(path: str | Path, entries: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder to fill; it replaces ``path`` at the end, and is removed on an error.

    Args:
        path: folder to replace.
        entries: names that belong to the folder. Those that the new version lacks are removed; all other files in
            ``path`` are kept.
    """
    path = Path(path).expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    finish_swap(path)
    clear_leftovers(path)
    inside = path.is_dir() and not can_exchange(path, entries)
    staging = make_staging(path, path if inside else path.parent)
    try:
        with with_path_in_errors(path):
            (staging / "new").mkdir()
            yield staging / "new"
            flush_tree(staging / "new")
            staging = install(path, staging, entries)
    finally:
        if staging.suffix == ".partial":
            shutil.rmtree(staging, ignore_errors=True)


def can_exchange(path: Path, entries: Collection[str]) -> bool:
    """Return whether a folder can be exchanged as a whole: it has no other files and is not the working directory."""
    foreign = {entry.name for entry in path.iterdir()} - set(entries)
    current = Path.cwd()
    pinned = os.path.ismount(path) or path in (current, *current.parents)
    return not foreign and not pinned and os.access(path.parent, os.W_OK)


def make_staging(path: Path, place: Path) -> Path:
    """Create the temporary folder, whose name contains the host and the process."""
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.{host_name()}.{os.getpid()}.", suffix=".partial", dir=place))


def install(path: Path, staging: Path, entries: Collection[str]) -> Path:
    """Move the finished new version into place; return the folder with the old one, to be removed."""
    new = staging / "new"
    if not path.exists():
        new.rename(path)
    elif staging.parent == path or not exchange(new, path):
        staging = move_entries(path, staging, entries)
    flush_to_disk(path.parent)
    return staging


def exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; return False if the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        # Not Linux, or an old C library.
        return False
    shutil.copymode(second, first)
    if rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM, errno.EBUSY):
        return False
    raise OSError(code, os.strerror(code), str(second))


def move_entries(path: Path, staging: Path, entries: Collection[str]) -> Path:
    """Move the new entries in and the old ones out, so that ``finish_swap`` can resume if this is interrupted."""
    names = [entry.name for entry in (staging / "new").iterdir()]
    write_json(staging / NAMES_FILE, {"names": sorted(names), "entries": sorted({*entries, *names})})
    (staging / "old").mkdir()
    swapping = staging.rename(staging.with_suffix(".swapping"))
    flush_to_disk(swapping.parent)
    try:
        finish_moves(path, swapping)
    except OSError:
        undo_moves(path, swapping)
        swapping.rename(staging)
        raise
    return swapping.rename(staging)


def read_entry_names(swapping: Path) -> tuple[list[str], list[str]]:
    """Read the names of the new entries, and the names of all entries that are replaced or removed."""
    content = read_json(swapping / NAMES_FILE, "names", "entries")
    for name in [*content["names"], *content["entries"]]:
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"{swapping / NAMES_FILE} must contain names without folders, got {name!r:.80}")
    return content["names"], content["entries"]


def entry_paths(path: Path, swapping: Path, name: str) -> tuple[Path, Path, Path]:
    """Return the paths of an entry: in the new version, in the old version, and in the folder that is replaced."""
    return swapping / "new" / name, swapping / "old" / name, path / name


def finish_moves(path: Path, swapping: Path) -> None:
    """Make the moves that have not been made yet."""
    names, entries = read_entry_names(swapping)
    for name in entries:
        new, old, current = entry_paths(path, swapping, name)
        is_pending = lexists(new)
        if lexists(current) and (is_pending or name not in names):
            current.rename(old)
        if is_pending:
            new.rename(current)
    flush_to_disk(path)


def undo_moves(path: Path, swapping: Path) -> None:
    """Undo the moves that have been made."""
    names, entries = read_entry_names(swapping)
    for name in entries:
        new, old, current = entry_paths(path, swapping, name)
        if name in names and lexists(current) and not lexists(new):
            current.rename(new)
        if lexists(old):
            old.rename(current)


def lexists(path: Path) -> bool:
    """Return whether a path exists; a dangling link does."""
    return os.path.lexists(path)


def finish_swap(path: str | Path) -> None:
    """Complete the moves of an interrupted ``replace_folder``."""
    path = Path(path).expanduser().resolve()
    for left in leftovers(path, "swapping"):
        parts = [left / "new", left / "old"]
        # Not written by ``replace_folder``.
        if any(part.is_symlink() or not part.is_dir() for part in parts):
            continue
        with with_path_in_errors(path):
            finish_moves(path, left)
        shutil.rmtree(left, ignore_errors=True)


def clear_leftovers(path: str | Path) -> None:
    """Remove unfinished new versions of ``path`` that interrupted processes left."""
    for left in leftovers(Path(path).expanduser().resolve(), "partial"):
        shutil.rmtree(left, ignore_errors=True)


def leftovers(path: Path, state: str) -> list[Path]:
    """Return the temporary folders of ``path`` whose process, on this host, has ended."""
    places = [place for place in (path.parent, path) if place.is_dir()]
    paths = []
    for place in places:
        for entry in place.glob(f".{glob.escape(path.name)}.*.{state}"):
            match = LEFTOVER.fullmatch(entry.name)
            ours = match and match["name"] == path.name and match["host"] == host_name()
            if match and ours and entry.is_dir() and not entry.is_symlink() and not in_use(int(match["pid"]), state):
                paths.append(entry)
    return paths


def in_use(pid: int, state: str) -> bool:
    """Return whether the process of a temporary folder is still working on it."""
    # Interrupted moves of this process can be completed; another of its threads may still be writing a new version.
    if pid == os.getpid():
        return state == "partial"
    return is_running(pid)


def flush_tree(folder: Path) -> None:
    """Flush all files and folders below a folder to disk."""
    for parent, _, files in os.walk(folder):
        for name in files:
            flush_to_disk(Path(parent) / name)
        flush_to_disk(Path(parent))
