"""The web page without a browser: requests, previews, models, uploads, and the server's answers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from clipgen.app import builders, generation, limits, results
from clipgen.app.messages import error_status
from clipgen.app.models import ModelStore
from clipgen.app.running import RunningRequests
from clipgen.app.settings import Settings
from clipgen.app.tokenizer import tokenize
from clipgen.app.uploads import read_upload
from clipgen.bundled import BUNDLED
from clipgen.cli import app as command
from clipgen.cli.image_metadata import read_metadata
from clipgen.generation.bundled_vocabulary import EXAMPLES, prompt_warnings
from clipgen.generation.partial_images import PartialImages
from clipgen.generation.streaming import Stopped
from clipgen.pipeline import TextToImage
from clipgen.sampling_params import SamplingParams

ROOT = Path(__file__).parents[1]
PROMPT = "a large blue ring on a white background"
SETTINGS = Settings("shapes", 2, "5", 0, 1.0, 300, 0.8, 1.0, 0.0)


@pytest.fixture(scope="module")
def store() -> ModelStore:
    store = ModelStore(outputs=Path("no-such-folder"), device="cpu", allow_hub=False)
    store.load("shapes")
    return store


@pytest.fixture(scope="module")
def pipe(store) -> TextToImage:
    return store.load("shapes")


def served(store: ModelStore, request) -> list[generation.Update]:
    return list(generation.serve_request(store, request))


def assert_equal(images, expected) -> None:
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]


# ------------------------------------------------------------------------------------------------------------ requests


def test_images_and_metadata_equal_those_of_the_library(store, pipe):
    last = served(store, builders.text_request(SETTINGS, PROMPT))[-1]
    expected = pipe(PROMPT, 2, seed=5, top_p=0.8)
    images = [result.image for result in last.results]
    assert_equal(images, expected)
    assert [image.info for image in images] == [image.info for image in expected]


def test_downloaded_file_reproduces_the_image(store, tmp_path):
    result = served(store, builders.text_request(SETTINGS, PROMPT))[-1].results[1]
    path = results.save_result(result, tmp_path)
    metadata = read_metadata(path)
    assert (metadata.prompt, metadata.seed, metadata.params.top_p) == (PROMPT, 6, 0.8)
    assert path.name == "a-large-blue-ring-on-a-white-background_6.png"
    assert Image.open(path).tobytes() == result.image.tobytes()


def test_again_generates_the_chosen_image_of_a_reranked_request(store):
    request = builders.text_request(SETTINGS._replace(rerank_from=5), PROMPT)
    chosen = served(store, request)[-1].results[1]
    (again,) = served(store, chosen.regenerate())[-1].results
    assert_equal([again.image], [chosen.image])


def test_again_generates_the_chosen_image_of_a_sweep(store, tmp_path):
    request = builders.sweep_request(SETTINGS, PROMPT, "1, 100", "0.8,1.0", 2)
    update = served(store, request)[-1]
    assert len(update.results) == 8 and update.columns == 4
    assert [result.caption for result in update.results[::2]] == [
        "top_k=1 top_p=0.8",
        "top_k=1 top_p=1.0",
        "top_k=100 top_p=0.8",
        "top_k=100 top_p=1.0",
    ]
    cell = generation.SHEET_CELL
    assert update.sheet is not None
    path = results.save_sheet(update.sheet, tmp_path)
    with Image.open(path) as sheet:
        metadata = sheet.text
    assert path.name == "sweep_a-large-blue-ring-on-a-white-background_5.png"
    assert (metadata["prompt"], metadata["seed"], metadata["temperature"]) == (PROMPT, "5", "1.0")
    assert json.loads(metadata["sweep"])[1::2] == [result.caption for result in update.results[1::2]]
    assert "top_k" not in metadata and "top_p" not in metadata
    assert update.sheet.width > 4 * cell and update.sheet.height > 2 * cell
    chosen = update.results[5]
    (again,) = served(store, chosen.regenerate())[-1].results
    assert_equal([again.image], [chosen.image])


def test_again_generates_the_whole_interpolation(store, pipe):
    request = builders.interpolation_request(SETTINGS, PROMPT, "a small red star on a black background", 3)
    update = served(store, request)[-1]
    images = [result.image for result in update.results]
    expected = pipe.interpolate(PROMPT, "a small red star on a black background", 3, seed=5, top_p=0.8)
    assert_equal(images, expected)
    assert_equal([result.image for result in served(store, update.results[1].regenerate())[-1].results], images)
    assert update.results[0].generate_more(1).num_images == 3


def test_more_has_another_seed_and_variations_another_prompt(store, pipe):
    chosen = served(store, builders.text_request(SETTINGS, PROMPT))[-1].results[0]
    more = chosen.generate_more(3)
    assert more.seed != chosen.seed and more.prompts == (PROMPT,) and more.num_images == 3
    variations = chosen.variations(2)
    images = [result.image for result in served(store, variations)[-1].results]
    assert_equal(images, pipe(chosen.image, 2, seed=variations.seed, top_p=0.8))


def test_more_images_are_chosen_from_as_many_candidates(store):
    request = builders.text_request(SETTINGS._replace(rerank_from=5), PROMPT)
    result = results.Result(Image.new("RGB", (32, 32)), request, position=1)
    assert (result.generate_more(2).rerank_from, result.generate_more(8).rerank_from) == (5, 8)
    result.generate_more(8).check()


def test_mixture_leaves_out_empty_texts(store, pipe):
    request = builders.mixture_request(SETTINGS, PROMPT, 1.0, "a blue circle", -1.0, " ", 1.0)
    assert request.prompts == ({PROMPT: 1.0, "a blue circle": -1.0},)
    (update,) = served(store, request)[-1:]
    assert_equal([result.image for result in update.results], pipe(request.prompts[0], 2, seed=5, top_p=0.8))


def test_completion_keeps_the_upper_part(store, pipe, tmp_path):
    path = tmp_path / "upload.png"
    image = pipe(PROMPT, seed=0)[0]
    image.save(path)
    request = builders.completion_request(SETTINGS, str(path), 0.5, "")
    expected = pipe(image, 2, seed=5, top_p=0.8, outpaint=image, keep_fraction=0.5)
    assert_equal([result.image for result in served(store, request)[-1].results], expected)
    with_text = builders.completion_request(SETTINGS, str(path), 0.5, PROMPT)
    assert with_text.prompts == (PROMPT,)


@pytest.mark.parametrize("prompt", ["", PROMPT], ids=["as prompt", "with a text"])
def test_completion_of_a_photograph_is_remarked_once(tmp_path, prompt):
    path = tmp_path / "photo.png"
    Image.new("RGB", (50, 40), "red").save(path)
    remark, description = generation.notes(builders.completion_request(SETTINGS, str(path), 0.5, prompt))
    assert remark == "The model has never seen a photograph: the upload" and "32 x 32" in description


def test_empty_seed_is_random_but_recorded():
    first, second = (builders.text_request(SETTINGS._replace(seed=" "), PROMPT) for _ in range(2))
    assert first.seed != second.seed


@pytest.mark.parametrize(
    ("change", "prompt", "message"),
    [
        ({}, "  ", "prompt must not be empty"),
        ({}, "x" * (limits.MAX_PROMPT_LENGTH + 1), "at most 1000 characters, got 1001"),
        ({"num_images": limits.MAX_IMAGES + 1}, PROMPT, "number of images must be at most 16, got 17"),
        ({"num_images": 0}, PROMPT, "num_images must be at least 1"),
        ({"rerank_from": 65}, PROMPT, "candidates must be at most 64, got 65"),
        ({"rerank_from": 1}, PROMPT, r"rerank_from must be at least num_images \(2\), got 1"),
        ({"seed": "-1"}, PROMPT, "seed must be a whole number from 0 to"),
        ({"seed": "9" * 19}, PROMPT, "seed must be in"),
        ({"top_p": 0}, PROMPT, "top_p must be in"),
    ],
)
def test_requests_beyond_the_limits_are_refused(change, prompt, message):
    with pytest.raises(ValueError, match=message):
        builders.text_request(SETTINGS._replace(**change), prompt)


def test_long_sweeps_are_refused_before_their_combinations_are_made(monkeypatch):
    def fail(axes):
        raise AssertionError("all combinations were made")

    monkeypatch.setattr(builders, "expand_sweep", fail)
    values = ",".join(map(str, range(1, 101)))
    with pytest.raises(ValueError, match="a sweep must have at most 64 images, got 10000"):
        builders.sweep_request(SETTINGS, PROMPT, values, ",".join(f"0.{i:03d}" for i in range(1, 101)), 1)


def test_sweeps_are_bounded_and_their_values_checked():
    with pytest.raises(ValueError, match="a sweep must have at most 64 images, got 68"):
        builders.sweep_request(SETTINGS, PROMPT, ",".join(map(str, range(1, 18))), "0.5,1", 2)
    with pytest.raises(ValueError, match="top_k must be numbers separated by commas, got 'many'"):
        builders.sweep_request(SETTINGS, PROMPT, "many", "1", 1)
    with pytest.raises(ValueError, match="top_p must be in"):
        builders.sweep_request(SETTINGS, PROMPT, "1", "7", 1)


def test_prompts_that_the_bundled_model_does_not_know_are_remarked(store):
    update = served(store, builders.text_request(SETTINGS, "an elephant"))[-1]
    assert "does not know &#x27;elephant&#x27;" in update.status and len(update.results) == 2


def test_all_kinds_of_prompts_are_remarked():
    prompts = [
        ("a", {PROMPT: 1.0, "a cat": -1.0}),
        ("b", Image.new("RGB", (32, 32))),
        ("c", Image.new("RGB", (64, 32))),
    ]
    unknown, photograph, description = prompt_warnings("shapes", prompts)
    assert "does not know 'cat'" in unknown and photograph.endswith("has never seen a photograph: c")
    assert "nothing else" in description
    assert prompt_warnings("shapes", prompts[1:2]) == prompt_warnings("cifar10", prompts[1:]) == []


# ------------------------------------------------------------------------------------------------------------ previews


def test_previews_are_squares_whose_missing_rows_are_transparent(store):
    request = builders.text_request(SETTINGS, PROMPT)
    # Without a thread, so that no preview is dropped.
    progress = []
    generation.generate_with_reports(store, request, progress.append)
    assert [state.rows for state in progress] == list(range(1, 9))
    half = progress[3].images
    assert [image.size for image in half] == [(32, 32)] * 2
    alpha = np.asarray(half[0])[:, :, 3]
    assert (alpha[:16] == 255).all() and (alpha[16:] == 0).all()


def test_a_request_that_waits_for_others_can_be_stopped(store):
    stopped = threading.Event()
    with store.generating:
        updates = generation.serve_request(store, builders.text_request(SETTINGS, PROMPT), stopped)
        assert "Waiting for the model" in next(updates).status
        assert "Waiting for other visitors" in next(updates).status
        stopped.set()
        with pytest.raises(Stopped):
            list(updates)


def test_closing_a_request_stops_the_generation(store, monkeypatch):
    rows = []
    update = PartialImages.update

    def slow_update(self, images):
        rows.append(images.shape[2])
        time.sleep(0.05)
        return update(self, images)

    monkeypatch.setattr(PartialImages, "update", slow_update)
    updates = generation.serve_request(store, builders.text_request(SETTINGS, PROMPT))
    while not next(updates).partial:
        pass
    updates.close()
    with store.generating:  # held until the thread has ended
        count = len(rows)
    assert count < 8
    time.sleep(0.2)
    assert len(rows) == count


# -------------------------------------------------------------------------------------------------------------- models


def test_visitors_may_not_name_other_files(tmp_path):
    store = ModelStore(outputs=tmp_path, allow_hub=False)
    for name in ("/etc", str(BUNDLED["shapes"]), "hf-hub:owner/name", "../outputs", ""):
        with pytest.raises(ValueError, match="the model must be one of the list, got"):
            store.load(name)


@pytest.mark.parametrize("name", [None, ["shapes"], 7])
def test_names_that_are_no_text_are_refused(tmp_path, name):
    """A program may send any value; without a checkpoint of the server, None names no model either."""
    with pytest.raises(ValueError, match="the model must be one of the list, or hf-hub:OWNER/NAME, got "):
        ModelStore(outputs=tmp_path).check(name)


@pytest.mark.parametrize(
    "name",
    ["hf-hub:owner", "hf-hub:../..", "hf-hub:a/b/c", "hf-hub:a/b c", "hf-hub:-/../x", "hf-hub:a/b@", "hf-hub:a/b@../x"],
)
def test_names_of_the_hub_are_checked(name, tmp_path):
    store = ModelStore(outputs=tmp_path, allow_hub=True)
    for known in ("hf-hub:owner/some-name.v2", "hf-hub:owner/name@v1.0", "hf-hub:owner/name@refs/pr/1"):
        store.check(known)
    with pytest.raises(ValueError, match="or hf-hub:OWNER/NAME, got"):
        store.check(name)


def test_models_are_listed_and_the_newest_finished_run_is_the_default(pipe, tmp_path):
    store = ModelStore(outputs=tmp_path, device="cpu")
    bundled = [("shapes (bundled)", "shapes"), ("cifar10 (bundled)", "cifar10")]
    assert store.choices() == bundled and store.default() == "shapes"
    pipe.save(tmp_path / "transformer" / "run")
    run = str(tmp_path / "transformer" / "run")
    assert store.choices() == [(run, run), *bundled] and store.default() == run
    assert store.load(run).fingerprint == pipe.fingerprint
    named = ModelStore("hf-hub:owner/name", outputs=tmp_path)
    assert named.default() == "hf-hub:owner/name" == named.choices()[0][1]


def test_models_are_loaded_once_and_the_least_recently_used_is_dropped(monkeypatch, tmp_path):
    loaded = []

    def load(self, name):
        time.sleep(0.05)
        loaded.append(name)
        return object()

    monkeypatch.setattr(ModelStore, "_load", load)
    store = ModelStore(outputs=tmp_path, capacity=2)
    threads = [threading.Thread(target=store.load, args=("shapes",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == ["shapes"]
    store.load("hf-hub:a/a")
    store.load("shapes")
    store.load("hf-hub:b/b")
    store.load("shapes")
    # No lock remains of a model that is not being loaded: visitors could name any number of them.
    assert not store._loading
    assert loaded == ["shapes", "hf-hub:a/a", "hf-hub:b/b"]


def values(updates) -> list[float]:
    return [update["value"] for update in updates]


def test_sliders_accept_the_parameters_of_every_model():
    """Gradio refuses a value outside the range of its slider when the images are generated."""
    pytest.importorskip("gradio", reason="needs Gradio: pip install -e '.[app]'")
    from clipgen.app.controls import slider_updates

    wide = SamplingParams(temperature=3.0, top_k=4096, top_p=0.01, guidance_scale=12.0, guidance_power=-4.0)
    ranges = [(update["minimum"], update["maximum"]) for update in slider_updates(wide)]
    assert ranges == [(0, 3.0), (1, 4096), (0.01, 1), (0, 12.0), (-4.0, 3)]
    ranges = [(update["minimum"], update["maximum"]) for update in slider_updates(SamplingParams())]
    assert ranges == [(0, 2), (1, 1000), (0.05, 1), (0, 10), (-3, 3)]


def test_a_chosen_model_sets_the_sampling_settings(pipe, tmp_path):
    gr = pytest.importorskip("gradio", reason="needs Gradio: pip install -e '.[app]'")
    from clipgen.app.events import Handlers

    handlers = Handlers(ModelStore(outputs=tmp_path, device="cpu"), tmp_path)
    guided = TextToImage(pipe.vqgan, pipe.transformer, pipe.clip, params=SamplingParams(top_k=9, guidance_power=0.5))
    run = guided.save(tmp_path / "transformer" / "run")
    unchanged = [gr.skip()] * 5
    (waiting, *settings), (facts, *later) = handlers.load_model(str(run))
    assert values(settings) == [1.0, 9, 1.0, 1.0, 0.5] and later == unchanged  # what the visitor sets meanwhile stays
    assert "Loading" in waiting and "pixels" in facts
    # A checkpoint inside a run has the run's parameters, which are known when it is loaded.
    handlers = Handlers(ModelStore(str(run / "transformer"), outputs=tmp_path, device="cpu"), tmp_path)
    (_, *early), (_, *settings) = handlers.load_model(str(run / "transformer"))
    assert early == unchanged and values(settings) == [1.0, 9, 1.0, 1.0, 0.5]
    [(error, *settings)] = handlers.load_model("/etc")
    assert settings == unchanged and "must be one of the list" in error


def test_settings_without_effect_in_a_tab_are_hidden():
    pytest.importorskip("gradio", reason="needs Gradio: pip install -e '.[app]'")
    from clipgen.app.controls import visibility_updates

    def hidden(tab):
        names = [*Settings._fields[1:], "group"]
        return [name for name, update in zip(names, visibility_updates(tab)) if not update["visible"]]

    assert hidden("Text") == hidden("Complete") == []
    assert hidden("Interpolate") == ["num_images", "rerank_from"]
    assert hidden("Sweep") == ["num_images", "rerank_from", "top_k", "top_p"]
    assert hidden("Tokenizer") == [*Settings._fields[1:], "group"]


@pytest.mark.parametrize("name", BUNDLED)
def test_examples_of_a_bundled_model_are_prompts_that_it_knows(name):
    prompts, mixture, ends = EXAMPLES[name]
    texts = [*prompts, *ends, *(text for text, _ in mixture if text)]
    assert len(prompts) == 4 and len(mixture) == 3 and prompt_warnings(name, [(text, text) for text in texts]) == []


def test_a_chosen_model_sets_the_examples_that_the_visitor_has_not_changed(pipe, tmp_path, monkeypatch):
    gr = pytest.importorskip("gradio", reason="needs Gradio: pip install -e '.[app]'")
    from clipgen.app.events import Handlers
    from clipgen.app.examples import field_values

    def fields(name):
        return [value for tab in field_values(EXAMPLES[name]) for value in tab]

    run = str(pipe.save(tmp_path / "transformer" / "run"))
    handlers = Handlers(ModelStore(outputs=tmp_path, device="cpu", capacity=3), tmp_path)
    for name in ("cifar10", "shapes", run):
        handlers.store.load(name)
    placeholder, samples, *values = handlers.show_examples("cifar10", *fields("shapes"))
    assert placeholder["placeholder"] == samples["samples"][0][0] == "a photo of a horse"
    assert values == fields("cifar10")
    changed = [*fields("cifar10")[:6], "a photo of my cat", *fields("cifar10")[7:]]
    _, _, *values = handlers.show_examples("shapes", *changed)
    assert values == [*fields("shapes")[:6], gr.skip(), gr.skip(), fields("shapes")[8]]
    # A run knows the words of its CLIP.
    assert handlers.show_examples(run, *fields("cifar10"))[1]["samples"][0] == [EXAMPLES["shapes"].prompts[0]]
    monkeypatch.setattr(pipe.clip, "model_name", "ViT-B-32")
    monkeypatch.setattr(handlers.store, "find_loaded", lambda name: pipe)
    assert handlers.examples("hf-hub:a/b") == EXAMPLES[""]


def test_a_model_that_cannot_be_loaded_is_not_loaded_again_for_its_examples(tmp_path, monkeypatch):
    gr = pytest.importorskip("gradio", reason="needs Gradio: pip install -e '.[app]'")
    from clipgen.app.events import Handlers

    attempts = []

    def fail(self, name):
        attempts.append(name)
        raise OSError("the hub is not reachable")

    monkeypatch.setattr(ModelStore, "_load", fail)
    handlers = Handlers(ModelStore(outputs=tmp_path, device="cpu"), tmp_path)
    *_, (error, *_) = handlers.load_model("hf-hub:a/b")
    assert "The hub is not reachable" in error
    assert handlers.show_examples("hf-hub:a/b", *range(9)) == (gr.skip(),) * 11
    assert attempts == ["hf-hub:a/b"]


def test_help_of_the_command_names_the_bundled_models():
    text = " ".join(command.make_parser().format_help().split())
    assert "hf-hub:OWNER/NAME, shapes or cifar10 (default: the newest finished run below outputs/, else shapes)" in text


# ------------------------------------------------------------------------------------------------------------- uploads


def test_unusable_uploads_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="an image is missing: upload one first"):
        read_upload(None)
    broken = tmp_path / "broken.png"
    Image.new("RGB", (300, 200)).save(broken)
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match="the uploaded file cannot be used as an image: truncated"):
        read_upload(str(broken))
    broken.write_text("hello")
    with pytest.raises(ValueError, match="the uploaded file cannot be used as an image: not an image"):
        read_upload(str(broken))
    Image.new("RGB", (30, 20)).save(broken)
    monkeypatch.setattr("clipgen.app.uploads.MAX_UPLOAD_PIXELS", 599)
    with pytest.raises(ValueError, match="an image must have at most 0 million pixels, got 30 x 20"):
        read_upload(str(broken))


def test_large_uploads_are_kept_small(tmp_path, monkeypatch):
    Image.new("RGB", (300, 200)).save(tmp_path / "large.png")
    monkeypatch.setattr("clipgen.app.uploads.MAX_KEPT_SIDE", 150)
    assert read_upload(str(tmp_path / "large.png")).size == (150, 100)


def test_tokenizer_reports_codes_reconstruction_and_psnr(pipe):
    image = pipe(PROMPT, seed=0)[0]
    tokens = tokenize(pipe.vqgan, image.resize((64, 32)), pipe.image_size)
    assert tokens.original.size == tokens.reconstruction.size == (32, 32)
    assert (tokens.num_codes, tokens.codebook_size) == (64, 512) and 1 <= tokens.num_different <= 64
    difference = np.asarray(tokens.original, float) - np.asarray(tokens.reconstruction, float)
    assert tokens.psnr == pytest.approx(-10 * np.log10(np.square(difference / 255).mean()), abs=0.01)
    assert tokens.summary.startswith(f"PSNR {tokens.psnr:.2f} dB; 64 codes")


# ------------------------------------------------------------------------------------------------------------ messages


def test_details_show_prompt_seed_and_settings_as_text(store):
    result = served(store, builders.text_request(SETTINGS, "<script>alert(1)</script>"))[-1].results[0]
    table = results.details(result)
    assert "<script>" not in table and "&lt;script&gt;" in table
    assert "top k 300, top p 0.8" in table and "<td>5</td>" in table


def test_errors_become_sentences(caplog):
    assert ">There is no image.</div>" in error_status(ValueError("there is no image"))
    assert ">top_p must be a number.</div>" in error_status(ValueError("top_p must be a number."))
    assert not caplog.records
    assert "The server failed (KeyError); its log contains the traceback." in error_status(KeyError("secret"))
    assert "secret" in caplog.text


# ------------------------------------------------------------------------------------------------------ command, server


def test_modules_that_the_page_needs_at_first_import_no_torch():
    code = (
        "import sys; import clipgen.app.models, clipgen.app.results, clipgen.app.settings, clipgen.app.server, "
        "clipgen.cli.app; assert 'torch' not in sys.modules and 'gradio' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_app_of_a_space_equals_the_page_and_the_command():
    app = (ROOT / "scripts" / "space" / "app.py").read_text()
    page = (ROOT / ".github" / "docs" / "web_page.md").read_text(encoding="utf-8")
    assert app == "from clipgen.app.server import serve\n\nserve()\n" and f"```py\n{app}```" in page
    main = (ROOT / "clipgen" / "app" / "__main__.py").read_text()
    body = main.partition('"""\n\n')[2].replace('if __name__ == "__main__":\n    ', "").split()
    assert body == app.split()


