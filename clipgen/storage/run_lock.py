"""Lock files, so that one process at a time writes to a folder, also on network file systems."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from clipgen.storage.files import is_running, retry

logger = logging.getLogger(__name__)
LOCK = ".lock"
# Seconds after which the holder of a lock updates its modification time.
HEARTBEAT = 15.0
# Seconds without an update after which a holder that cannot be looked up is assumed dead.
TIMEOUT = 90.0
# Number of characters of a lock file that are read.
MAX_LOCK = 10_000


@contextmanager
def hold_lock(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Keep a lock file for the work inside the ``with``.

    The lock of a dead process is taken over. A process on this machine is looked up; a process on another machine, or
    on a system that does not report its start time, is assumed dead if it has not updated its lock for ``TIMEOUT``
    seconds.

    Args:
        folder: the folder that is locked.
        name: name of the lock file.

    Raises:
        FileExistsError: another process has the lock.
    """
    path = folder / name
    record = holder_record()
    while not create_lock(path, record):
        remove_if_dead(path, folder)
    done = threading.Event()
    thread = threading.Thread(target=renew_lock, args=(path, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if read_lock(path) == record:
            # If a reader prevents it on Windows, the lock is that of a dead process when this one ends.
            with suppress(PermissionError):
                retry(lambda: path.unlink(missing_ok=True))


def holder_record() -> dict[str, Any]:
    """Return the content of this process's lock files."""
    return {
        "pid": os.getpid(),
        "started": start_time(os.getpid()),
        "process_table": process_table(),
        "host": socket.gethostname(),
        "since": datetime.now().isoformat(" ", "seconds"),
    }


def create_lock(path: Path, record: dict[str, Any]) -> bool:
    """Create a lock file together with its content in one step; return False if it exists."""
    temporary = unique_path(path, "new")
    try:
        try:
            temporary.write_text(json.dumps(record), encoding="utf-8")
        except OSError as error:
            # The system's error in the middle of a write, such as a full disk, does not name the file.
            raise OSError(error.errno, error.strerror, str(path)) from error
        return link_lock(temporary, path, record)
    finally:
        temporary.unlink(missing_ok=True)


def link_lock(temporary: Path, path: Path, record: dict[str, Any]) -> bool:
    """Give a written lock file its name; return False if the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        # The file system has no hard links.
        return create_exclusively(path, record)
    return True


def unique_path(path: Path, suffix: str) -> Path:
    """Return a path next to a lock file that no other thread or process uses."""
    return path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.{suffix}")


def create_exclusively(path: Path, record: dict[str, Any]) -> bool:
    """Create a lock file and then write its content; return False if it exists."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(record))
    except FileExistsError:
        return False
    return True


def remove_if_dead(path: Path, folder: Path) -> None:
    """Remove the lock of a dead process; raise FileExistsError if the process is alive."""
    holder = read_lock(path)
    if holder is None:
        return  # released in the meantime
    if is_alive(holder, path):
        process = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
        raise FileExistsError(
            f"output must not be in use, got {folder}, which {process} writes to: wait for it, stop it, or give "
            "another output"
        )
    with folder_mutex(folder):
        if read_lock(path) != holder:
            return  # another process has already replaced the lock by its own
        # If the file system has no locks of its own, only one of several processes can rename the lock.
        renamed = unique_path(path, "dead")
        with suppress(FileNotFoundError):
            retry(lambda: path.rename(renamed))
            retry(renamed.unlink)


@contextmanager
def folder_mutex(folder: Path) -> Iterator[None]:
    """Let one process or thread of this machine at a time into the ``with``, where the system supports it."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_lock(path: Path) -> dict[str, Any] | None:
    """Read a lock file; return None if it does not exist, and an empty record if it is damaged."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise FileExistsError(f"{path} must be the lock file of a run, got something else: remove it")
    try:
        with path.open(encoding="utf-8") as file:
            record = json.loads(file.read(MAX_LOCK))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        record = {}
    return record if isinstance(record, dict) else {}


def is_alive(holder: dict[str, Any], path: Path) -> bool:
    """Return whether the holder of a lock is running.

    If it is on another machine, or its id may be that of a later process, wait for an update of the lock.
    """
    pid = holder.get("pid")
    if holder.get("process_table") == process_table() and isinstance(pid, int):
        started = start_time(pid)
        if not is_running(pid) or started != holder.get("started"):
            return False
        if started:
            return True
    logger.info("%s: waiting to see if process %s on %s is alive", path, pid, holder.get("host"))
    last_update = modification_time(path)
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        time.sleep(min(1.0, TIMEOUT / 10))
        if modification_time(path) != last_update:
            return path.exists()
    return False


def start_time(pid: int) -> str:
    """Return the start time of a process, which distinguishes it from a later one with the same id; "" if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    state = fields[0]
    return "" if state == "Z" else fields[19]


def process_table() -> str:
    """Return a name of the scope of process ids: the machine, its last boot, and the container."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def modification_time(path: Path) -> int:
    """Return the time of the last update of a lock, by the clock of the file server; 0 if it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def renew_lock(path: Path, done: threading.Event) -> None:
    """Update the modification time of a lock until the work is done."""
    while not done.wait(HEARTBEAT):
        with suppress(OSError):
            os.utime(path)
