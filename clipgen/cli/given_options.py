"""Options of argparse whose default is None, so that it is known whether they were given on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Namespace


def option_name(name: str) -> str:
    """Return the option of an argument: ``"top_k"`` -> ``"--top-k"``."""
    return f"--{name.replace('_', '-')}"


def is_given(args: Namespace, name: str) -> bool:
    """Return whether an option was given; the default of one without a value is False."""
    value = getattr(args, name)
    return value is not None and value is not False


def fill_defaults(args: Namespace, defaults: Mapping[str, Any]) -> None:
    """Set the options of the parser that were not given to their defaults."""
    for name, default in defaults.items():
        if getattr(args, name, default) is None:
            setattr(args, name, default)
