"""The settings that all tabs share: number of images, seed, and the sampling parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import gradio as gr

from clipgen.app.limits import MAX_CANDIDATES, MAX_IMAGES
from clipgen.generation.sampling_options import SAMPLING_OPTIONS
from clipgen.sampling_params import SamplingParams


class Controls(NamedTuple):
    """The components of the shared settings, in the order of the fields of ``Settings``."""

    model: gr.Dropdown
    num_images: gr.Slider
    seed: gr.Textbox
    rerank_from: gr.Slider
    temperature: gr.Slider
    top_k: gr.Slider
    top_p: gr.Slider
    guidance_scale: gr.Slider
    guidance_power: gr.Slider

    @property
    def sampling(self) -> list[gr.Slider]:
        """The sliders of the sampling parameters."""
        return [getattr(self, name) for name in SAMPLING_OPTIONS]


class SliderRange(NamedTuple):
    """The label of a slider, and the values that it offers."""

    label: str
    minimum: float
    maximum: float
    step: float


SLIDERS = {
    "temperature": SliderRange("Temperature", 0, 2, 0.05),
    "top_k": SliderRange("Top-k", 1, 1000, 1),
    "top_p": SliderRange("Top-p", 0.05, 1, 0.05),
    "guidance_scale": SliderRange("Guidance scale", 0, 10, 0.1),
    "guidance_power": SliderRange("Guidance power", -3, 3, 0.1),
}


def sampling_slider(name: str) -> gr.Slider:
    """Return the slider of a sampling parameter, with the description of the command line."""
    help = SAMPLING_OPTIONS[name].help
    info = help[:1].upper() + help[1:]
    label, minimum, maximum, step = SLIDERS[name]
    return gr.Slider(minimum, maximum, getattr(SamplingParams, name), step=step, label=label, info=info)


def slider_updates(params: SamplingParams | None) -> list[Any]:
    """Return updates of the sampling sliders to the parameters of a model; None leaves them as they are.

    Gradio refuses values outside the range of a slider, so the range is extended to a model's value.
    """
    if params is None:
        return [gr.skip() for _ in SAMPLING_OPTIONS]
    updates = []
    for name in SAMPLING_OPTIONS:
        value = getattr(params, name)
        slider = SLIDERS[name]
        minimum = min(slider.minimum, value)
        maximum = max(slider.maximum, value)
        updates.append(gr.update(value=value, minimum=minimum, maximum=maximum))
    return updates


# Settings that have no effect in a tab, by its label.
UNUSED_CONTROLS = {
    "Interpolate": ("num_images", "rerank_from"),
    "Sweep": ("num_images", "rerank_from", "top_k", "top_p"),
    "Tokenizer": ("num_images", "seed", "rerank_from", *SAMPLING_OPTIONS),
}


def visibility_updates(tab: str) -> list[Any]:
    """Return updates of the controls after the model, and of their group, that show what has an effect in a tab."""
    unused = UNUSED_CONTROLS.get(tab, ())
    is_visible = [name not in unused for name in Controls._fields[1:]]
    is_visible.append(any(name not in unused for name in SAMPLING_OPTIONS))
    return [gr.update(visible=visible) for visible in is_visible]


def shared_controls(model: gr.Dropdown) -> tuple[Controls, gr.Accordion]:
    """Add the shared settings to the page; also return the group of the sampling settings."""
    with gr.Row():
        num_images = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Number of images", min_width=140)
        seed = gr.Textbox(label="Seed", placeholder="random", max_length=19, min_width=100, elem_id="seed")
    with gr.Accordion("Sampling settings", open=False) as group:
        rerank_from = gr.Slider(
            0,
            MAX_CANDIDATES,
            0,
            step=1,
            label="Candidates",
            info="Number of candidates of which CLIP chooses the images; 0 disables it",
        )
        sliders = [sampling_slider(name) for name in SAMPLING_OPTIONS]
    return Controls(model, num_images, seed, rerank_from, *sliders), group
