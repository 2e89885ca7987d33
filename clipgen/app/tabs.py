"""The tabs of the page: one per way to ask for images, and one for the tokenizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import gradio as gr

from clipgen.app.examples import sample_rows
from clipgen.app.upload_box import image_upload
from clipgen.bundled import DEFAULT
from clipgen.generation.bundled_vocabulary import EXAMPLES

# Shown until a model is loaded.
DEFAULT_EXAMPLES = EXAMPLES[DEFAULT]
MAX_STEPS = 16


class GeneratingTab(NamedTuple):
    """A tab that generates images.

    Args:
        builder: name of the function in ``clipgen.app.builders`` that makes its request.
        inputs: components whose values the function gets, after the settings.
        button: starts the request.
        upload: a component with an image, which is checked when it is uploaded; None if the tab has no upload.
    """

    builder: str
    inputs: list[Any]
    button: gr.Button
    upload: gr.Image | None = None

    @property
    def texts(self) -> list[gr.Textbox]:
        """The text fields, in which Enter starts the request."""
        return [component for component in self.inputs if isinstance(component, gr.Textbox)]


class TokenizerTab(NamedTuple):
    """The tab of the tokenizer: an image and its reconstruction."""

    image: gr.Image
    button: gr.Button
    outputs: list[Any]


class Tabs(NamedTuple):
    """All tabs.

    Args:
        text: images of a text.
        image: variations of an image.
        mixture: images of a weighted sum of texts.
        interpolation: images that lead from one text to another.
        completion: images with the upper part of an upload.
        sweep: all combinations of top-k and top-p.
        tokenizer: codes and reconstruction of an image.
        samples: the examples of prompts, which a click puts into the text field.
        container: contains the tabs.
    """

    text: GeneratingTab
    image: GeneratingTab
    mixture: GeneratingTab
    interpolation: GeneratingTab
    completion: GeneratingTab
    sweep: GeneratingTab
    tokenizer: TokenizerTab
    samples: gr.Dataset
    container: gr.Tabs

    @property
    def generating(self) -> list[GeneratingTab]:
        """The tabs that generate images."""
        return [tab for tab in self if isinstance(tab, GeneratingTab)]

    @property
    def example_fields(self) -> list[Any]:
        """The fields that start with examples, in the order of ``field_values``."""
        return [*self.mixture.inputs, *self.interpolation.inputs[:2], self.sweep.inputs[0]]


def add_tabs() -> Tabs:
    """Add all tabs to the page."""
    with gr.Tabs() as container:
        with gr.Tab("Text"):
            text, samples = text_tab()
        with gr.Tab("Image"):
            image = image_tab()
        with gr.Tab("Mix"):
            mixture = mixture_tab()
        with gr.Tab("Interpolate"):
            interpolation = interpolation_tab()
        with gr.Tab("Complete"):
            completion = completion_tab()
        with gr.Tab("Sweep"):
            sweep = sweep_tab()
        with gr.Tab("Tokenizer"):
            tokenizer = tokenizer_tab()
    return Tabs(text, image, mixture, interpolation, completion, sweep, tokenizer, samples, container)


def prompt_box(label: str = "Prompt", value: str = "", elem_id: str | None = None) -> gr.Textbox:
    """Add a text field of one line, in which Enter starts the request."""
    return gr.Textbox(
        value, label=label, lines=1, max_lines=1, placeholder=DEFAULT_EXAMPLES.prompts[0], elem_id=elem_id
    )


def generate_button(name: str) -> gr.Button:
    """Add the button that starts a request."""
    return gr.Button("Generate", variant="primary", elem_id=f"generate-{name}")


def text_tab() -> tuple[GeneratingTab, gr.Dataset]:
    """Add the tab for a text prompt, and its examples."""
    prompt = prompt_box(elem_id="prompt")
    button = generate_button("text")
    samples = gr.Dataset(
        label="Examples",
        components=[prompt],
        samples=sample_rows(DEFAULT_EXAMPLES),
        elem_id="samples",
    )
    return GeneratingTab("text_request", [prompt], button), samples


def image_tab() -> GeneratingTab:
    """Add the tab for an image prompt."""
    gr.Markdown("Generate variations of an image: its CLIP embedding takes the place of a text.")
    upload = image_upload("Image prompt")
    return GeneratingTab("image_request", [upload], generate_button("image"), upload)


def mixture_tab() -> GeneratingTab:
    """Add the tab for a weighted sum of texts."""
    gr.Markdown("Add and subtract texts: the embeddings are summed with these weights.")
    inputs: list[Any] = []
    for i, (value, weight) in enumerate(DEFAULT_EXAMPLES.mixture):
        with gr.Row():
            inputs.append(gr.Textbox(value, label=f"Text {i + 1}", lines=1, max_lines=1, scale=3, min_width=180))
            inputs.append(gr.Slider(-2, 2, weight, step=0.05, label="Weight", scale=2, min_width=120))
    return GeneratingTab("mixture_request", inputs, generate_button("mixture"))


def interpolation_tab() -> GeneratingTab:
    """Add the tab for images that lead from one text to another."""
    gr.Markdown("Walk from one text to another; all images use the same seed.")
    first = prompt_box("From", DEFAULT_EXAMPLES.ends[0])
    second = prompt_box("To", DEFAULT_EXAMPLES.ends[1])
    steps = gr.Slider(2, MAX_STEPS, 8, step=1, label="Steps")
    return GeneratingTab("interpolation_request", [first, second, steps], generate_button("interpolation"))


def completion_tab() -> GeneratingTab:
    """Add the tab that completes an image from its upper part."""
    gr.Markdown("Keep the upper part of an image and generate the rest.")
    upload = image_upload("Image to complete")
    keep_fraction = gr.Slider(0.05, 0.95, 0.5, step=0.05, label="Part of the height that is kept")
    prompt = gr.Textbox(label="Prompt (if empty, the image itself)", lines=1, max_lines=1)
    return GeneratingTab("completion_request", [upload, keep_fraction, prompt], generate_button("completion"), upload)


def sweep_tab() -> GeneratingTab:
    """Add the tab for all combinations of top-k and top-p."""
    gr.Markdown("Generate an image with every combination of top-k and top-p, from the same seeds, on one sheet.")
    prompt = prompt_box(value=DEFAULT_EXAMPLES.prompts[0])
    with gr.Row():
        top_k = gr.Textbox("1, 100, 300", label="Values of top-k", lines=1, max_lines=1, min_width=140)
        top_p = gr.Textbox("0.8, 1.0", label="Values of top-p", lines=1, max_lines=1, min_width=140)
        number = gr.Slider(1, 4, 1, step=1, label="Images each", min_width=140)
    return GeneratingTab("sweep_request", [prompt, top_k, top_p, number], generate_button("sweep"))


def tokenizer_tab() -> TokenizerTab:
    """Add the tab that shows the codes and the reconstruction of an image."""
    gr.Markdown(
        "Encode the central square of an image as codes, and decode these again. Similar codes have similar colors."
    )
    image = image_upload("Image")
    button = gr.Button("Tokenize", variant="primary", elem_id="tokenize")
    summary = gr.HTML(padding=False, elem_id="tokenizer-summary")
    with gr.Row():
        original = tokenizer_output("At the size of the model", ["pixelated", "filled"])
        reconstruction = tokenizer_output("Reconstruction", ["pixelated", "filled"])
    codes = tokenizer_output("Codes", [])
    return TokenizerTab(image, button, [summary, original, reconstruction, codes])


def tokenizer_output(label: str, classes: list[str]) -> gr.Image:
    """Add an image that the tokenizer tab shows."""
    return gr.Image(
        label=label,
        # It would cover the first codes.
        show_label=label != "Codes",
        format="png",
        interactive=False,
        buttons=["download"],
        min_width=140,
        elem_classes=classes,
    )
