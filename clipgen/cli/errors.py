"""One sentence instead of a traceback, for everything a user can do wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError)


def guarded(command: str, main: Callable[[], int | None]) -> None:
    """Run ``main`` and exit; print an expected error as ``command: error: sentence``. CLIPGEN_DEBUG=1 shows tracebacks."""
    try:
        code = main()
    except KeyboardInterrupt:
        sys.exit(130)
    except EXPECTED as error:
        if os.environ.get("CLIPGEN_DEBUG"):
            raise
        print(f"{command}: error: {sentence(error)}", file=sys.stderr)
        sys.exit(1)
    sys.exit(code or 0)


def sentence(error: BaseException) -> str:
    """An error's message on one line; for the system's own errors, what and which file."""
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}"
    return " ".join(str(error).split()) or type(error).__name__
