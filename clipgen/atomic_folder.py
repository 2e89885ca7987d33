"""Replacing a folder by a new version at once, so that a killed process leaves the old or the new, never a mixture.

``replace_folder`` writes the new version to ``.NAME.NODE.PID.xxx.partial`` beside the folder, or inside it where it
holds other things too. Where the system can exchange two folders (Linux: ``renameat2``), it exchanges the whole folder.
Otherwise the entries are moved one by one, under a name that ends in ``.swapping``: ``finish_swap``, which every load
and save begins with, completes the moves that a killed process did not come to.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from clipgen.files import flush_to_disk, read_json, with_path_in_errors, write_json

NAMES = "names.json"  # of the new entries, in a folder whose moves have begun
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<node>[\w-]+)\.(?P<pid>\d+)\.\w+\.(?P<state>partial|swapping)")
RENAME_EXCHANGE = 2
AT_FDCWD = -100


@contextmanager
def replace_folder(path: str | Path, entries: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder to fill; at the end it replaces ``path``, and is removed on an error.

    Args:
        entries: the names that the folder may hold. Those that the new version lacks are removed; everything else in
            ``path`` stays where it is.
    """
    path = Path(path).expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    finish_swap(path)
    clear_leftovers(path)
    inside = path.is_dir() and not replaceable(path, entries)
    staging = stage(path, path if inside else path.parent)
    try:
        with with_path_in_errors(path):
            (staging / "new").mkdir()
            yield staging / "new"
            flush(staging / "new")
            staging = put(path, staging, entries)
    finally:
        if staging.suffix == ".partial":
            shutil.rmtree(staging, ignore_errors=True)


def replaceable(path: Path, entries: Collection[str]) -> bool:
    """Return whether a folder can be exchanged as a whole: it holds nothing else, and no process stands in it."""
    foreign = {entry.name for entry in path.iterdir()} - set(entries)
    current = Path.cwd()
    pinned = os.path.ismount(path) or path in (current, *current.parents)
    return not foreign and not pinned and os.access(path.parent, os.W_OK)


def stage(path: Path, place: Path) -> Path:
    """Make the temporary folder, whose name says which process it belongs to."""
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.{node()}.{os.getpid()}.", suffix=".partial", dir=place))


def put(path: Path, staging: Path, entries: Collection[str]) -> Path:
    """Put the finished new version in its place; return where the old one is, to be removed."""
    new = staging / "new"
    if not path.exists():
        new.rename(path)
    elif staging.parent == path or not exchange(new, path):
        staging = move_entries(path, staging, entries)
    flush_to_disk(path.parent)
    return staging


def exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; return False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or an old C library
        return False
    shutil.copymode(second, first)
    if rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM, errno.EBUSY):
        return False
    raise OSError(code, os.strerror(code), str(second))


def move_entries(path: Path, staging: Path, entries: Collection[str]) -> Path:
    """Move the new entries in and the old ones out, after a step from which ``finish_swap`` can go on."""
    names = [entry.name for entry in (staging / "new").iterdir()]
    write_json(staging / NAMES, {"names": sorted(names), "entries": sorted({*entries, *names})})
    (staging / "old").mkdir()
    swapping = staging.rename(staging.with_suffix(".swapping"))
    flush_to_disk(swapping.parent)
    try:
        complete(path, swapping)
    except OSError:
        undo(path, swapping)
        swapping.rename(staging)
        raise
    return swapping.rename(staging)


def read_names(swapping: Path) -> tuple[list[str], list[str]]:
    """Read the names of the new entries, and of all that are replaced or removed."""
    content = read_json(swapping / NAMES, "names", "entries")
    for name in [*content["names"], *content["entries"]]:
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"{swapping / NAMES} must hold names without folders, got {name!r:.80}")
    return content["names"], content["entries"]


def complete(path: Path, swapping: Path) -> None:
    """Do those of the moves that are not done yet."""
    names, entries = read_names(swapping)
    for name in entries:
        new, old, current = swapping / "new" / name, swapping / "old" / name, path / name
        waits = exists(new)
        if exists(current) and (waits or name not in names):
            current.rename(old)
        if waits:
            new.rename(current)
    flush_to_disk(path)


def undo(path: Path, swapping: Path) -> None:
    """Take back those of the moves that are done."""
    names, entries = read_names(swapping)
    for name in entries:
        new, old, current = swapping / "new" / name, swapping / "old" / name, path / name
        if name in names and exists(current) and not exists(new):
            current.rename(new)
        if exists(old):
            old.rename(current)


def exists(path: Path) -> bool:
    """Return whether there is anything under a name, a dangling link too."""
    return os.path.lexists(path)


def finish_swap(path: str | Path) -> None:
    """Complete the moves that a killed ``replace_folder`` did not come to."""
    path = Path(path).expanduser().resolve()
    for left in leftovers(path, "swapping"):
        parts = [left / "new", left / "old"]
        if any(part.is_symlink() or not part.is_dir() for part in parts):  # not ours
            continue
        with with_path_in_errors(path):
            complete(path, left)
        shutil.rmtree(left, ignore_errors=True)


def clear_leftovers(path: str | Path) -> None:
    """Remove the unfinished new versions of ``path`` that killed processes left."""
    for left in leftovers(Path(path).expanduser().resolve(), "partial"):
        shutil.rmtree(left, ignore_errors=True)


def leftovers(path: Path, state: str) -> list[Path]:
    """Return the temporary folders of ``path`` whose process, on this machine, has ended."""
    places = [place for place in (path.parent, path) if place.is_dir()]
    found = []
    for place in places:
        for entry in place.glob(f".{glob.escape(path.name)}.*.{state}"):
            match = LEFTOVER.fullmatch(entry.name)
            ours = match and match["name"] == path.name and match["node"] == node()
            if match and ours and entry.is_dir() and not entry.is_symlink() and not running(int(match["pid"]), state):
                found.append(entry)
    return found


def node() -> str:
    """Return the machine's name, as it stands in the names of temporary folders."""
    return re.sub(r"[^\w-]", "-", platform.node()) or "unknown"


def running(pid: int, state: str) -> bool:
    """Return whether the process of a temporary folder still works on it."""
    if pid == os.getpid():  # moves of this process that failed wait; another thread may be writing
        return state == "partial"
    if os.name == "nt":  # where os.kill ends the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


def flush(folder: Path) -> None:
    """Flush all files and folders below a folder to the disk."""
    for parent, _, files in os.walk(folder):
        for name in files:
            flush_to_disk(Path(parent) / name)
        flush_to_disk(Path(parent))
