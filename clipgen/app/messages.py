"""Sentences that the page shows about the state of a request."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from html import escape

from clipgen.errors import EXPECTED, error_line

logger = logging.getLogger(__name__)


def status(text: str, notes: Iterable[str] = ()) -> str:
    """Return a line about the state of a request, and notes below it, as HTML that screen readers announce."""
    lines = "".join(f"<div class='note'>{escape(note)}</div>" for note in notes)
    return f"<div class='status' role='status' aria-live='polite'>{escape(text)}{lines}</div>"


def error_status(error: Exception) -> str:
    """Return an error as a sentence. Errors that a visitor cannot cause are logged with their traceback."""
    if isinstance(error, EXPECTED):
        text = error_line(error)
    else:
        logger.error("A request of the web page failed", exc_info=error)
        text = f"the server failed ({type(error).__name__}); its log contains the traceback"
    # The name of a model or of a setting stays as it is.
    start = text[:1].upper() if text.split(maxsplit=1)[0].isalpha() else text[:1]
    sentence = start + text[1:].rstrip(".") + "."
    return f"<div class='status error' role='alert'>{escape(sentence)}</div>"
