"""A folder that one process at a time may write to."""

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

logger = logging.getLogger(__name__)
LOCK = ".lock"
HEARTBEAT = 15.0  # seconds after which a holder renews the time of its lock
SILENCE = 90.0  # seconds without that, after which a holder on another machine counts as dead


@contextmanager
def claimed(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Hold the lock file ``name`` of a folder for the work inside the ``with``.

    The lock of a process of this machine that is dead is taken over. On another machine, which cannot be asked, a
    process counts as dead when it has not renewed its lock for ``SILENCE`` seconds.

    Raises:
        FileExistsError: another process holds it.
    """
    path = folder / name
    record = {
        "pid": os.getpid(),
        "started": start_time(os.getpid()),
        "place": process_table(),
        "host": socket.gethostname(),
        "since": datetime.now().isoformat(" ", "seconds"),
    }
    while not create(path, record):
        take_away_if_dead(path, folder)
    done = threading.Event()
    thread = threading.Thread(target=renew, args=(path, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if read(path) == record:
            path.unlink(missing_ok=True)


def create(path: Path, record: dict[str, Any]) -> bool:
    """Write a lock file in one step, complete from the beginning; return False if there is one."""
    own = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.new")
    try:
        own.write_text(json.dumps(record), encoding="utf-8")
        try:
            os.link(own, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return create_exclusively(path, record)
        return True
    finally:
        own.unlink(missing_ok=True)


def create_exclusively(path: Path, record: dict[str, Any]) -> bool:
    """Write a lock file by opening it for the first time; return False if there is one."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(record))
    except FileExistsError:
        return False
    return True


def take_away_if_dead(path: Path, folder: Path) -> None:
    """Remove the lock of a process that is dead; raise FileExistsError if it is alive."""
    holder = read(path)
    if holder is None:
        return  # released in the meantime
    if alive(holder, path):
        who = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
        raise FileExistsError(
            f"output must not be in use, got {folder}, which {who} writes to: wait for it, stop it, or give another "
            "output"
        )
    # of several processes that found it dead, one renames it
    aside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.dead")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if read(aside) != holder:  # another one was quicker, and this is its lock
            with suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def read(path: Path) -> dict[str, Any] | None:
    """Read a lock file; None if there is none. A damaged one is one of nobody."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        record = {}
    return record if isinstance(record, dict) else {}


def alive(holder: dict[str, Any], path: Path) -> bool:
    """Return True if the process of a lock is running."""
    pid = holder.get("pid")
    if holder.get("place") == process_table() and isinstance(pid, int):
        return exists(pid) and start_time(pid) == holder.get("started")
    logger.info("%s: waiting to see if process %s on %s is alive", path, pid, holder.get("host"))
    renewed, deadline = time_of(path), time.monotonic() + SILENCE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENCE / 10))
        if time_of(path) != renewed:
            return path.exists()
    return False


def exists(pid: int) -> bool:
    """Return True if there is a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def start_time(pid: int) -> str:
    """Return when a process was started, which tells it from a later one of the same number; "" if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def process_table() -> str:
    """Return a name of what numbers processes here: this start of this machine, and its container."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def time_of(path: Path) -> int:
    """Return when a lock was renewed, by the file server's clock; 0 if it is gone."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def renew(path: Path, done: threading.Event) -> None:
    """Renew the time of a lock until its work is done."""
    while not done.wait(HEARTBEAT):
        with suppress(OSError):
            os.utime(path)
