"""Choices that depend on the processor: measured once, and kept in a file of the user's cache folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clipgen.hardware.processor import instruction_set, processor_name
from clipgen.storage.files import cache_folder, read_json, write_json

logger = logging.getLogger(__name__)
KERNEL_FILE = "kernels.json"
_reported_files: set[Path] = set()


def measured_choice(name: str, measure: Callable[[], str]) -> str:
    """Return a choice from the file; if it contains none for this machine, measure it and add it.

    Args:
        name: name of the choice.
        measure: makes the choice.

    Returns:
        The choice, or "" if the file cannot be read or written, since the next process might measure another one.
        With ``CLIPGEN_CACHE=/dev/null`` nothing is measured.
    """
    if cache_folder() == Path(os.devnull):
        return ""
    path = cache_folder() / KERNEL_FILE
    key = f"{machine()}, {name}"
    try:
        choices = read_choices(path)
        if key not in choices:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, choices)  # fails now rather than after the measurement
            measured = measure()
            # Another process may have added choices in the meantime, which stay as they are.
            write_json(path, {key: measured} | read_choices(path))
            choices = read_choices(path)
        return str(choices[key])
    except (OSError, ValueError, KeyError) as error:
        report_once(path, error)
        return ""


def report_once(path: Path, error: Exception) -> None:
    """Log, once per process, that a file cannot keep choices."""
    if path not in _reported_files:
        _reported_files.add(path)
        logger.info("The fastest kernels are not measured, because %s cannot keep them: %s", path, error)


def read_choices(path: Path) -> dict[str, Any]:
    """Return the choices that a file keeps; none if it does not exist."""
    return read_json(path) if path.is_file() else {}


def machine() -> str:
    """Return the parts that the speed of a kernel depends on: processor, instruction set, threads, build of torch."""
    return f"{processor_name()}, {instruction_set()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
