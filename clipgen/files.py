"""Atomic and flush_to_disk writes of files, readers of text, JSON and YAML, and errors that name the file."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_JSON = 64 * 2**20  # bytes; parsed JSON takes 10 to 30 times as much memory
MAX_YAML = 2**20


@contextmanager
def with_path_in_errors(path: Path) -> Iterator[None]:
    """Add the path to an OSError raised inside: errors in the middle of a write (a full disk) carry none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it replaces ``path`` at the end, or is removed on an error."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with with_path_in_errors(path):
            yield partial
            flush_to_disk(partial)
            partial.replace(path)
            flush_to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Flush a file or folder to the disk: without it, a rename can survive a power loss that its content does not."""
    if path.is_dir() and os.name == "nt":  # Windows does not open folders
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # file systems that cannot flush a folder, and devices
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.EBADF):
            raise
    finally:
        os.close(handle)


def write_json(path: str | Path, content: Any) -> None:
    """Write indented JSON atomically."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_text(path: Path) -> str:
    """A text file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8: {error}") from error


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is damaged, too large or nested too deeply, or lacks a key; the message names it.
    """
    content = parse_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}, not an object")
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {missing[0]!r}")
    return content


def parse_json(path: Path) -> Any:
    """Read any JSON value; ValueError with the path where it is damaged, too large or nested too deeply."""
    check_size(path, MAX_JSON)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is damaged: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: its values are nested too deeply") from error


def read_yaml(path: Path) -> Any:
    """Read plain YAML: no tags, and no aliases, with which a small file can fill the memory.

    Raises:
        ValueError: the file is damaged, too large or nested too deeply, or holds a tag or an alias; the message names
            it.
    """
    import yaml  # the bundled model is drawn from without it

    class PlainLoader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it holds an alias (*name), which is not allowed")
            return super().compose_node(parent, index)

    check_size(path, MAX_YAML)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), PlainLoader)
    except (yaml.YAMLError, ValueError) as error:  # the latter: not UTF-8, or a date that there is not
        raise ValueError(f"{path} is damaged: {one_line(error)}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: its values are nested too deeply") from error


def check_size(path: Path, limit: int) -> None:
    """Raise ValueError if a file is larger than ``limit`` bytes."""
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path} must hold at most {limit} bytes, got {size}")


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's message on one line, cut to ``limit`` characters."""
    return " ".join(str(error).split())[:limit]


def natural_key(path: str) -> tuple[list[Any], str]:
    """Return a sort key that puts paths in the order in which people number files: 2.png before 10.png."""
    key = []
    for part in path.split("/"):
        pieces = re.split("([0-9]+)", part)
        numbers = [digits.lstrip("0") for digits in pieces[1::2]] + [""]
        key.append([(text, len(number), number) for text, number in zip(pieces[::2], numbers, strict=True)])
    return key, path


def printable(text: str) -> str:
    """Return a text with every character that a terminal would obey or hide written as Python's ``repr`` writes it."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