def test_space_runs_a_version_of_gradio_that_the_extra_allows():
    head = yaml.safe_load((ROOT / "scripts" / "space" / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (head["sdk"], head["app_file"]) == ("gradio", "app.py")
    major, minor, _ = map(int, head["sdk_version"].split("."))
    assert major == 6 and minor >= 27


def test_command_without_gradio_says_what_to_install(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["clipgen-app"])
    with pytest.raises(ImportError, match=r"clipgen-app needs Gradio: pip install 'gradio"):
        command.run()


def test_command_names_a_missing_checkpoint(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["clipgen-app", "--checkpoint", "nowhere"])
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        command.run()


def test_stop_does_not_wait_for_a_request_that_starts_afterwards():
    running = RunningRequests()
    first = ExitStack()
    stopped = first.enter_context(running.register("one"))
    stop = threading.Thread(target=running.stop, args=("one", 60))
    stop.start()
    assert stopped.wait(10)
    with running.register("one") as another:
        first.close()
        stop.join(10)
        assert not stop.is_alive() and not another.is_set()


def test_stop_waits_for_the_end_of_the_requests_of_one_visitor():
    """Return only then, so that no late row replaces the message of the page."""
    running = RunningRequests()
    ended = []

    def work(visitor, stopped):
        stopped.wait(10)
        time.sleep(0.2)
        ended.append(visitor)

    def request(visitor, registered):
        with running.register(visitor) as stopped:
            registered.set()
            work(visitor, stopped)

    threads = []
    for visitor in ("one", "two"):
        registered = threading.Event()
        threads.append(threading.Thread(target=request, args=(visitor, registered)))
        threads[-1].start()
        assert registered.wait(10)
    running.stop("one", timeout=10)
    assert ended == ["one"]
    running.stop("two")  # does not wait
    assert ended == ["one"]
    running.stop("nobody", timeout=10)
    for thread in threads:
        thread.join(10)
    assert ended == ["one", "two"]


def test_hub_is_closed_to_visitors_of_a_public_page(monkeypatch):
    stores = []

    class Entered(Exception):
        """Ends the server before it starts."""

    def running_page(store, host, port):
        stores.append((store.allow_hub, host))
        raise Entered

    monkeypatch.setattr("clipgen.app.server.running_page", running_page)
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    from clipgen.app.server import serve

    for options in ({}, {"host": "0.0.0.0"}, {"host": "0.0.0.0", "allow_hub": True}):
        with pytest.raises(Entered):
            serve(**options)
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    with pytest.raises(Entered):
        serve()
    assert stores == [(True, "127.0.0.1"), (False, "0.0.0.0"), (True, "0.0.0.0"), (False, "0.0.0.0")]


def test_sweep_uses_the_parameters_of_the_settings():
    request = builders.sweep_request(SETTINGS._replace(temperature=0.5), PROMPT, "7", "0.5", 1)
    assert request.sweep == (SamplingParams(temperature=0.5, top_k=7, top_p=0.5),)
