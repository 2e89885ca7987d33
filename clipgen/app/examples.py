"""The examples of the page: prompts that the chosen model knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from clipgen.generation.bundled_vocabulary import EXAMPLES, Examples


def sample_rows(examples: Examples) -> list[list[str]]:
    """Return the examples of the tab "Text", as ``gr.Dataset`` takes them."""
    return [[prompt] for prompt in examples.prompts]


def field_values(examples: Examples) -> list[list[Any]]:
    """Return the values of the fields of the tabs "Mix", "Interpolate" and "Sweep"."""
    mixture: list[Any] = []
    for text, weight in examples.mixture:
        mixture += [text, weight]
    return [mixture, list(examples.ends), [examples.prompts[0]]]


def field_updates(examples: Examples, values: Sequence[Any]) -> list[Any]:
    """Return updates of the fields to other examples. The fields of a tab stay if the visitor has changed one of them.

    Args:
        examples: the new examples.
        values: the values of the fields now.
    """
    known = [field_values(other) for other in EXAMPLES.values()]
    updates: list[Any] = []
    for tab, new_values in enumerate(field_values(examples)):
        current = list(values[len(updates) : len(updates) + len(new_values)])
        is_unchanged = any(current == other[tab] for other in known)
        updates += new_values if is_unchanged else [gr.skip()] * len(new_values)
    return updates
