"""File names from prompts and other texts."""

from __future__ import annotations

import re


def file_name(*parts: str) -> str:
    """Return the file name of an image from its number, prompt and seed; empty parts are left out."""
    slugs = [slug(part) for part in parts]
    return "_".join(part for part in slugs if part) + ".png"


def slug(prompt: str) -> str:
    """Return a prompt as part of a file name. File systems allow names of 255 bytes."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")
    return words[:60].encode()[:100].decode(errors="ignore")


def underscored(text: str) -> str:
    """Return a text with underscores for all characters but letters and digits; unlike a slug, it is not cut."""
    return re.sub(r"[\W_]", "_", text)
