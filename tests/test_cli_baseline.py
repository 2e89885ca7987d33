"""The command clipgen-baseline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import everything
from PIL import Image

from clipgen.cli.baseline import make_parser
from clipgen.cli.baseline_search import mean_caption_score
from clipgen.data.shapes import ALL_ATTRIBUTES
from clipgen.evaluation.sources import FolderImages

SEARCH = ["search", "--prompt", "x", "--generator", "none.pt"]


def test_vqgan_clip_writes_images_with_metadata(call, tmp_path):
    prompt = "a large blue ring on a white background"
    result = call(
        "clipgen-baseline",
        "vqgan-clip",
        "--prompt",
        prompt,
        "--steps",
        2,
        "--cutouts",
        2,
        "--num-images",
        2,
        "--seed",
        4,
        "--device",
        "cpu",
    )
    assert result.code == 0 and "CLIP score" in result.stdout, result.stderr
    name = "00_a-large-blue-ring-on-a-white-background_{}.png"
    assert {path.name for path in (tmp_path / "baseline").iterdir()} == {name.format(4), name.format(5), "grid.png"}
    image = Image.open(tmp_path / "baseline" / name.format(5))
    image.load()
    assert image.text["prompt"] == prompt and image.text["baseline"] == "vqgan-clip" and image.text["seed"] == "5"
    assert -1 <= float(image.text["clip_score"]) <= 1 and image.text["steps"] == "2"


SEARCH_OPTIONS = [
    "--generator",
    "run",
    "--prompt",
    str(ALL_ATTRIBUTES[3]),
    "--prompt",
    "a small red star on a black background",
    "--num-images",
    5,
    "--device",
    "cpu",
]


def test_class_writes_images_with_metadata(call, class_run):
    name = str(ALL_ATTRIBUTES[3])
    result = call(
        "clipgen-baseline",
        "class",
        "--checkpoint",
        "run",
        "--class",
        name,
        "--class",
        7,
        "--num-images",
        2,
        "--output",
        "labels",
        "--device",
        "cpu",
        "--guidance-power",
        1,
    )
    assert result.code == 0 and len(list(Path("labels").glob("0*.png"))) == 4, result.stderr
    image = Image.open(next(Path("labels").glob("0*.png")))
    image.load()
    assert image.text["guidance_power"] == "1.0" and image.text["top_k"] == "300"


def test_search_writes_the_best_images_and_all(call, class_run):
    result = call("clipgen-baseline", "search", *SEARCH_OPTIONS, "--k", 3, "--output", "best", "--save-all")
    assert result.code == 0 and len(list(Path("best").glob("0*.png"))) == 2, result.stderr
    assert len(list(Path("best/all").rglob("*.png"))) == 10
    image = Image.open(next(Path("best").glob("01_*.png")))
    image.load()
    curve = json.loads(image.text["curve"])
    assert len(curve) == 5 and curve[-1] == pytest.approx(float(image.text["clip_score"]))


def test_table_of_a_search_is_written_and_not_replaced(call, class_run):
    result = call(
        "clipgen-baseline", "search", *SEARCH_OPTIONS, "--table", "--seeds", 1, 2, "--threshold", 2, "--output", "t"
    )
    assert result.code == 0 and "> 5" in result.stdout, result.stderr
    report = json.loads(Path("t/search.json").read_text())
    assert [row["k"] for row in report["rows"]] == [1, 10, 20, 50, 100, 288]
    assert all(len(row["best"]) == 2 and row["needed"] == [None, None] for row in report["rows"])
    assert Image.open("t/search.png").width == 600  # Figure 2
    result = call("clipgen-baseline", "class", "--checkpoint", "run", "--class", 7, "--num-images", 1, "--output", "t")
    assert result.code == 0, result.stderr
    assert json.loads(Path("t/search.json").read_text()) == report and Path("t-2/grid.png").is_file()


def test_threshold_of_a_search_is_the_score_of_training_images_and_all_captions(two_folders, shapes_clip, tmp_path):
    texts = ["a large red star on a white background", "a small blue ring on a black background"]
    lines = [f"{number:03d}.png\t{text}" for number in range(24) for text in texts]
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    options = ["--prompt", "x", "--generator", "y", "--table", "--real-images", str(two_folders[0])]
    args = make_parser().parse_args(["search", *options, "--real-captions", str(tmp_path / "captions.txt")])
    images = torch.cat([batch for batch, _ in FolderImages(two_folders[0]).read(range(24))])
    expected = (shapes_clip.encode_image(images) @ shapes_clip.encode_text(texts).T).mean().item()
    assert mean_caption_score(args, shapes_clip) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vqgan-clip"], "a prompt is needed: give --prompt, --prompts-file or --captions"),
        (["vqgan-clip", "--prompt", " "], "prompt must not be empty"),
        (["vqgan-clip", "--prompt", "x", "--steps", "-1"], "steps must be at least 0, got -1"),
        (["vqgan-clip", "--prompt", "x", "--num-images", "0"], "num_images must be at least 1, got 0"),
        (["vqgan-clip", "--prompt", "x", "--checkpoint", "none"], "no ConditionalTransformer checkpoint: none"),
        (["search", "--prompt", "x", "--generator", "none"], "generator must be a run folder"),
        (
            ["search", "--prompt", "x", "--generator", "none", "--real-images", "x"],
            "real_images and real_captions must be",
        ),
        (["search", "--prompt", "x", "--generator", "none.pt"], "no TorchScript file none.pt"),
        ([*SEARCH, "--threshold", "0.3"], "--threshold needs --table or --protocol"),
        ([*SEARCH, "--seeds", "1"], "--seeds needs --table or --protocol"),
        ([*SEARCH, "--save-best"], "--save-best needs --table or --protocol"),
        ([*SEARCH, "--clip-input", "published"], "--clip-input needs --protocol"),
        ([*SEARCH, "--table", "--one-caption"], "--one-caption needs --protocol"),
        ([*SEARCH, "--table", "--k", "10"], "--k has no effect with --table and --protocol"),
        ([*SEARCH, "--protocol", "csc2516", "--seed", "0"], "--seed has no effect with --table and --protocol"),
        (["vqgan-clip", "--prompt", "x", "--split", "train"], "--split needs --captions"),
        (
            ["vqgan-clip", "--prompt", "x", "--vqgan", "a", "--clip", "b", "--checkpoint", "shapes"],
            "--checkpoint has no effect with both --vqgan and --clip",
        ),
        (
            ["biggan-clip", "--generator", "biggan:a", "--prompt", "x", "--class-temperature", "2"],
            "--class-temperature needs --max-classes",
        ),
        (
            ["class", "--class", "x", "--checkpoint", "none"],
            "no ClassConditionalTransformer checkpoint: none does not exist",
        ),
    ],
)
def test_errors_are_one_line(call, tmp_path, arguments, message):
    result = call("clipgen-baseline", *arguments)
    assert result.code == 1 and result.stderr.startswith(f"clipgen-baseline: error: {message}"), result.stderr
    assert result.stderr.count("\n") == 1 and everything(tmp_path) == set()
