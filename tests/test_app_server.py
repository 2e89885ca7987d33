"""The server of the web page, asked by programs."""

from __future__ import annotations

import re
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from page_server import SlowRows, served_page
from PIL import Image

from clipgen.app import limits
from clipgen.app.models import ModelStore
from clipgen.pipeline import TextToImage

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PROMPT = "a large blue ring on a white background"
# Model, number of images, seed, candidates, temperature, top-k, top-p, guidance scale and power.
SETTINGS = ("shapes", 2, "5", 0, 1.0, 300, 0.8, 1.0, 0.0)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with served_page(tmp_path_factory.mktemp("outputs")) as page:
        yield page


@pytest.fixture
def connect(page, tmp_path):
    clients = []

    def connect():
        gradio_client = pytest.importorskip("gradio_client")
        clients.append(gradio_client.Client(page.local_url, verbose=False, download_files=str(tmp_path)))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def files(folder) -> list[Path]:
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def test_page_loads_nothing_from_another_host(page):
    with urllib.request.urlopen(page.local_url) as answer:
        html = answer.read().decode()
    assert '"title":"clipgen"' in html
    assert not re.findall(r"<(?:script|img|iframe)[^>]+src=.(?:https?:)?//[^>]*", html)
    assert not re.findall(r"<link[^>]+stylesheet[^>]+href=.(?:https?:)?//[^>]*", html)


def test_program_gets_partial_images_and_files_with_metadata(connect):
    job = connect().submit(*SETTINGS, PROMPT, api_name="/text")
    status, gallery, _ = job.result()
    assert "2 images in" in status
    rows = [output[0] for output in job.outputs() if "Row" in output[0]]
    assert rows and all("of 8" in row for row in rows)  # a busy machine may leave out some rows
    image = Image.open(gallery["value"][1]["image"])
    assert image.size == (32, 32) and image.text["prompt"] == PROMPT and image.text["seed"] == "6"


def test_example_of_the_documentation_runs(page, connect):
    connect().close()
    text = (ROOT / ".github" / "docs" / "web_page.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```py\n(from gradio_client.*?)^```", text, re.DOTALL | re.MULTILINE)
    names = {}
    exec(compile(example.replace("http://127.0.0.1:7860/", page.local_url), "web_page.md", "exec"), names)
    assert "4 images in" in names["status"] and len(names["gallery"]["value"]) == 4


def test_only_the_requests_of_the_tabs_are_offered_to_programs(connect):
    api = connect().view_api(return_format="dict")
    names = {"/text", "/image", "/mixture", "/interpolation", "/completion", "/sweep"}
    assert set(api["named_endpoints"]) == names and not api["unnamed_endpoints"]


def test_error_is_a_sentence(connect):
    status = connect().predict(*SETTINGS, "  ", api_name="/text")[0]
    assert "Prompt must not be empty" in status and "role='alert'" in status
    status = connect().predict("/etc", *SETTINGS[1:], PROMPT, api_name="/text")[0]
    assert "The model must be one of the list, got &#x27;/etc&#x27;." in status


def test_cancelled_request_generates_no_further_rows(connect, monkeypatch):
    rows = SlowRows(monkeypatch, 0.3)
    job = connect().submit(*SETTINGS, PROMPT, api_name="/text")
    wait_until(lambda: rows.count >= 2)
    job.cancel()
    rows.assert_stopped()


def test_requests_are_served_one_after_the_other(connect, monkeypatch):
    rows = SlowRows(monkeypatch, 0.05)
    jobs = [connect().submit(*SETTINGS, PROMPT, api_name="/text") for _ in range(3)]
    for job in jobs:
        assert "2 images in" in job.result()[0]
    assert rows.count == 24 and rows.most_active == 1


