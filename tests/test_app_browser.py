"""The web page in a real browser. Skipped where Gradio, Playwright or Chromium is missing.

``CLIPGEN_SCREENSHOTS=FOLDER`` keeps the images of the page that the documentation shows.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import time
from pathlib import Path

import pytest
from conftest import SHARED
from page_server import SlowRows, served_page
from PIL import Image

from clipgen.data.shapes import ShapesDataset
from clipgen.images import to_pil
from clipgen.pipeline import TextToImage
from clipgen.sampling_params import SamplingParams

pytestmark = pytest.mark.slow
PROMPT = "a large blue ring on a white background"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--disable-quic"]
PROMPT_BOX = "#prompt textarea, #prompt input"
SEED_BOX = "#seed textarea, #seed input"
THUMBNAIL = "#gallery .thumbnail-item"
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
# Number of the photograph of a red car in the shard.
PHOTOGRAPH = 44
SCREENSHOTS = os.environ.get("CLIPGEN_SCREENSHOTS")


@pytest.fixture(scope="module")
def page_url(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    with served_page(outputs) as page:
        # Saved later, so that the page starts with the bundled model.
        pipe = TextToImage.load("shapes")
        pipe.params = SamplingParams(top_k=4096)
        pipe.save(outputs / "transformer" / "wide")
        yield page.local_url


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visitor:
    """A browser window with the page, and what it has requested."""

    def __init__(self, browser, url: str, **options):
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(30_000)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector(PROMPT_BOX)
        self.wait_for_text("#facts", "pixels from")

    @property
    def status(self) -> str:
        return self.page.inner_text("#status")

    def wait_for_text(self, selector: str, text: str) -> None:
        condition = "([selector, text]) => document.querySelector(selector)?.innerText.includes(text)"
        self.page.wait_for_function(condition, arg=[selector, text])

    def choose_model(self, label: str, fact: str) -> None:
        """Choose a model in the list, and wait until the page states a fact about it."""
        self.page.click("#model input")
        self.page.get_by_role("option", name=label).click()
        self.wait_for_text("#facts", fact)

    def wait_for_labels(self, labels: list[str], expected: list[str]) -> None:
        """Wait until those of the labels are visible that are expected, and no other."""
        condition = (
            "([labels, expected]) => { const spans = [...document.querySelectorAll('[data-testid=block-info]')];"
            " const shown = spans.filter((span) => span.checkVisibility()).map((span) => span.innerText.trim());"
            " return labels.every((label) => shown.includes(label) === expected.includes(label)); }"
        )
        self.page.wait_for_function(condition, arg=[labels, expected])

    def open_tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def generate(self, prompt: str = PROMPT) -> None:
        self.page.fill(PROMPT_BOX, prompt)
        self.page.click("#generate-text")

    def wait_for_images(self, number: int) -> None:
        """Wait until a request is finished and its images are loaded."""
        self.wait_for_text("#status", f"{number} image{'' if number == 1 else 's'} in")
        condition = (
            "([selector, number]) => { const images = [...document.querySelectorAll(selector + ' img')];"
            " return images.length === number && images.every((image) => image.complete && image.naturalWidth > 0); }"
        )
        self.page.wait_for_function(condition, arg=[THUMBNAIL, number])

    def choose(self, number: int) -> None:
        self.page.locator(THUMBNAIL).nth(number).click()
        self.page.wait_for_selector("#details table")

    def details(self) -> dict[str, str]:
        cells = self.page.locator("#details th, #details td").all_inner_texts()
        return dict(zip(cells[::2], cells[1::2]))

    def upload(self, tab: str, path: Path) -> None:
        self.open_tab(tab)
        self.page.locator("[role=tabpanel]:visible input[type=file]").set_input_files(path)

    def screenshot(self, name: str, **options) -> None:
        if SCREENSHOTS:
            self.page.mouse.move(0, 0)
            self.page.wait_for_timeout(300)
            path = Path(SCREENSHOTS) / f"app_{name}.png"
            self.page.screenshot(path=path, **options)
            Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


@pytest.fixture
def visit(browser, page_url):
    visitors = []

    def visit(**options) -> Visitor:
        visitors.append(Visitor(browser, page_url, **(options or DESKTOP)))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        visitor.context.close()
        assert visitor.problems == []
        foreign = [url for url in visitor.requests if not url.startswith((page_url, "data:", "blob:"))]
        assert foreign == []


def test_prompt_generates_images_whose_settings_are_shown(visit, tmp_path):
    visitor = visit()
    visitor.page.fill(SEED_BOX, "7")
    visitor.generate()
    visitor.wait_for_images(4)
    visitor.choose(2)
    details = visitor.details()
    assert details["Prompt"] == PROMPT and details["Seed"] == "9" and "top k 300" in details["Sampling"]
    visitor.screenshot("finished", full_page=True)
    with visitor.page.expect_download() as download:
        visitor.page.click("#download")
    assert download.value.suggested_filename == "a-large-blue-ring-on-a-white-background_9.png"
    download.value.save_as(tmp_path / "image.png")
    image = Image.open(tmp_path / "image.png")
    assert image.size == (32, 32) and image.text["seed"] == "9" and image.text["prompt"] == PROMPT


def test_enter_starts_and_rows_appear_before_the_image_is_complete(visit, monkeypatch):
    SlowRows(monkeypatch, 0.4)
    visitor = visit()
    visitor.page.fill(SEED_BOX, "7")
    visitor.page.fill(PROMPT_BOX, PROMPT)
    visitor.page.press(PROMPT_BOX, "Enter")
    visitor.wait_for_text("#status", "Row 4 of 8")
    visitor.page.wait_for_function(f"document.querySelectorAll('{THUMBNAIL} img').length === 4")
    # The upper part is opaque, the lower part is not there yet.
    alpha = visitor.page.evaluate(
        """async () => {
            const image = document.querySelector('#gallery .thumbnail-item img');
            await image.decode();
            const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            const at = (y) => context.getImageData(16, y, 1, 1).data[3];
            return [image.naturalWidth, image.naturalHeight, at(1), at(31)];
        }"""
    )
    assert alpha == [32, 32, 255, 0]
    visitor.screenshot("half")
    visitor.wait_for_images(4)


@pytest.mark.parametrize("key", ["click", "Escape"])
def test_stop_ends_the_generation(visit, monkeypatch, key):
    rows = SlowRows(monkeypatch, 0.4)
    visitor = visit()
    visitor.generate()
    visitor.wait_for_text("#status", "Row 2 of 8")
    if key == "click":
        visitor.page.click("#stop")
    else:
        visitor.page.keyboard.press("Escape")
    visitor.wait_for_text("#status", "Stopped.")
    rows.assert_stopped()
    assert visitor.status == "Stopped."


def test_leaving_the_page_ends_the_generation(visit, monkeypatch):
    rows = SlowRows(monkeypatch, 0.4)
    visitor = visit()
    visitor.generate()
    visitor.wait_for_text("#status", "Row 2 of 8")
    visitor.page.close()
    rows.assert_stopped()


def test_chosen_image_is_generated_again_and_varied(visit):
    visitor = visit()
    visitor.page.fill(SEED_BOX, "7")
    visitor.generate()
    visitor.wait_for_images(4)
    visitor.choose(1)
    visitor.page.click("#again")
    visitor.wait_for_images(1)
    visitor.choose(0)
    assert visitor.details()["Seed"] == "8"
    visitor.page.click("#more")
    visitor.wait_for_images(4)
    visitor.choose(0)
    details = visitor.details()
    assert details["Prompt"] == PROMPT and details["Seed"] != "8"
    visitor.page.click("#variations")
    # The gallery held four images already.
    visitor.page.wait_for_selector("#details", state="hidden")
    visitor.wait_for_images(4)
    visitor.choose(0)
    assert visitor.details()["Prompt"] == "an image"


def test_sweep_is_one_sheet(visit):
    visitor = visit()
    visitor.open_tab("Sweep")
    visitor.page.click("#generate-sweep")
    visitor.wait_for_images(6)
    sheet = visitor.page.wait_for_selector("#sheet img")
    assert sheet.evaluate("async (image) => { await image.decode(); return image.naturalHeight; }") > 3 * 160
    assert "top_k=100 top_p=0.8" in visitor.page.inner_text("#gallery")
    visitor.choose(2)
    assert "top k 100, top p 0.8" in visitor.details()["Sampling"]


@pytest.mark.parametrize(("tab", "button", "number"), [("Mix", "mixture", 4), ("Interpolate", "interpolation", 8)])
def test_each_tab_generates_its_number_of_images(visit, tab, button, number):
    visitor = visit()
    visitor.open_tab(tab)
    visitor.page.click(f"#generate-{button}")
    visitor.wait_for_images(number)


def test_broken_upload_is_explained_and_a_good_one_is_varied(visit, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("this is not an image")
    good = tmp_path / "good.png"
    Image.new("RGB", (32, 32), "red").save(good)
    visitor = visit()
    visitor.upload("Image", broken)
    visitor.wait_for_text("#status", "The uploaded file cannot be used as an image: not an image.")
    visitor.page.click("#generate-image")
    visitor.wait_for_text("#status", "The uploaded file cannot be used as an image: not an image.")
    visitor.page.get_by_label("Remove Image").locator("visible=true").click()
    visitor.upload("Image", good)
    visitor.wait_for_text("#status", "The image is uploaded.")
    visitor.page.click("#generate-image")
    visitor.wait_for_images(4)


def test_completion(visit, tmp_path):
    path = tmp_path / "upload.png"
    to_pil(ShapesDataset(1, seed=5).render([0]))[0].resize((96, 96), Image.Resampling.BICUBIC).save(path)
    visitor = visit()
    visitor.upload("Complete", path)
    visitor.wait_for_text("#status", "The image is uploaded.")
    visitor.page.click("#generate-completion")
    visitor.wait_for_images(4)


def test_tokenizer_shows_the_codes_of_a_photograph(visit, tmp_path):
    path = tmp_path / "upload.png"
    photograph().save(path)
    visitor = visit()
    visitor.choose_model("cifar10 (bundled)", "codebook of 4096")
    visitor.upload("Tokenizer", path)
    visitor.page.wait_for_selector("[role=tabpanel]:visible img")
    visitor.page.click("#tokenize")
    visitor.wait_for_text("#tokenizer-summary", "64 codes")
    assert "PSNR" in visitor.page.inner_text("#tokenizer-summary")
    visitor.page.wait_for_function("document.querySelectorAll('[role=tabpanel] img[src*=\"file=\"]').length >= 4")
    visitor.screenshot("tokenizer", full_page=True)


def photograph() -> Image.Image:
    """Return a photograph of CIFAR-10's validation images if these are there, else a generated image."""
    shards = sorted((SHARED / "data" / "cifar10").glob("val*.tar"))
    if not shards:
        return TextToImage.load("cifar10")("a photo of a ship", seed=0)[0]
    with tarfile.open(shards[0]) as tar:
        files = [member for member in tar if member.name.endswith(".jpg")]
        content = tar.extractfile(files[PHOTOGRAPH])
        assert content is not None
        return Image.open(io.BytesIO(content.read())).convert("RGB")


