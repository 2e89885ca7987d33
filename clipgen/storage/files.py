"""Atomic writes of files that survive a power loss, readers of text, JSON and YAML, and errors that name the file."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

IS_WINDOWS = os.name == "nt"
MAX_JSON = 64 * 2**20  # bytes; parsed JSON takes 10 to 30 times as much memory
MAX_YAML = 2**20
MAX_JSON_VALUES = 4_000_000  # values take 65 bytes and more each, also if a file stores them in two
PARTIAL_FILE = re.compile(r"\..+\.(?P<host>[\w-]+)\.(?P<pid>\d+)\.partial")
# Windows does not rename or remove a file that another process, such as a virus scanner, has open.
ATTEMPTS = 10 if IS_WINDOWS else 1
ATTEMPT_INTERVAL = 0.1  # seconds
# Constants of the Windows API.
SYNCHRONIZE = 0x100000
WAIT_TIMEOUT = 0x102
ERROR_ACCESS_DENIED = 5
_cleaned_folders: set[Path] = set()


@contextmanager
def with_path_in_errors(path: Path) -> Iterator[None]:
    """Add the path to an OSError raised inside: errors during a write (a full disk) do not name the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; it replaces ``path`` at the end, and is removed on an error.

    Temporary files of interrupted processes are removed at the first write into their folder.
    """
    path = Path(path)
    remove_partial_files(path.parent)
    partial = path.with_name(f".{path.name}.{host_name()}.{os.getpid()}.partial")
    try:
        with with_path_in_errors(path):
            yield partial
            flush_to_disk(partial)
            retry(lambda: partial.replace(path))
            flush_to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def retry(operation: Callable[[], Any]) -> None:
    """Rename or remove a file, with further attempts on Windows while another process has it open."""
    for _ in range(ATTEMPTS - 1):
        try:
            operation()
            return
        except PermissionError:
            time.sleep(ATTEMPT_INTERVAL)
    operation()


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files that interrupted processes of this host left in a folder, once per process."""
    if folder in _cleaned_folders or not folder.is_dir():
        return
    _cleaned_folders.add(folder)
    for entry in folder.glob(".*.partial"):
        match = PARTIAL_FILE.fullmatch(entry.name)
        if match and match["host"] == host_name() and entry.is_file() and not is_running(int(match["pid"])):
            entry.unlink(missing_ok=True)


def user_path(text: str) -> Path:
    """Return a path given by a user; ``~`` becomes the home directory, which shells do not do after ``--option=``."""
    return Path(os.path.expanduser(text))


def host_name() -> str:
    """Return the name of this host as part of a file name."""
    return re.sub(r"[^\w-]", "-", platform.node()) or "unknown"


def is_running(pid: int) -> bool:
    """Return whether a process of this host exists."""
    if IS_WINDOWS:
        return is_running_on_windows(pid)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        # The process of another user.
        return True
    return True


def is_running_on_windows(pid: int) -> bool:
    """Return whether a process of this Windows host exists: ``os.kill`` would end it."""
    # Ids have 32 bits, and ctypes refuses larger ones.
    if not 0 <= pid < 2**32:
        return False
    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]  # exists on Windows only
    process = kernel32.OpenProcess(SYNCHRONIZE, False, pid)
    if not process:
        # The process of another user.
        return bool(ctypes.get_last_error() == ERROR_ACCESS_DENIED)  # type: ignore[attr-defined]
    try:
        # A process that has ended remains while another one has it open.
        return bool(kernel32.WaitForSingleObject(process, 0) == WAIT_TIMEOUT)
    finally:
        kernel32.CloseHandle(process)


def flush_to_disk(path: Path) -> None:
    """Flush a file or folder to the disk, so that after a power loss its content exists if its name does."""
    # Windows cannot open folders.
    if path.is_dir() and IS_WINDOWS:
        return
    handle = os.open(path, os.O_RDWR if IS_WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems cannot flush a folder, and devices cannot be flushed.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.EBADF):
            raise
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """Return the folder of results that can be computed again: ``$CLIPGEN_CACHE`` or ``~/.cache/clipgen``."""
    return Path(os.environ.get("CLIPGEN_CACHE", "~/.cache/clipgen")).expanduser()


def write_json(path: str | Path, content: Any) -> None:
    """Write indented JSON atomically."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is not UTF-8.
    """
    return decode_text(path.read_bytes(), path)


def decode_text(content: bytes, path: Path) -> str:
    """Decode the content of a text file, see ``read_text``. Line ends become ``\\n``."""
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is damaged, too large or nested too deeply, or lacks a key; the message names it.
    """
    content = read_json_value(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it contains a {type(content).__name__}, not an object")
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {missing[0]!r}")
    return content


def read_json_value(path: Path) -> Any:
    """Read any JSON value.

    Raises:
        ValueError: the file is damaged, too large or nested too deeply; the message names it.
    """
    check_size(path, MAX_JSON)
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        # Not JSON, or not UTF-8.
        raise ValueError(f"{path} is damaged: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: its values are nested too deeply") from error


def parse_json(text: str, max_values: int = MAX_JSON_VALUES) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, or contains more than ``max_values`` values.
        RecursionError: its values are nested too deeply.
    """
    # Commas in texts are also counted, for which the limit leaves room.
    num_values = text.count(",") + text.count("[") + text.count("{")
    if num_values > max_values:
        raise ValueError(f"it must contain at most {max_values} values, got about {num_values}")
    return json.loads(text)


def read_yaml(path: Path) -> Any:
    """Read plain YAML, without tags and without aliases, by which a small file can fill the memory.

    Raises:
        ValueError: the file is damaged, too large or nested too deeply, or contains a tag or an alias; the message
            names it.
    """
    # Imported here: generating images with a bundled model does not need it.
    import yaml

    class PlainLoader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                line = self.peek_event().start_mark.line + 1
                raise yaml.YAMLError(f"aliases (*name) are not allowed, got one in line {line}")
            return super().compose_node(parent, index)

    check_size(path, MAX_YAML)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), PlainLoader)
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: not UTF-8, or an impossible date.
        raise ValueError(f"{path} is damaged: {one_line(error)}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: its values are nested too deeply") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that contains a mapping.

    Raises:
        ValueError: it contains something else, or ``read_yaml`` refuses it.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain a mapping, got a {type(content).__name__}")
    return content


def check_size(path: Path, limit: int) -> None:
    """Raise ValueError if a file is larger than ``limit`` bytes, or a pipe or device, which may have no end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a regular file")
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path} must have at most {limit} bytes, got {size}")


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return the message of an error on one line, cut to ``limit`` characters."""
    return " ".join(str(error).split())[:limit]


def natural_key(path: str) -> tuple[list[Any], str]:
    """Return a sort key for natural order: 2.png before 10.png."""
    return [split_digits(part) for part in path.split("/")], path


def split_digits(name: str) -> list[tuple[str, int, str]]:
    """Split a name into pairs of letters and digits; the length of the digits makes 2 precede 10."""
    pieces = re.split("([0-9]+)", name)
    pairs = []
    for text, digits in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
        number = digits.lstrip("0")
        pairs.append((text, len(number), number))
    return pairs


def printable(text: str) -> str:
    """Escape control and invisible characters as ``repr`` does, so that a terminal does not interpret them."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
