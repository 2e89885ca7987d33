"""The web page: its layout, and which handler each component calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from clipgen.app import tabs
from clipgen.app.controls import Controls, shared_controls
from clipgen.app.events import Handler, Handlers
from clipgen.app.limits import CLEANING_INTERVAL, MAX_ACTIVE, MAX_AGE
from clipgen.app.messages import status
from clipgen.app.models import HUB_PREFIX, ModelStore
from clipgen.app.output_panel import OutputPanel, output_panel

TITLE = "clipgen"
HEADING = "# clipgen\nText to image, learned from images alone"
# Requests of all visitors share one queue.
QUEUE = "generation"


def build_page(store: ModelStore, folder: Path) -> gr.Blocks:
    """Return the page.

    Args:
        store: the models.
        folder: folder for the files of generated images, below Gradio's own.
    """
    cleaning = (CLEANING_INTERVAL, MAX_AGE)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=cleaning, fill_width=True) as page:
        with gr.Row():
            with gr.Column(min_width=320):
                gr.Markdown(HEADING)
                facts = gr.HTML(status("Loading the model ..."), padding=False, elem_id="facts")
            with gr.Column(min_width=320):
                model = model_chooser(store)
        with gr.Row():
            with gr.Column(min_width=320):
                all_tabs = tabs.add_tabs()
                controls, sampling_group = shared_controls(model)
            with gr.Column(min_width=320, elem_id="output"):
                panel = output_panel()
        handlers = Handlers(store, folder)
        connect_model(page, controls, facts, all_tabs, handlers)
        all_tabs.container.select(
            handlers.show_controls,
            None,
            [*controls[1:], sampling_group],
            queue=False,
            api_visibility="private",
            show_progress="hidden",
        )
        requests = connect_tabs(all_tabs.generating, controls, panel, handlers)
        requests += connect_results(controls, panel, handlers)
        connect_stop(panel, requests, handlers)
        page.unload(handlers.leave)
        connect_tokenizer(all_tabs.tokenizer, model, handlers)
    return page


def model_chooser(store: ModelStore) -> gr.Dropdown:
    """Add the list of models, in which a name of the hub can be typed if that is allowed."""
    info = f"Or type {HUB_PREFIX}OWNER/NAME and press Enter" if store.allow_hub else None
    return gr.Dropdown(
        store.choices(),
        value=store.default(),
        label="Model",
        info=info,
        allow_custom_value=True,
        elem_id="model",
    )


def connect_model(
    page: gr.Blocks,
    controls: Controls,
    facts: gr.HTML,
    all_tabs: tabs.Tabs,
    handlers: Handlers,
) -> None:
    """Load a model, its sampling parameters and its examples when it is chosen; list the runs when the page opens."""
    listed = page.load(handlers.list_models, None, [controls.model], api_visibility="private", show_progress="hidden")
    for trigger in (listed.then, controls.model.change):
        loaded = trigger(
            handlers.load_model,
            [controls.model],
            [facts, *controls.sampling],
            concurrency_limit=4,
            trigger_mode="always_last",
            api_visibility="private",
            show_progress="hidden",
        )
        loaded.then(
            handlers.show_examples,
            [controls.model, *all_tabs.example_fields],
            [*all_tabs.text.inputs, all_tabs.samples, *all_tabs.example_fields],
            api_visibility="private",
            show_progress="hidden",
        )
    all_tabs.samples.click(
        handlers.use_sample,
        [all_tabs.samples],
        all_tabs.text.inputs,
        queue=False,
        api_visibility="private",
        show_progress="hidden",
    )


def connect_tokenizer(tab: tabs.TokenizerTab, model: gr.Dropdown, handlers: Handlers) -> None:
    """Show the codes and the reconstruction of the uploaded image."""
    tab.button.click(
        handlers.tokenize,
        [model, tab.image],
        tab.outputs,
        concurrency_id=QUEUE,
        api_visibility="private",
    )


def connect_tabs(
    generating_tabs: list[tabs.GeneratingTab],
    controls: Controls,
    panel: OutputPanel,
    handlers: Handlers,
) -> list[Any]:
    """Start a request by the button of a tab, or by Enter in a text field; check uploads at once. Return the events."""
    requests = []
    for tab in generating_tabs:
        triggers = [tab.button.click, *(text.submit for text in tab.texts)]
        name = tab.builder.removesuffix("_request")
        inputs = [*controls, *tab.inputs]
        requests.append(add_request(triggers, handlers.generate(tab.builder), inputs, panel, name))
        if tab.upload is not None:
            tab.upload.upload(handlers.check_upload, [tab.upload], [panel.status], api_visibility="private")
    return requests


def connect_results(controls: Controls, panel: OutputPanel, handlers: Handlers) -> list[Any]:
    """Show the details of a chosen image, and generate images like it. Return the events of the requests."""
    panel.gallery.select(
        handlers.choose,
        [panel.results],
        [panel.selected, panel.details, panel.table, panel.download],
        api_visibility="private",
        show_progress="hidden",
    )
    image = [panel.results, panel.selected]
    inputs = [*image, controls.num_images]
    return [
        add_request([panel.again.click], handlers.regenerate, image, panel),
        add_request([panel.more.click], handlers.generate_more, inputs, panel),
        add_request([panel.variations.click], handlers.variations, inputs, panel),
    ]


def connect_stop(panel: OutputPanel, requests: list[Any], handlers: Handlers) -> None:
    """Stop the running and waiting requests. What the page says is a second step, or a late row would replace it."""
    stopping = panel.stop.click(handlers.stop, None, None, cancels=requests, queue=False, api_visibility="private")
    stopping.then(
        handlers.stopped,
        None,
        [panel.status],
        queue=False,
        api_visibility="private",
        show_progress="hidden",
    )


def add_request(
    triggers: list[Any],
    handler: Handler,
    inputs: list[Any],
    panel: OutputPanel,
    api_name: str | None = None,
) -> Any:
    """Let triggers start a request, and return the event.

    Args:
        triggers: what starts it.
        handler: serves it.
        inputs: components whose values the handler gets.
        panel: shows it.
        api_name: name for programs; None hides it from them.
    """
    return gr.on(
        triggers,
        handler,
        inputs,
        panel.shown,
        api_name=api_name,
        api_visibility="public" if api_name else "private",
        concurrency_limit=MAX_ACTIVE,
        concurrency_id=QUEUE,
        show_progress="minimal",
        show_progress_on=[panel.status],
    )