def test_two_visitors_are_served_in_turn_with_their_own_images(visit, monkeypatch):
    rows = SlowRows(monkeypatch, 0.1)
    first = visit()
    second = visit()
    first.generate()
    second.generate("a small red star on a black background")
    first.wait_for_images(4)
    second.wait_for_images(4)
    assert rows.most_active == 1
    first.choose(0)
    second.choose(0)
    assert first.details()["Prompt"] == PROMPT
    assert second.details()["Prompt"] == "a small red star on a black background"


def test_keyboard_reaches_a_chosen_image(visit):
    visitor = visit()
    visitor.page.focus(PROMPT_BOX)
    visitor.page.keyboard.type(PROMPT)
    visitor.page.keyboard.press("Enter")
    visitor.wait_for_images(4)
    for _ in range(60):
        visitor.page.keyboard.press("Tab")
        if visitor.page.evaluate("document.activeElement.matches('#gallery .thumbnail-item')"):
            break
    visitor.page.keyboard.press("Enter")
    visitor.page.wait_for_selector("#details table")


def test_examples_and_fields_follow_the_model(visit):
    visitor = visit()
    assert PROMPT in visitor.page.inner_text("#samples")
    visitor.choose_model("cifar10 (bundled)", "with guidance")
    visitor.wait_for_text("#samples", "a photo of a ship")
    visitor.page.get_by_text("a photo of a ship", exact=True).click()
    visitor.page.wait_for_function(f"document.querySelector('{PROMPT_BOX}').value === 'a photo of a ship'")
    visitor.page.click("#generate-text")
    visitor.wait_for_images(4)
    assert "does not know" not in visitor.status
    visitor.open_tab("Sweep")
    assert visitor.page.get_by_label("Prompt", exact=True).locator("visible=true").input_value() == "a photo of a horse"
    visitor.choose_model("shapes (bundled)", "without guidance")
    visitor.wait_for_text("#samples", PROMPT)


