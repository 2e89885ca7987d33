"""Files: written whole or not at all, text, JSON, and errors that name the file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def naming(path: Path) -> Iterator[None]:
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
        with naming(path):
            yield partial
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write indented JSON, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_text(path: Path) -> str:
    """A text file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8: {error}") from error


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON object that clipgen wrote; ValueError with the path where it is damaged, or lacks a key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}, not an object")
    if missing := [key for key in keys if key not in content]:
        raise ValueError(f"{path} is damaged: it lacks {missing[0]!r}")
    return content


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