def test_a_model_that_is_being_loaded_does_not_hold_up_other_visitors(connect, monkeypatch):
    loading = threading.Event()
    load = ModelStore.load

    def slow_load(self, name):
        if name != "shapes":
            assert loading.wait(30)
            raise ValueError("the model is gone")
        return load(self, name)

    monkeypatch.setattr(ModelStore, "load", slow_load)
    slow = connect().submit("outputs/slow", *SETTINGS[1:], PROMPT, api_name="/text")
    wait_until(lambda: slow.outputs())
    assert "2 images in" in connect().predict(*SETTINGS, PROMPT, api_name="/text")[0]
    loading.set()
    assert "The model is gone." in slow.result()[0]


def test_model_of_the_hub_is_loaded_by_its_name(tmp_path, monkeypatch):
    """A local folder stands for the hub."""
    gradio_client = pytest.importorskip("gradio_client")
    requests = []

    def snapshot_download(name, revision=None, token=None):
        requests.append((name, revision))
        if name != "me/shapes":
            raise OSError("404 Client Error")
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    pipe = TextToImage.load("shapes")
    pipe.save(tmp_path / "hub")
    with served_page(tmp_path / "outputs", allow_hub=True) as page:
        client = gradio_client.Client(page.local_url, verbose=False, download_files=str(tmp_path))
        status, gallery, _ = client.predict("hf-hub:me/shapes@v1", *SETTINGS[1:], PROMPT, api_name="/text")
        assert "2 images in" in status and requests == [("me/shapes", "v1")]
        image = Image.open(gallery["value"][0]["image"])
        assert image.text["model"] == pipe.fingerprint
        status = client.predict("hf-hub:me/missing", *SETTINGS[1:], PROMPT, api_name="/text")[0]
        assert "could not be downloaded: 404 Client Error" in status and "role='alert'" in status
        assert "2 images in" in client.predict(*SETTINGS, PROMPT, api_name="/text")[0]
        client.close()


def test_files_of_the_computer_are_not_served(page):
    for path in ("/etc/passwd", __file__):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{page.local_url}gradio_api/file={path}")


def test_large_uploads_are_refused(page):
    boundary = "end-of-part"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head.encode() + bytes(limits.MAX_UPLOAD_BYTES + 1) + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(f"{page.local_url}gradio_api/upload", body, headers)
    with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError), match=r"413|pipe|reset"):
        urllib.request.urlopen(request)


def test_waiting_requests_are_bounded(tmp_path, monkeypatch):
    gradio_client = pytest.importorskip("gradio_client")
    monkeypatch.setattr("clipgen.app.server.MAX_QUEUE_LENGTH", 1)
    monkeypatch.setattr("clipgen.app.page.MAX_ACTIVE", 1)
    rows = SlowRows(monkeypatch, 0.2)
    with served_page(tmp_path) as page:
        clients = [gradio_client.Client(page.local_url, verbose=False) for _ in range(3)]
        jobs = [clients[0].submit(*SETTINGS, PROMPT, api_name="/text")]
        wait_until(lambda: rows.count >= 1)
        jobs.append(clients[1].submit(*SETTINGS, PROMPT, api_name="/text"))
        time.sleep(0.5)
        with pytest.raises(Exception, match=r"(?i)queue is full"):
            clients[2].predict(*SETTINGS, PROMPT, api_name="/text")
        for job in jobs:
            assert "2 images in" in job.result()[0]


def test_files_of_earlier_requests_are_deleted(tmp_path, monkeypatch):
    gradio_client = pytest.importorskip("gradio_client")
    monkeypatch.setattr("clipgen.app.page.CLEANING_INTERVAL", 1)
    monkeypatch.setattr("clipgen.app.page.MAX_AGE", 3)
    with served_page(tmp_path) as page:
        folder = Path(page.GRADIO_CACHE)
        client = gradio_client.Client(page.local_url, verbose=False, download_files=False)
        client.predict(*SETTINGS, PROMPT, api_name="/text")
        assert any(file.name.endswith("_5.png") for file in files(folder))
        wait_until(lambda: not files(folder))
        client.predict(*SETTINGS, PROMPT, api_name="/text")
    assert not folder.exists()
