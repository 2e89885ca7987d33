"""The component for an image that a visitor uploads."""

from __future__ import annotations

import gradio as gr


def image_upload(label: str) -> gr.Image:
    """Return a component that accepts an image, and passes on the path of its file."""
    component = gr.Image(label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=240)
    # Gradio would open the file, with error messages that no visitor understands.
    component.preprocess = uploaded_path  # type: ignore[method-assign,assignment,unused-ignore]
    return component


def uploaded_path(payload: gr.FileData | None) -> str | None:
    """Return the path of an uploaded file; None if nothing was uploaded."""
    return payload.path if payload else None
