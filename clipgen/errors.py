"""Errors as one line of text."""

from __future__ import annotations

from clipgen.storage.files import printable

# Errors that a user can cause; the others are bugs.
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError)


def error_line(error: BaseException) -> str:
    """Return an error's message on one line; for an error of the system, its reason and the file."""
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return printable(f"{error.strerror}{place}")
    return printable(" ".join(str(error).split())) or type(error).__name__
