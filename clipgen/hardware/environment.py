"""The environment: numbers in variables, such as those of torchrun and SLURM, and versions of packages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

# Packages whose versions can change results.
PACKAGES = (
    "torch",
    "torchvision",
    "pytorch-lightning",
    "transformers",
    "open_clip_torch",
    "webdataset",
    "hydra-core",
    "huggingface_hub",
    "numpy",
    "pillow",
)


def package_versions() -> dict[str, str]:
    """Return the installed version of each of ``PACKAGES``."""
    return {name: version(name) for name in PACKAGES}


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set a variable inside the ``with``; afterwards it has its previous value, or is not set."""
    previous = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if previous is None:
            del os.environ[name]
        else:
            os.environ[name] = previous


def environment_int(name: str, default: int | None = None) -> int:
    """Return the whole number in an environment variable.

    Args:
        name: the variable.
        default: value if the variable is not set or empty; None requires it.

    Raises:
        ValueError: the variable contains something else; the message names it.
    """
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"the environment variable {name} must be a whole number, got {text[:60]!r}") from error