def test_tabs_show_the_settings_that_have_an_effect(visit):
    labels = ["Number of images", "Seed", "Candidates", "Top-p", "Guidance scale"]
    shown_by_tab = {
        "Interpolate": ["Seed", "Top-p", "Guidance scale"],
        "Sweep": ["Seed", "Guidance scale"],
        "Tokenizer": [],
        "Mix": labels,
    }
    visitor = visit()
    visitor.page.get_by_role("button", name="Sampling settings").click()
    visitor.wait_for_labels(labels, labels)
    for tab, expected in shown_by_tab.items():
        visitor.open_tab(tab)
        visitor.wait_for_labels(labels, expected)


def test_parameters_beyond_the_sliders_are_accepted(visit):
    """The range of a slider grows with the value of the model: here top-k 4096, above 1000."""
    visitor = visit()
    visitor.open_tab("Sweep")  # where the slider is hidden
    visitor.choose_model("wide", "pixels from")
    visitor.open_tab("Text")
    visitor.page.get_by_role("button", name="Sampling settings").click()
    visitor.page.wait_for_function("[...document.querySelectorAll('input[type=number]')].some(i => i.value === '4096')")
    visitor.generate()
    visitor.wait_for_images(4)
    visitor.choose(0)
    assert "top k 4096" in visitor.details()["Sampling"]


