"""The settings that all tabs share: number of images, seed, and the sampling parameters."""

from __future__ import annotations

from typing import NamedTuple

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


def sampling_slider(name: str, label: str, minimum: float, maximum: float, step: float) -> gr.Slider:
    """Return the slider of a sampling parameter, with the description of the command line."""
    help = SAMPLING_OPTIONS[name].help
    info = help[:1].upper() + help[1:]
    return gr.Slider(minimum, maximum, getattr(SamplingParams, name), step=step, label=label, info=info)


def shared_controls(model: gr.Dropdown) -> Controls:
    """Add the shared settings to the page."""
    with gr.Row():
        num_images = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Number of images", min_width=140)
        seed = gr.Textbox(label="Seed", placeholder="random", max_length=19, min_width=100, elem_id="seed")
    with gr.Accordion("Sampling settings", open=False):
        rerank_from = gr.Slider(
            0,
            MAX_CANDIDATES,
            0,
            step=1,
            label="Candidates",
            info="Number of candidates of which CLIP chooses the images; 0 disables it",
        )
        return Controls(
            model,
            num_images,
            seed,
            rerank_from,
            sampling_slider("temperature", "Temperature", 0, 2, 0.05),
            sampling_slider("top_k", "Top-k", 1, 1000, 1),
            sampling_slider("top_p", "Top-p", 0.05, 1, 0.05),
            sampling_slider("guidance_scale", "Guidance scale", 0, 10, 0.1),
            sampling_slider("guidance_power", "Guidance power", -3, 3, 0.1),
        )
