"""Handle the events of the page. Modules that need torch are imported by the first request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from clipgen.app.controls import slider_updates, visibility_updates
from clipgen.app.examples import field_updates, sample_rows
from clipgen.app.messages import error_status, status
from clipgen.app.models import ModelStore
from clipgen.app.results import Result, details, save_result, save_sheet
from clipgen.app.running import RunningRequests
from clipgen.app.settings import Settings
from clipgen.generation.bundled_vocabulary import EXAMPLES, Examples
from clipgen.generation.streaming import Stopped

if TYPE_CHECKING:
    from clipgen.app.generation import Update
    from clipgen.app.request import ImageRequest
    from clipgen.pipeline import TextToImage

# Images with fewer pixels per side are enlarged with sharp pixels.
SMALL_IMAGE = 128
NUM_SETTINGS = len(Settings._fields)
# A row of a large model may take longer; the work is stopped after it all the same.
MAX_STOP_SECONDS = 5.0
Handler = Callable[..., Iterator[Any]]


class Handlers:
    """The handlers of the page's events; their arguments are the values of components.

    Gradio recognizes ``gr.Request`` and ``gr.SelectData`` by the annotations, which must be importable.

    Args:
        store: the models.
        folder: folder for the files of generated images.
    """

    def __init__(self, store: ModelStore, folder: Path):
        self.store = store
        self.folder = folder
        self.running = RunningRequests()

    # ------------------------------------------------------------------------------------------------------- models

    def list_models(self) -> Any:
        """Return the current list of models."""
        return gr.update(choices=self.store.choices())

    def load_model(self, name: str) -> Iterator[tuple[Any, ...]]:
        """Load a model, and yield a line about it, and its default sampling parameters once.

        They are set before the model is loaded if they are known by then, so that no request is sampled with others
        and no later change of the visitor is overwritten.
        """
        try:
            known = self.store.params(name)
            yield status("Loading the model ..."), *slider_updates(known)
            pipe = self.store.load(name)
        except Exception as error:
            yield error_status(error), *slider_updates(None)
        else:
            yield status(model_facts(pipe)), *slider_updates(pipe.params if known is None else None)

    def show_examples(self, name: str, *values: Any) -> tuple[Any, ...]:
        """Return prompts that a model knows: the placeholder and samples of the tab "Text", and the other fields."""
        examples = self.examples(name)
        if examples is None:
            # The page already shows why the model could not be loaded.
            return tuple(gr.skip() for _ in range(2 + len(values)))
        samples = gr.update(samples=sample_rows(examples))
        return (gr.update(placeholder=examples.prompts[0]), samples, *field_updates(examples, values))

    def show_controls(self, event: gr.SelectData) -> list[Any]:
        """Show the settings that have an effect in the tab that was opened."""
        return visibility_updates(str(event.value))

    def use_sample(self, row: list[str]) -> str:
        """Return the prompt of a chosen sample."""
        return row[0]

    def examples(self, name: str) -> Examples | None:
        """Return the examples of a loaded model: those of its CLIP, which a run may share with a bundled model."""
        pipe = self.store.find_loaded(name)
        if pipe is None:
            return None
        clip: Any = pipe.clip
        return EXAMPLES.get(clip.model_name, EXAMPLES[""])

    # --------------------------------------------------------------------------------------------------- generation

    def generate(self, builder: str) -> Handler:
        """Return the handler of a tab: it makes a request of the values, and yields the state of the page.

        Args:
            builder: name of a function of ``clipgen.app.builders``.
        """

        def handler(visit: gr.Request, *values: Any) -> Iterator[Any]:
            def build() -> ImageRequest:
                from clipgen.app import builders

                settings = Settings(*values[:NUM_SETTINGS])
                request: ImageRequest = getattr(builders, builder)(settings, *values[NUM_SETTINGS:])
                return request

            yield from self.serve(visit, build)

        return handler

    def regenerate(self, visit: gr.Request, results: list[Result], selected: int) -> Iterator[Any]:
        """Generate the chosen image again."""
        yield from self.serve(visit, lambda: chosen_result(results, selected).regenerate())

    def generate_more(
        self, visit: gr.Request, results: list[Result], selected: int, num_images: float
    ) -> Iterator[Any]:
        """Generate images with the settings of the chosen image and another seed."""
        yield from self.serve(visit, lambda: chosen_result(results, selected).generate_more(int(num_images)))

    def variations(self, visit: gr.Request, results: list[Result], selected: int, num_images: float) -> Iterator[Any]:
        """Generate images with the chosen image as the prompt."""
        yield from self.serve(visit, lambda: chosen_result(results, selected).variations(int(num_images)))

    def stop(self, visit: gr.Request) -> None:
        """Stop the requests of a visitor, and wait until their last rows are on the way to the page."""
        self.running.stop(str(visit.session_hash), MAX_STOP_SECONDS)

    def stopped(self) -> str:
        """Return the status of the page after the requests of a visitor were stopped."""
        return status("Stopped.")

    def leave(self, visit: gr.Request) -> None:
        """Stop the requests of a visitor who has closed the page."""
        self.running.stop(str(visit.session_hash))

    def serve(self, visit: gr.Request, build: Callable[[], ImageRequest]) -> Iterator[Any]:
        """Make a request and yield the state of the page until it is finished; an error becomes a sentence."""
        try:
            # The page appears before torch is imported.
            yield show_message(status("Starting ..."))
            from clipgen.app.generation import serve_request

            with self.running.register(str(visit.session_hash)) as stopped:
                for update in serve_request(self.store, build(), stopped):
                    yield self.show_update(update)
        except Stopped:
            return
        except Exception as error:
            yield show_message(error_status(error))

    def show_update(self, update: Update) -> tuple[Any, ...]:
        """Return the values of ``OutputPanel.shown``."""
        images: list[Any] = list(update.partial)
        for result in update.results:
            images.append((str(save_result(result, self.folder)), result.caption))
        if not images:
            return show_message(update.status)
        sheet = None if update.sheet is None else str(save_sheet(update.sheet, self.folder))
        size = (update.partial or [update.results[0].image])[0].width
        return (
            update.status,
            gr.update(value=images, columns=update.columns, elem_classes=image_classes(size)),
            gr.update(value=sheet, visible=sheet is not None),
            update.results,
            gr.update(visible=False),
        )

    # ------------------------------------------------------------------------------------------------ chosen images

    def choose(self, results: list[Result], event: gr.SelectData) -> tuple[Any, ...]:
        """Return the number, details and file of a chosen image; an incomplete image has none."""
        if not isinstance(event.index, int) or not 0 <= event.index < len(results):
            return (gr.skip(), gr.update(visible=False), gr.skip(), gr.skip())
        result = results[event.index]
        return (event.index, gr.update(visible=True), details(result), str(save_result(result, self.folder)))

    # ------------------------------------------------------------------------------------------------------ uploads

    def check_upload(self, path: str | None) -> str:
        """Return an error if an uploaded file cannot be used."""
        from clipgen.app.uploads import read_upload

        try:
            read_upload(path)
        except Exception as error:
            return error_status(error)
        return status("The image is uploaded. Press Generate.")

    def tokenize(self, name: str, path: str | None) -> Iterator[tuple[Any, ...]]:
        """Yield the numbers, the image, its reconstruction and its codes."""
        yield (status("Waiting for the model ..."), gr.skip(), gr.skip(), gr.skip())
        try:
            from clipgen.app.tokenizer import tokenize
            from clipgen.app.uploads import read_upload

            image = read_upload(path)
            pipe = self.store.load(name)
            with self.store.generating:
                tokens = tokenize(pipe.vqgan, image, pipe.image_size)
        except Exception as error:
            yield (error_status(error), None, None, None)
        else:
            yield (status(tokens.summary), tokens.original, tokens.reconstruction, tokens.codes)


def chosen_result(results: list[Result], selected: int) -> Result:
    """Return the chosen image.

    Raises:
        ValueError: it has expired.
    """
    if not 0 <= selected < len(results):
        raise ValueError("the chosen image has expired: generate it again")
    return results[selected]


def show_message(text: str) -> tuple[Any, ...]:
    """Return the values of ``OutputPanel.shown`` that change the status only."""
    return (text, gr.skip(), gr.skip(), gr.skip(), gr.skip())


def image_classes(size: int) -> list[str]:
    """Return the CSS classes of images with ``size`` pixels per side."""
    return ["generated", "pixelated"] if size < SMALL_IMAGE else ["generated"]


def model_facts(pipe: TextToImage) -> str:
    """Return the size of the images, the tokens and the guidance of a model in one line."""
    size = pipe.image_size
    guidance = "with" if pipe.transformer.conditioning_config.drop_prob > 0 else "without"
    return (
        f"{size} x {size} pixels from {pipe.transformer.num_tokens} tokens of a codebook of "
        f"{pipe.vqgan.codebook_size}, {guidance} guidance."
    )