def test_unknown_model_is_a_sentence_and_the_page_stays_usable(visit):
    visitor = visit()
    visitor.page.fill("#model input", "/etc/passwd")
    visitor.page.keyboard.press("Enter")
    visitor.wait_for_text("#facts", "The model must be one of the list, got '/etc/passwd'.")
    visitor.generate()
    visitor.wait_for_text("#status", "The model must be one of the list")


def test_phone_shows_everything_in_one_column(visit):
    visitor = visit(**PHONE)
    visitor.page.tap("text=a small red star on a black background")
    visitor.page.tap("#generate-text")
    visitor.wait_for_images(4)
    assert visitor.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    # The images were scrolled into view.
    visitor.page.wait_for_timeout(1000)
    assert visitor.page.evaluate(
        "document.querySelector('#gallery').getBoundingClientRect().top < window.innerHeight / 2"
    )
    visitor.page.locator(THUMBNAIL).nth(0).tap()
    visitor.page.wait_for_selector("#details table")
    width = visitor.page.evaluate("document.querySelector('#details table').getBoundingClientRect().right")
    assert width <= 390
    visitor.screenshot("phone")


def test_colors_follow_the_system(visit):
    def background(visitor: Visitor) -> int:
        color = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in color.strip("rgba()").split(",")[:3])

    assert background(visit(color_scheme="light", **DESKTOP)) > 600
    dark = visit(color_scheme="dark", **DESKTOP)
    assert background(dark) < 150
    dark.page.fill(SEED_BOX, "4")
    dark.open_tab("Interpolate")
    dark.page.click("#generate-interpolation")
    dark.wait_for_images(8)
    dark.screenshot("dark")


def test_first_row_appears_within_seconds(visit):
    """Print the time from click to first row; the limit is generous, because other processes may share the cores."""
    visitor = visit()
    visitor.generate()
    visitor.wait_for_images(4)
    visitor.page.fill(PROMPT_BOX, "a small red star on a black background")
    start = time.perf_counter()
    visitor.page.click("#generate-text")
    visitor.page.wait_for_function(
        "/Row|Starting|Waiting/.test(document.querySelector('#status').innerText)", polling=10
    )
    visitor.page.wait_for_function("/Row| in /.test(document.querySelector('#status').innerText)", polling=10)
    seconds = time.perf_counter() - start
    print(f"click to first row: {seconds:.2f} s")
    assert seconds < 5
