"""The runner for Replicate: called directly, and served by cog's own HTTP server, without Docker."""

from __future__ import annotations

import base64
import importlib.util
import inspect
import io
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from PIL import Image

from clipgen import TextToImage
from clipgen.app import limits

FOLDER = Path(__file__).parents[1] / "scripts" / "replicate"
PROMPT = "a large blue ring on a white background"


def test_cog_yaml_names_files_that_exist():
    config = yaml.safe_load((FOLDER / "cog.yaml").read_text())
    assert set(config) == {"build", "run", "concurrency"}
    keys = {"gpu", "python_version", "system_packages", "python_requirements", "sdk_version"}
    assert set(config["build"]) == keys
    file, _, name = config["run"].partition(":")
    assert f"class {name}(BaseRunner)" in (FOLDER / file).read_text()
    requirements = (FOLDER / config["build"]["python_requirements"]).read_text()
    assert "git+https" in requirements and config["build"]["system_packages"] == ["git"]
    assert re.findall(r"^(\w+)==[\d.]+$", requirements, re.MULTILINE) == ["torch", "torchvision"]


def test_readme_states_the_defaults_of_the_runner(runner):
    """The stand-in for cog gives the inputs their defaults as plain values."""
    rows = re.findall(r"^\| (`.+`) \| (.+?) \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    stated = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names)}
    words = {None: {"the model's", "random", "none", "required"}, 4: {"4"}, True: {"true"}}
    inputs = inspect.signature(runner.run).parameters
    assert stated.keys() == inputs.keys()
    assert all(stated[name] in words[parameter.default] for name, parameter in inputs.items())


def load_runner(monkeypatch: pytest.MonkeyPatch, make_input: Callable[..., Any]) -> Any:
    """Return the class of the runner, loaded with a stand-in for cog and its ``Input``."""
    cog: Any = ModuleType("cog")
    cog.BaseRunner = object
    cog.Path = Path
    cog.Input = make_input
    cog.streaming = lambda function: function
    monkeypatch.setitem(sys.modules, "cog", cog)
    return runpy.run_path(str(FOLDER / "runner.py"))["Runner"]


@pytest.fixture
def bounds(monkeypatch) -> dict[str, dict[str, Any]]:
    """Return the arguments of ``Input`` by the name of the input."""
    run = load_runner(monkeypatch, lambda **arguments: arguments).run
    return {name: parameter.default for name, parameter in inspect.signature(run).parameters.items() if name != "self"}


def test_numbers_of_images_and_length_of_the_prompt_are_bounded_as_in_the_web_page(bounds):
    assert bounds["prompt"]["max_length"] == limits.MAX_PROMPT_LENGTH
    assert (bounds["num_images"]["le"], bounds["rerank_from"]["le"]) == (limits.MAX_IMAGES, limits.MAX_CANDIDATES)


def test_sampling_parameters_are_bounded_as_in_the_web_page(bounds):
    pytest.importorskip("gradio", reason="needs Gradio: pip install -e '.[app]'")
    from clipgen.app.controls import SLIDERS

    for name in ("temperature", "top_k", "top_p", "guidance_scale"):
        assert bounds[name]["le"] == SLIDERS[name].maximum


# ---------------------------------------------------------------------------------------------------- called directly


@pytest.fixture
def runner(monkeypatch, tmp_path) -> Any:
    """Return a Runner with the bundled model; a stand-in for cog gives its inputs their defaults."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = load_runner(monkeypatch, lambda description, default=None, **bounds: default)()
    assert not made.healthcheck()
    made.setup()
    assert made.healthcheck()
    return made


def test_runner_yields_rows_and_then_the_images_of_the_pipeline(runner):
    files = list(runner.run(PROMPT, num_images=2, seed=3, top_p=0.8))
    assert [file.name for file in files[-2:]] == ["0.png", "1.png"]
    assert files[-3].name.startswith("row-008-")
    expected = TextToImage.load("shapes")(PROMPT, 2, seed=3, top_p=0.8)
    for file, image in zip(files[-2:], expected):
        with Image.open(file) as written:
            assert written.tobytes() == image.tobytes()
            assert (written.info["prompt"], written.info["top_p"]) == (PROMPT, "0.8")


def test_runner_can_leave_out_the_rows_and_rerank(runner):
    files = list(runner.run(PROMPT, num_images=1, seed=3, rerank_from=4, stream_rows=False))
    assert [file.name for file in files] == ["0.png"]


def test_runner_keeps_the_files_of_the_last_prediction_only(runner):
    """The rows of each batch have files of their own."""
    runner.pipe.batch_size = lambda guided=False: 1
    files = list(runner.run(PROMPT, num_images=2, seed=3))
    assert all(file.is_file() for file in files) and len(set(files)) == len(files)
    assert any(file.name.startswith("row-001-") for file in files[1:])
    again = list(runner.run(PROMPT, num_images=1, seed=3))
    assert not files[0].parent.exists() and all(file.is_file() for file in again)


def test_runner_refuses_what_the_pipeline_refuses(runner):
    with pytest.raises(ValueError, match="rerank_from must be at least num_images"):
        list(runner.run(PROMPT, num_images=3, rerank_from=2))
    with pytest.raises(ValueError, match="prompt must not be empty"):
        list(runner.run(" "))


# ------------------------------------------------------------------------------------------- served by cog's own server


def schema(run: Any) -> dict[str, Any]:
    """Return what `cog build` derives from the signature of the runner: without it the server checks no input."""
    types = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
    properties = {}
    required = []
    for name, parameter in inspect.signature(run).parameters.items():
        if name == "self":
            continue
        annotation = getattr(parameter.annotation, "__name__", str(parameter.annotation))
        kind = next(types[key] for key in types if key in str(parameter.annotation) or key == annotation)
        field = parameter.default
        properties[name] = {"type": kind, "description": field.description}
        for bound, key in (("ge", "minimum"), ("le", "maximum"), ("max_length", "maxLength")):
            if getattr(field, bound) is not None:
                properties[name][key] = getattr(field, bound)
        if isinstance(field.default, (int, float)):
            properties[name]["default"] = field.default
        elif "Optional" not in str(parameter.annotation):
            required.append(name)
    output = {"type": "array", "items": {"type": "string", "format": "uri"}, "x-cog-array-type": "iterator"}
    inputs = {"type": "object", "properties": properties, "required": required}
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": {"/predictions": {"post": {"x-cog-streaming": True}}},
        "components": {"schemas": {"Input": inputs, "Output": output}},
    }


class CogServer:
    """The HTTP server of cog, which listens on a free port of this computer."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        """Send a request; return the status and the body."""
        call = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        call.add_header("Content-Type", "application/json")
        for name, value in headers.items():
            call.add_header(name, value)
        try:
            with urllib.request.urlopen(call, json.dumps(body).encode() if body else None, timeout=120) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def health(self) -> str:
        """Return the state that the server reports; "" while it does not answer."""
        try:
            return str(json.loads(self.request("GET", "/health-check")[1])["status"])
        except OSError:
            return ""

    def wait_until_ready(self, seconds: float, process: subprocess.Popen | None = None) -> bool:
        """Return whether the server becomes ready within some seconds, and before its process ends."""
        deadline = time.monotonic() + seconds
        while self.health() != "READY":
            if time.monotonic() > deadline or (process is not None and process.poll() is not None):
                return False
            time.sleep(0.1)
        return True


@pytest.fixture
def server(started_server) -> CogServer:
    """Wait until the server has finished the prediction of the test before: it refuses a second one meanwhile."""
    assert started_server.wait_until_ready(60)
    return started_server


@pytest.fixture(scope="module")
def started_server(tmp_path_factory) -> Iterator[CogServer]:
    """Start the server, and wait until the pipeline is loaded."""
    if importlib.util.find_spec("coglet") is None:
        pytest.skip("needs the server of cog: pip install cog")
    folder = tmp_path_factory.mktemp("cog")
    (folder / "runner.py").write_text((FOLDER / "runner.py").read_text())
    run = runpy.run_path(str(FOLDER / "runner.py"))["Runner"].run
    (folder / ".cog").mkdir()
    (folder / ".cog" / "openapi_schema.json").write_text(json.dumps(schema(run)))
    server = CogServer()
    # The server starts its worker as the "python" of PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    root = str(FOLDER.parents[1])
    environment = {**os.environ, "PATH": path, "PORT": str(server.port), "COG_PREDICT_TYPE_STUB": "runner.py:Runner"}
    environment |= {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            assert server.wait_until_ready(240, process), (folder / "log").read_text()[-3000:]
            yield server
        finally:
            process.terminate()
            process.wait(30)


def test_servers_of_two_processes_have_different_ports():
    first = CogServer()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first.port))
        assert CogServer().port != first.port


@pytest.mark.slow
def test_server_answers_a_prediction_with_images(server):
    inputs = {"prompt": PROMPT, "num_images": 2, "seed": 0, "stream_rows": False}
    status, body = server.request("POST", "/predictions", {"input": inputs})
    answer = json.loads(body)
    assert status == 200 and answer["status"] == "succeeded", answer
    images = [Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))) for data in answer["output"]]
    assert [image.size for image in images] == [(32, 32)] * 2
    assert images[1].info["seed"] == "1"


@pytest.mark.slow
def test_server_streams_the_rows(server):
    inputs = {"prompt": PROMPT, "seed": 0}
    status, body = server.request("POST", "/predictions", {"input": inputs}, Accept="text/event-stream")
    assert status == 200, body
    events = [line.removeprefix("event: ") for line in body.decode().splitlines() if line.startswith("event: ")]
    assert events[0] == "start" and events[-1] == "completed"
    assert events.count("output") >= 4 + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"prompt": PROMPT, "num_images": 99},
        {"prompt": PROMPT, "top_p": "x"},
        {"prompt": "x" * 1001},
        {"prompt": PROMPT, "guidance_scale": 1e308},
    ],
)
def test_server_refuses_bad_input(server, inputs):
    assert server.request("POST", "/predictions", {"input": inputs})[0] == 422


@pytest.mark.slow
def test_server_reports_what_the_pipeline_refuses(server):
    status, body = server.request("POST", "/predictions", {"input": {"prompt": " "}})
    answer = json.loads(body)
    assert answer["status"] == "failed" and "prompt must not be empty" in answer["error"], (status, answer)


@pytest.mark.slow
def test_cancelled_prediction_stops_and_the_next_one_is_answered(server):
    inputs = {"prompt": PROMPT, "num_images": 16, "rerank_from": 64}
    assert server.request("PUT", "/predictions/a", {"input": inputs}, Prefer="respond-async")[0] == 202
    assert server.request("POST", "/predictions/a/cancel", {})[0] == 200
    assert server.wait_until_ready(30)
    status, body = server.request("POST", "/predictions", {"input": {"prompt": PROMPT, "num_images": 1, "seed": 0}})
    assert status == 200 and json.loads(body)["status"] == "succeeded"
