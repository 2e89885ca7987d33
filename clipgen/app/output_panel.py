"""The part of the page that shows the generated images."""

from __future__ import annotations

from typing import Any, NamedTuple

import gradio as gr

from clipgen.app.limits import MAX_AGE
from clipgen.app.messages import status

WELCOME = "Write a prompt, or choose an example, and press Generate."


class OutputPanel(NamedTuple):
    """The components that show what was generated.

    Args:
        stop: stops the request.
        status: its state in words.
        gallery: its images.
        sheet: all images of a sweep on one image.
        results: state; the complete images of the gallery.
        details: the part about the chosen image.
        table: its settings.
        again: generates it again.
        more: generates images with its settings and another seed.
        variations: generates images with it as the prompt.
        download: its file.
        selected: state; the number of the chosen image.
    """

    stop: gr.Button
    status: gr.HTML
    gallery: gr.Gallery
    sheet: gr.Image
    results: gr.State
    details: gr.Column
    table: gr.HTML
    again: gr.Button
    more: gr.Button
    variations: gr.Button
    download: gr.DownloadButton
    selected: gr.State

    @property
    def shown(self) -> list[Any]:
        """The components that a running request updates, in the order of ``show_update``."""
        return [self.status, self.gallery, self.sheet, self.results, self.details]


def output_panel() -> OutputPanel:
    """Add the part of the page that shows the generated images."""
    with gr.Row():
        message = gr.HTML(status(WELCOME), padding=False, elem_id="status")
        stop = gr.Button("Stop", variant="stop", scale=0, min_width=90, elem_id="stop")
    gallery = image_gallery()
    sheet = sweep_sheet()
    results = gr.State([], time_to_live=MAX_AGE)
    with gr.Column(visible=False, elem_id="details") as details:
        table = gr.HTML(padding=False)
        buttons = result_buttons()
    selected = gr.State(0, time_to_live=MAX_AGE)
    return OutputPanel(stop, message, gallery, sheet, results, details, table, *buttons, selected)


def image_gallery() -> gr.Gallery:
    """Add the generated images."""
    return gr.Gallery(
        label="Images",
        show_label=False,
        format="png",
        columns=2,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        buttons=["fullscreen"],
        interactive=False,
        elem_id="gallery",
        elem_classes=["generated"],
    )


def sweep_sheet() -> gr.Image:
    """Add the sheet of a sweep."""
    return gr.Image(
        label="Sheet",
        format="png",
        visible=False,
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id="sheet",
    )


def result_buttons() -> tuple[gr.Button, gr.Button, gr.Button, gr.DownloadButton]:
    """Add the buttons of the chosen image: again, more, variations, download."""
    with gr.Row():
        again = gr.Button("Again", size="sm", min_width=100, elem_id="again")
        more = gr.Button("More like this", size="sm", min_width=140, elem_id="more")
        variations = gr.Button("Variations of this", size="sm", min_width=160, elem_id="variations")
        download = gr.DownloadButton("Download PNG", size="sm", min_width=140, elem_id="download")
    return again, more, variations, download
