"""Galleries of the paper's figures."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from clipgen.generation.gallery import gallery_names, load_gallery
from clipgen.sampling_params import SamplingParams
from clipgen.visualization import grid

FIGURES = ["fig1", "fig4", "fig5", "fig6", "fig7", "fig8", "fig9", "fig10"]
PAPER_SWEEP = [(100, 1.0), (300, 0.8), (300, 1.0), (600, 1.0), (900, 1.0)]


@pytest.fixture
def sample(call):
    return lambda *arguments: call("clipgen-sample", *arguments)


def test_there_is_a_gallery_per_figure(sample):
    assert gallery_names() == FIGURES
    listed = sample("--gallery", "list")
    assert listed.code == 0 and [line.split()[0] for line in listed.stdout.splitlines()] == FIGURES


@pytest.mark.parametrize("name", FIGURES)
def test_every_prompt_has_its_source_and_every_setting_is_valid(name):
    gallery = load_gallery(name)
    assert "arXiv:2203.00386" in gallery.source and gallery.title.startswith(f"Fig. {name.removeprefix('fig')},")
    assert gallery.prompts and all(prompt.text and prompt.source for prompt in gallery.prompts)
    params = [SamplingParams(**setting) for setting in gallery.settings]
    varied = [(setting.top_k, setting.top_p) for setting in params]
    assert varied == (PAPER_SWEEP if name in ("fig7", "fig8", "fig9") else [])


def test_poems_are_named_and_not_quoted():
    gallery = load_gallery("fig10")
    labels = [prompt.label for prompt in gallery.prompts]
    for author, label in zip(("Sara Teasdale", "Du Fu", "Matsuo Basho", "Wang Wei"), labels, strict=True):
        assert author in label
    texts = " ".join(prompt.text for prompt in gallery.prompts).lower()
    for line in ("feathery fire", "egrets", "frog jumps in", "osmanthus"):
        assert line not in texts


def test_gallery_is_one_labeled_sheet_that_says_what_the_bundled_model_is(sample, tmp_path):
    result = sample(
        "--gallery", "fig7", "--checkpoint", "shapes", "--num-images", 1, "--output", "s", "--device", "cpu"
    )
    assert result.code == 0 and "which does not know these words" in result.stderr
    assert len(list((tmp_path / "s").glob("*.png"))) == 5 + 1
    image = Image.open(next((tmp_path / "s").glob("03_*.png")))
    image.load()
    assert image.text["prompt"] == "A city bus driving on the city street" and json.loads(image.text["top_k"]) == 600


def test_heading_is_wrapped_above_the_grid():
    images = [Image.new("RGB", (8, 8), "red")] * 2
    plain, headed = grid(images), grid(images, heading=["a heading " * 10])
    assert headed.width == plain.width and headed.height > plain.height + 2 * 13
    assert headed.crop((0, headed.height - plain.height, headed.width, headed.height)).tobytes() == plain.tobytes()
    assert len(headed.crop((0, 0, headed.width, headed.height - plain.height)).getcolors()) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig2"], "gallery must be one of fig1, fig4, fig5, fig6, fig7, fig8, fig9, fig10, got 'fig2'"),
        (["../fig1"], "gallery must be one of fig1"),
        (["fig7", "--top-k", "5"], "gallery fig7 varies top_k: leave out --top-k"),
        (
            ["fig5", "--prompt", "x"],
            "gallery fig5 has its own prompts and settings: leave out other prompts and --sweep",
        ),
        (["fig5", "--sweep", "top_k=1,2"], "gallery fig5 has its own prompts and settings"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(sample, arguments, message):
    result = sample("--gallery", *arguments)
    assert result.code == 1 and result.stderr.startswith(f"clipgen-sample: error: {message}"), result.stderr
    assert result.stderr.count("\n") == 1
