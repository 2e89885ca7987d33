"""Galleries: the prompts and sampling settings of the paper's figures, as data files with their sources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clipgen.storage.files import natural_key, read_mapping

GALLERIES = Path(__file__).parent / "galleries"


class GalleryPrompt(NamedTuple):
    """A prompt of a figure.

    Args:
        text: the prompt.
        label: caption below its images on the sheet.
        source: source of the prompt.
    """

    text: str
    label: str
    source: str


@dataclass(frozen=True)
class Gallery:
    """The prompts and settings of a figure.

    Args:
        name: name of the figure, such as ``fig5``.
        title: the figure in a few words.
        source: source of the figure, and the words in it that are not its own.
        prompts: the prompts.
        settings: sampling parameters, each of which generates all prompts; empty if the figure does not vary them.
    """

    name: str
    title: str
    source: str
    prompts: list[GalleryPrompt]
    settings: list[dict[str, Any]]

    @property
    def varied(self) -> list[str]:
        """Names of the sampling parameters that the figure varies."""
        return list(self.settings[0]) if self.settings else []


def gallery_names() -> list[str]:
    """Return the names of the galleries, in the order of the figures."""
    return sorted((path.stem for path in GALLERIES.glob("*.yaml")), key=natural_key)


def load_gallery(name: str) -> Gallery:
    """Load a gallery.

    Raises:
        ValueError: the gallery is unknown.
    """
    names = gallery_names()
    if name not in names:
        raise ValueError(f"gallery must be one of {', '.join(names)}, got {name!r}")
    content = read_mapping(GALLERIES / f"{name}.yaml")
    prompts = []
    for entry in content["prompts"]:
        label = f"{entry['text']} (after {entry['after']})" if "after" in entry else entry["text"]
        prompts.append(GalleryPrompt(entry["text"], label, entry["source"]))
    return Gallery(name, content["title"], content["source"], prompts, content.get("settings", []))
