"""Read numbers from environment variables, such as those of torchrun and SLURM."""

from __future__ import annotations

import os


def environment_int(name: str, default: int | None = None) -> int:
    """Return the whole number in an environment variable.

    Args:
        name: the variable.
        default: value if the variable is not set or empty; None requires it.

    Raises:
        ValueError: the variable holds something else; the message names it.
    """
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"the environment variable {name} must be a whole number, got {text[:60]!r}") from error
