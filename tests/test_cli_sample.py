"""``clipgen-sample``: files, metadata, the choice of the model, and error messages."""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import PROMPT, command, everything, trained
from conftest import needs_bf16
from PIL import Image

import clipgen
from clipgen.cli import sample_output
from clipgen.cli.image_metadata import read_metadata
from clipgen.cli.sample_request import join_words
from clipgen.images import save_png
from clipgen.runs import newest_run
from clipgen.sampling_params import SamplingParams
from clipgen.storage.output_folder import free_folder

NAME = "00_a-large-blue-ring-on-a-white-background_{}.png"


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Return the folder in which both stages were trained, and the run folder of stage 2."""
    return trained(tmp_path_factory.getbasetemp())


@pytest.fixture
def call(call):
    return partial(call, "clipgen-sample")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_installed_command_is_reproducible_after_moving_the_run(call, runs, tmp_path):
    """The newest run is the default and its name is printed."""
    folder, run = runs
    request = ["--prompt", PROMPT, "--num-images", 3, "--seed", 7]
    done = command("clipgen-sample", *request, "--output", tmp_path / "a", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"Model: {run.relative_to(folder)}" and "Traceback" not in done.stderr
    assert set(content(tmp_path / "a")) == {NAME.format(seed) for seed in (7, 8, 9)} | {"grid.png"}

    moved = shutil.copytree(run, tmp_path / "moved")
    again = call(*request, "--checkpoint", moved, "--output", "b")
    assert again.code == 0 and again.stdout.splitlines()[0] == f"Model: {moved}"
    assert content(tmp_path / "b") == content(tmp_path / "a")


def test_png_metadata_holds_prompt_seed_and_sampling_parameters(call, runs, tmp_path):
    settings = ["--temperature", 0.7, "--top-k", 5, "--top-p", 0.8, "--guidance-scale", 2, "--seed", 3]
    assert call("--prompt", PROMPT, "--num-images", 2, "--checkpoint", runs[1], "--output", "s", *settings).code == 0
    for seed in (3, 4):
        image = Image.open(tmp_path / "s" / NAME.format(seed))
        image.load()
        assert image.size == (32, 32) and image.text["prompt"] == PROMPT
        assert image.text["clipgen"] == clipgen.__version__ and json.loads(image.text["seed"]) == seed
        names = ("temperature", "top_k", "top_p", "guidance_scale")
        assert [json.loads(image.text[name]) for name in names] == [0.7, 5, 0.8, 2.0]


def test_several_prompts_make_one_grid(call, runs, tmp_path):
    prompts = [PROMPT, "a small red star on a black background", PROMPT]
    flags = [part for prompt in prompts for part in ("--prompt", prompt)]
    result = call(*flags, "--num-images", 2, "--checkpoint", runs[1], "--output", "s")
    assert result.code == 0 and len(result.stdout.splitlines()) == 1 + 3 * 2 + 1
    files = content(tmp_path / "s")
    assert len(files) == 7 and {name[:2] for name in files if name != "grid.png"} == {"00", "01", "02"}
    grid = Image.open(tmp_path / "s" / "grid.png")
    assert grid.height > grid.width  # three rows of two


def test_grid_is_limited_to_the_first_images(call, runs, monkeypatch, tmp_path):
    monkeypatch.setattr(sample_output, "MAX_GRID_IMAGES", 4)
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n" * 3)
    result = call("--prompts-file", "prompts.txt", "--num-images", 2, "--checkpoint", runs[1], "--output", "s")
    assert result.stdout.splitlines()[-2:] == ["s/grid.png", "The grid shows the first 4 of 6 images"]
    assert len(content(tmp_path / "s")) == 7
    assert 2 * 128 < Image.open(tmp_path / "s" / "grid.png").height < 3 * 128


def test_any_prompt_makes_a_valid_file_name(call, runs, tmp_path):
    prompts = ["a/../../ring", "日本 ☃", "x" * 500]
    flags = [part for prompt in prompts for part in ("--prompt", prompt)]
    assert call(*flags, "--num-images", 1, "--checkpoint", runs[1], "--output", "s").code == 0
    assert {path for path in everything(tmp_path) if not path.startswith("s")} == set()
    assert [len(list((tmp_path / "s").glob(f"0{i}_*.png"))) for i in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("place", ["transformer", "checkpoints/last.ckpt", "checkpoints/best.ckpt"])
def test_checkpoint_may_be_a_part_of_a_run(call, runs, tmp_path, place):
    assert call("--prompt", PROMPT, "--num-images", 1, "--checkpoint", runs[1] / place, "--output", "s").code == 0
    assert (tmp_path / "s" / NAME.format(0)).is_file()


def test_newest_finished_run_is_the_default(tmp_path):
    assert newest_run(tmp_path / "outputs") is None
    for age, name in enumerate(("transformer/2026-01-02", "mine", "transformer/2026-01-01")):
        file = tmp_path / "outputs" / name / "transformer" / "config.json"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (1e9 - age, 1e9 - age))
    (tmp_path / "outputs/transformer/unfinished/checkpoints").mkdir(parents=True)
    (tmp_path / "outputs/vqgan/later/vqgan").mkdir(parents=True)
    (tmp_path / "outputs/vqgan/later/vqgan/config.json").touch()
    assert newest_run(tmp_path / "outputs") == str(tmp_path / "outputs" / "transformer/2026-01-02")
    os.utime(tmp_path / "outputs/mine/transformer/config.json")
    assert newest_run(tmp_path / "outputs") == str(tmp_path / "outputs" / "mine")


def test_newer_unfinished_runs_are_logged(tmp_path, monkeypatch, caplog):
    """Older runs are not logged, nor a token cache, which looks like a run of stage 2."""
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("late", "taken", "early")):
        run = Path("outputs", name)
        file = run / ("transformer/config.json" if name == "taken" else "checkpoints/last.ckpt")
        file.parent.mkdir(parents=True)
        file.touch()
        (run / "clip.json").touch()
        os.utime(file, (1e9 - age, 1e9 - age))
    cache = Path("outputs/cache/vqgan/config.json")
    cache.parent.mkdir(parents=True)
    cache.touch()
    (Path("outputs/cache") / "clip.json").touch()
    assert newest_run(Path("outputs")) == "outputs/taken"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("Passed over outputs/late, which is not finished: clipgen-train resume=outputs/late")


def test_list_shows_the_runs(call, runs, monkeypatch):
    monkeypatch.chdir(runs[0])
    result = call("--list")
    assert result.code == 0
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["STAGE", "STEP", "BEST", "STATE", "PATH"]
    assert re.fullmatch(r"transformer +4 +val/cross_entropy \d\S* +finished +outputs/transformer/\S+", lines[0])
    assert re.fullmatch(r"vqgan +4 +val/loss \d\S* +finished +outputs/vqgan/\S+", lines[1])
    assert lines[2].startswith("Bundled: shapes") and lines[3].startswith("Bundled: cifar10")


def test_list_says_that_there_are_no_runs(call):
    assert "There are no runs below outputs/" in call("--list").stdout


def test_positional_text_is_a_prompt(call, runs, tmp_path):
    result = call("--num-images", 1, "a red ring", "--checkpoint", runs[1], "--output", "s", "a blue star")
    assert result.code == 0, result.stderr
    assert {path.name for path in (tmp_path / "s").glob("0*")} == {"00_a-red-ring_0.png", "01_a-blue-star_0.png"}
    assert join_words(["a", "red", "ring"]) == ["a red ring"] and join_words(["ring"]) == ["ring"]


def test_second_call_writes_to_a_new_folder(call, runs, tmp_path):
    for setting in (1, 5):
        assert call(*ONE, "--checkpoint", runs[1], "--output", "s", "--top-k", setting).code == 0
    top_ks = [json.loads(Image.open(tmp_path / name / NAME.format(0)).text["top_k"]) for name in ("s", "s-2")]
    assert top_ks == [1, 5] and (tmp_path / "s-2" / "grid.png").is_file()


def test_free_folder_is_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert free_folder(Path("a/b"), "*.png") == Path("a/b")
    for name in (".", "a", "a-2"):
        Path(name).mkdir(exist_ok=True)
        Path(name, "x.png").touch()
    assert free_folder(Path("a"), "*.png") == Path("a-3") and free_folder(Path("."), "*.png") == Path("samples-2")


@pytest.mark.parametrize(
    ("request_", "remark"),
    [
        ([PROMPT], ""),
        (["a red ring"], ""),
        (["a red ring on a blue background"], "has never seen a blue background"),
        (["a photo of a dog"], "does not know 'photo', 'of', 'dog'"),
        (["a red ring and a blue star"], "has never seen more than one shape"),
        (["a white star"], "knows 'white' only before 'background': 'a white star'"),
        (["a black ring on a white background"], "knows 'black' only before 'background'"),
        (["a red ring on black"], "knows 'black' only before 'background'"),
        (
            ["a red ring on a white background and a black background"],
            "has never seen more than one background in an image",
        ),
        (["--interpolate", PROMPT, "a red cat"], "does not know 'cat'"),
        (["--prompt-mix", "a red ring - a cat"], "does not know 'cat'"),
        (["--image", "photo.png"], "has never seen a photograph: photo"),
        ([PROMPT, "--outpaint", "photo.png"], "has never seen a photograph: --outpaint"),
        (["--outpaint", "photo.png"], "has never seen a photograph: photo\nThis model generates"),
    ],
)
def test_bundled_model_names_unfamiliar_prompts(call, tmp_path, request_, remark):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "photo.png")
    result = call("--num-images", 1, "--checkpoint", "shapes", "--output", "s", *request_)
    assert result.code == 0, result.stderr
    knows = "32 x 32 pixels" in result.stderr and "the backgrounds white, gray, black" in result.stderr
    assert remark in result.stderr and knows == bool(remark)


@pytest.mark.parametrize(
    ("prompt", "remark"),
    [
        ("a photo of a horse", ""),
        ("a photo of a zebra", "does not know 'zebra'"),
        ("a photo of a cat and a dog", "has never seen two classes in an image"),
    ],
)
def test_bundled_cifar10_model_names_unfamiliar_prompts(call, tmp_path, prompt, remark):
    result = call("--prompt", prompt, "--num-images", 1, "--checkpoint", "cifar10", "--output", "s")
    assert result.code == 0, result.stderr
    assert remark in result.stderr and ("the classes airplane, automobile" in result.stderr) == bool(remark)
    image = Image.open(next((tmp_path / "s").glob("00_*.png")))
    assert image.size == (32, 32) and float(image.text["guidance_scale"]) == 4


@pytest.mark.parametrize("arguments", [[], ["--checkpoint", "shapes"]], ids=["by default", "by name"])
def test_bundled_model_is_the_default(call, tmp_path, arguments):
    result = call("--prompt", PROMPT, "--num-images", 1, *arguments)
    assert result.code == 0 and result.stdout.splitlines()[0] == "Model: the bundled shapes model"
    assert Image.open(tmp_path / "samples" / NAME.format(0)).size == (32, 32)


# ---------------------------------------------------------------------------------------------------- error messages

ONE = ["--prompt", PROMPT, "--num-images", "1"]
OURS = [*ONE, "--checkpoint", "{transformer}"]
ERRORS = {
    "top_p": ([*OURS, "--top-p", "1.3"], r"top_p must be in \(0, 1\], got 1.3"),
    "top_p 0": ([*OURS, "--top-p", "0"], r"top_p must be in \(0, 1\], got 0.0"),
    "top_k": ([*OURS, "--top-k", "0"], "top_k must be a whole number of at least 1, got 0"),
    "temperature": ([*OURS, "--temperature", "nan"], "temperature must be a finite number, got nan"),
    "guidance": ([*OURS, "--guidance-scale", "-1"], "guidance_scale must be at least 0, got -1.0"),
    "given twice": ([*OURS, "--top-k", "7", "--sweep", "top_k=1,2"], "top_k is given twice: leave out --top-k"),
    "swept twice": ([*OURS, "--sweep", "top_k=1,2", "--sweep", "top_k=3"], "top_k is swept twice: give all of its"),
    "reranked strip": (
        ["--interpolate", PROMPT, PROMPT, "--rerank-from", "8"],
        "not reranked: leave out --rerank-from",
    ),
    "nothing to keep": ([*OURS, "--keep-fraction", "0.25"], "--keep-fraction needs an image to complete"),
    "empty prompt": (["--prompt", ""], "prompt must not be empty, got ''"),
    "blank prompt": (["--prompt", PROMPT, "--prompt", " "], "prompt must not be empty, got ' '"),
    "no images": ([*OURS, "--num-images", "0"], "num_images must be at least 1, got 0"),
    "too few to choose from": ([*OURS, "--num-images", "4", "--rerank-from", "3"], "rerank_from must be at least"),
    "negative seed": ([*OURS, "--seed", "-1"], r"seed must be in \[0, 2\*\*63\), got -1"),
    "huge seed": ([*OURS, "--seed", "9" * 30], r"seed must be in \[0, 2\*\*63\), got 9+"),
    "unknown device": ([*OURS, "--device", "x"], "device"),
    "missing": ([*ONE, "--checkpoint", "x"], "x does not exist; `clipgen-train stage=transformer` makes one"),
    "empty": ([*ONE, "--checkpoint", "{vqgan}/grids"], "grids contains no such model"),
    "wrong stage, run": ([*ONE, "--checkpoint", "{vqgan}"], "is a VQGAN checkpoint .*Transformer is needed"),
    "wrong stage, folder": ([*ONE, "--checkpoint", "{vqgan}/vqgan"], "is a VQGAN checkpoint"),
    "wrong stage, file": ([*ONE, "--checkpoint", "{vqgan}/checkpoints/best.ckpt"], "is a VQGAN checkpoint"),
    "damaged": ([*ONE, "--checkpoint", "{tmp}/damaged.ckpt"], "damaged.ckpt is not a readable checkpoint"),
    "damaged CLIP": ([*ONE, "--checkpoint", "{tmp}/broken"], "clip.json is damaged"),
    "output in a file": ([*OURS, "--output", "{tmp}/damaged.ckpt/s"], "output must be a folder .*, got .*s:"),
    "output is a file": ([*OURS, "--output", "{tmp}/damaged.ckpt"], "output must be .*damaged.ckpt: File exists"),
    "output that cannot be": ([*OURS, "--output", "/proc/none"], "output must be a folder .*, got /proc/none:"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_invalid_arguments_exit_with_one_line(call, runs, tmp_path, name):
    """There is no traceback, and no file is left behind."""
    (tmp_path / "damaged.ckpt").write_bytes(b"PK\x03\x04 no checkpoint")
    shutil.copytree(runs[1] / "transformer", tmp_path / "broken" / "transformer")
    shutil.copytree(runs[1] / "vqgan", tmp_path / "broken" / "vqgan")
    (tmp_path / "broken" / "clip.json").write_text("{")
    places = {"vqgan": (runs[0] / "vqgan_run").resolve(), "transformer": runs[1], "tmp": tmp_path}
    before, (arguments, message) = everything(tmp_path), ERRORS[name]
    result = call(*(re.sub(r"\{(\w+)\}", lambda match: str(places[match[1]]), argument) for argument in arguments))
    assert result.code == 1 and result.stderr.count("\n") == 1
    assert re.search(f"^clipgen-sample: error: .*{message}", result.stderr), result.stderr
    assert everything(tmp_path) == before


def test_guidance_needs_a_null_condition(call, pipe, tmp_path, tiny_transformer):
    pipe.transformer.gpt.null = None
    pipe.transformer.hparams["conditioning"]["drop_prob"] = 0.0
    pipe.save(tmp_path / "pipe")
    before = everything(tmp_path)
    result = call(*ONE, "--checkpoint", "pipe", "--guidance-scale", 2)
    assert result.code == 1 and "train it with model.conditioning.drop_prob > 0" in result.stderr
    assert everything(tmp_path) == before


@pytest.mark.parametrize("arguments", [[], ["--prompt", "a", "--top-k", "many"]], ids=["no prompt", "no number"])
def test_argparse_errors_write_nothing(call, tmp_path, arguments):
    result = call(*arguments)
    assert result.code and "Traceback" not in result.stderr and everything(tmp_path) == set()
    assert re.search("clipgen-sample: error: .*--(prompt|top-k)", result.stderr)


def test_all_kinds_of_prompts_in_one_call(call, runs, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\na small red star on a black background\n")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    result = call(
        "--prompts-file",
        "prompts.txt",
        "--image",
        "red.png",
        "--prompt-mix",
        f"0.7 {PROMPT} - 0.1 a red star",
        "--interpolate",
        PROMPT,
        "a red star",
        "--num-images",
        2,
        "--checkpoint",
        runs[1],
        "--output",
        "s",
        "--outpaint",
        "red.png",
        "--preview",
    )
    assert result.code == 0, result.stderr
    files = content(tmp_path / "s")
    assert len([name for name in files if name[:2].isdigit()]) == 4 * 2
    assert {"grid.png", "preview.png"} < set(files) and any(name.startswith("interpolation_00") for name in files)


def test_interpolations_are_swept_and_reproduced(call, runs, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    options = ["--outpaint", "red.png", "--checkpoint", runs[1]]
    request = ["--interpolate", PROMPT, "a red star", "--num-images", 3, "--seed", 5, "--sweep", "top_k=1,9"]
    result = call(*request, *options, "--output", "a")
    assert result.code == 0, result.stderr
    strips = sorted((tmp_path / "a").iterdir())
    name = "interpolation_{:02d}_a-large-blue-ring-on-a-white-background_a-red-star{}.png"
    assert [strip.name for strip in strips] == [name.format(0, "_top_k-1"), name.format(1, "_top_k-9")]
    for number, strip in enumerate(strips):
        result = call("--reproduce", strip, *options, "--output", number)
        assert result.code == 0, result.stderr
        assert (tmp_path / str(number) / name.format(0, "")).read_bytes() == strip.read_bytes()
    result = call("--reproduce", strips[0], "--checkpoint", runs[1])
    assert result.code == 1 and "completes an image that it does not contain: give --outpaint" in result.stderr


def test_strips_of_a_sweep_do_not_overwrite_each_other(call, runs, tmp_path):
    """Signs are left out of file names, and long labels are cut."""
    pairs = ["--interpolate", PROMPT, "a red star", "--interpolate", PROMPT, "a red star"]
    sweep = ["--sweep", "guidance_power=-1,1", "guidance_scale=1.0000000001,1.0000000002"]
    sweep += ["temperature=1.00000000001,1.00000000002"]
    result = call(*pairs, *sweep, "--num-images", 2, "--checkpoint", runs[1], "--output", "s")
    assert result.code == 0, result.stderr
    strips = [Image.open(path).text for path in sorted((tmp_path / "s").iterdir())]
    names = ("guidance_power", "guidance_scale", "temperature")
    assert len(strips) == 16 and len({tuple(strip[name] for name in names) for strip in strips}) == 8


def test_sweep_may_be_repeated(call, runs, tmp_path):
    options = ["--sweep", "top_k=1,5", "--sweep", "top_p=0.5,1.0", "--num-images", 1]
    result = call("--prompt", PROMPT, *options, "--checkpoint", runs[1], "--output", "s")
    assert result.code == 0, result.stderr
    assert len([name for name in content(tmp_path / "s") if name != "grid.png"]) == 4


@pytest.mark.parametrize(
    "request_",
    [
        ["--prompt", PROMPT],
        ["--prompt-mix", f"0.5 {PROMPT} + 0.5 a small red star"],
        pytest.param(["--prompt", PROMPT, "--dtype", "bfloat16"], marks=needs_bf16),
    ],
)
def test_reproduce_gives_identical_bytes(call, runs, tmp_path, request_):
    settings = ["--temperature", 0.7, "--top-k", 5, "--guidance-scale", 2, "--seed", 3, "--checkpoint", runs[1]]
    assert call(*request_, "--num-images", 1, *settings, "--output", "a").code == 0
    (first,) = (tmp_path / "a").glob("00_*.png")
    result = call("--reproduce", first, "--checkpoint", runs[1], "--output", "b")
    assert result.code == 0, result.stderr
    assert (tmp_path / "b" / first.name).read_bytes() == first.read_bytes()
    for options in (["--top-k", 100], ["--rerank-from", 8], ["--outpaint", first], ["--seed", 0], ["--num-images", 4]):
        result = call("--reproduce", first, "--checkpoint", runs[1], "--output", "d", *options)
        assert result.code == 1 and f"leave out {options[0]}" in result.stderr, result.stderr
    result = call("--reproduce", first, "--checkpoint", "shapes", "--output", "c")
    assert result.code == 1 and "was generated by another model than shapes" in result.stderr
    assert not (tmp_path / "c").exists()


def test_reproduce_outpainted_image(call, runs, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    options = ["--outpaint", "red.png", "--keep-fraction", 0.25, "--checkpoint", runs[1]]
    assert call("--prompt", PROMPT, "--num-images", 1, "--seed", 3, *options, "--output", "a").code == 0
    (first,) = (tmp_path / "a").glob("00_*.png")
    assert json.loads(Image.open(first).text["keep_fraction"]) == 0.25
    del options[2:4]  # the metadata holds it
    assert call("--reproduce", first, *options, "--output", "b").code == 0
    assert (tmp_path / "b" / first.name).read_bytes() == first.read_bytes()


@pytest.mark.parametrize("more", [[], ["--outpaint", "red.png"]])
def test_reproduce_variation_of_an_image(call, runs, tmp_path, more):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    request = ["--image", "red.png", *more, "--num-images", 1, "--seed", 3, "--top-k", 5]
    assert call(*request, "--checkpoint", runs[1], "--output", "a").code == 0
    (first,) = (tmp_path / "a").glob("00_*.png")
    again = ["--reproduce", first, "--checkpoint", runs[1], "--output", "b"]
    assert call(*again, "--image", "red.png", *more).code == 0
    assert (tmp_path / "b" / first.name).read_bytes() == first.read_bytes()
    assert len(list((tmp_path / "b").glob("0*.png"))) == 1
    result = call(*again, *more)
    assert result.code == 1 and "was generated from an image, which it does not contain: give --image" in result.stderr


def test_reproduce_a_text_that_reads_like_the_description_of_an_image(call, runs, tmp_path):
    request = ["--prompt", "an image", "--interpolate", "an embedding", "an image", "--num-images", 2]
    assert call(*request, "--checkpoint", runs[1], "--output", "a").code == 0
    written = [*(tmp_path / "a").glob("00_*.png"), *(tmp_path / "a").glob("interpolation_*.png")]
    assert len(written) == 3
    for file in written:
        output = tmp_path / f"again-{file.stem}"
        assert call("--reproduce", file, "--checkpoint", runs[1], "--output", output).code == 0
        assert (output / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("entries", "kinds"),
    [
        ({"prompt": "an image"}, ["image"]),
        ({"prompt": "an embedding"}, ["embedding"]),
        ({"prompt": "a red star"}, ["text"]),
        ({"prompt": "an image", "prompt_kind": "text"}, ["text"]),
        ({"interpolate": ["an image", {"a": 1.0}], "steps": 2}, ["image", "mixture"]),
        ({"interpolate": ["an image", "a"], "steps": 2, "prompt_kind": ["text", "text"]}, ["text", "text"]),
    ],
)
def test_kind_of_a_prompt_is_read_also_from_images_of_older_versions(entries, kinds, tmp_path):
    settings = {"seed": 0, **asdict(SamplingParams())}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", settings | entries)
    assert read_metadata(tmp_path / "a.png").kinds == kinds


def test_unknown_kind_of_a_prompt_is_refused(tmp_path):
    settings = {"seed": 0, **asdict(SamplingParams())}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", settings | {"prompt": PROMPT, "prompt_kind": "music"})
    with pytest.raises(ValueError, match="prompt_kind must be one of text, mixture, image, embedding, got 'music'"):
        read_metadata(tmp_path / "a.png")


def test_long_prompts_in_any_script(call, runs, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa red star\r\n", encoding="utf-8")
    result = call(
        "--interpolate",
        "кот " * 40,
        "猫" * 90,
        "--prompts-file",
        "prompts.txt",
        "--num-images",
        2,
        "--checkpoint",
        runs[1],
        "--output",
        "s",
    )
    assert result.code == 0, result.stderr
    assert len(list((tmp_path / "s").glob("00_a-red-star_*"))) == 2


def test_finished_images_survive_an_interruption(call, runs, monkeypatch, tmp_path):
    calls = iter(range(100))

    def interrupted(*arguments):
        if next(calls) == 1:
            # Not by a signal, which background jobs of a shell ignore.
            raise KeyboardInterrupt
        return save_png(*arguments)

    monkeypatch.setattr(sample_output, "save_png", interrupted)
    assert call("--prompt", PROMPT, "--num-images", 2, "--checkpoint", runs[1], "--output", "s").code == 130
    assert len(list((tmp_path / "s").glob("00_*.png"))) == 1


def test_progress_counts_all_images_and_decodes_each_once(call, runs, monkeypatch):
    from clipgen.vqgan import VQGAN

    done, decoded, decode = [], [], VQGAN.decode
    monkeypatch.setattr("clipgen.cli.sample_output.progress_bar", lambda name, total: nullcontext(done.append))
    monkeypatch.setattr(VQGAN, "decode", lambda self, indices: decoded.append(len(indices)) or decode(self, indices))
    request = [*ONE, "--interpolate", PROMPT, "a red star", "--sweep", "top_k=1,9", "--rerank-from", 3]
    assert call(*request, "--checkpoint", runs[1], "--output", "s").code == 0
    assert sum(done) == sum(decoded) == 2 * (3 + 2)


def test_sampling_parameters_of_the_model_are_the_defaults(call, runs, tmp_path):
    run = shutil.copytree(runs[1], tmp_path / "run")
    assert json.loads((run / "sampling.json").read_text())["top_k"] == 300
    (run / "sampling.json").write_text('{"top_k": 7, "top_p": 0.5}')
    for name, options, expected in (("a", [], 7), ("b", ["--top-k", 3], 3), ("c", ["--sweep", "top_k=9"], 9)):
        result = call(*ONE, "--checkpoint", run, "--output", name, *options)
        assert result.code == 0, result.stderr
        info = Image.open(next((tmp_path / name).glob("00_*.png"))).text
        assert json.loads(info["top_k"]) == expected and json.loads(info["top_p"]) == 0.5


def test_sweep_generates_all_combinations(call, runs, tmp_path):
    result = call(*ONE, "--checkpoint", runs[1], "--sweep", "top_k=1,5,9", "top_p=0.5,1.0", "--output", "s")
    assert result.code == 0, result.stderr
    images = [Image.open(path) for path in sorted((tmp_path / "s").glob("0*.png"))]
    settings = [(json.loads(p.text["top_k"]), json.loads(p.text["top_p"])) for p in images]
    assert settings == [(k, p) for k in (1, 5, 9) for p in (0.5, 1.0)]


def test_sweep_over_several_prompts_and_batches(call, runs, monkeypatch, tmp_path):
    monkeypatch.setattr("clipgen.generation.generator.DECODE_BATCH_SIZE", 4)
    prompts = [PROMPT, "a red star", "a green square"]
    flags = [part for prompt in prompts for part in ("--prompt", prompt)]
    options = ("--num-images", 2, "--sweep", "top_k=1,5", "--checkpoint", runs[1], "--output", "s")
    assert call(*flags, *options).code == 0
    images = [Image.open(path) for path in sorted((tmp_path / "s").glob("0*.png"))]
    settings = [(p.text["prompt"], json.loads(p.text["top_k"]), json.loads(p.text["seed"])) for p in images]
    assert settings == [(prompt, k, seed) for prompt in prompts for k in (1, 5) for seed in (0, 1)]
    # Six rows of two cells of 128 pixels, each row with two lines of captions below.
    sheet = np.asarray(Image.open(tmp_path / "s" / "grid.png"))
    for i, image in enumerate(images):
        y, x = 6 + i // 2 * (sheet.shape[0] - 6) // 6, 6 + i % 2 * 134
        cell = sheet[y : y + 128, x : x + 128]
        assert np.array_equal(cell[:: 128 // image.height, :: 128 // image.width], np.asarray(image))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "beauty=1"], "sweep must be KEY=VALUE,VALUE with a key of temperature, top_k"),
        (["--sweep", "top_k=a"], "sweep must be KEY=VALUE"),
        (["--sweep", "top_p=0.5,2"], r"top_p must be in \(0, 1\], got 2.0"),
        (["--image", "none.png"], "none.png"),
        (["--image", "text.png"], "text.png cannot be used as an image: not an image"),
        (["--reproduce", "plain.png"], "plain.png is not an image of clipgen-sample"),
        (["--reproduce", "text.png"], "text.png is not an image of clipgen-sample"),
        (["--prompt-mix", "a + "], "a mixture must be terms"),
        (["--prompts-file", "none.txt"], "No such file or directory: none.txt"),
        (["--prompts-file", "latin.txt"], "latin.txt must be UTF-8 text"),
        (["--prompt", "a \udce9"], "prompt must be text in UTF-8"),
        (["--interpolate", "", "a red star"], "prompt must not be empty"),
        (["--prompt-mix", "1 a red star - 1 a red star"], "a mixture must have finite weights that are not all 0"),
        (["--reproduce", "cut.png"], "cut.png is not an image of clipgen-sample"),
        (
            ["--reproduce", "completed.png"],
            "completed.png completes an image that it does not contain: give --outpaint",
        ),
    ],
)
def test_invalid_prompts_exit_with_one_line(call, runs, tmp_path, arguments, message):
    (tmp_path / "text.png").write_text("text")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "latin.txt").write_bytes("a \u00e9".encode("latin-1"))
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:60])
    settings = dict(seed=0, temperature=1, top_k=1, top_p=1, guidance_scale=1, guidance_power=0, keep_fraction=0.5)
    save_png(Image.new("RGB", (8, 8)), tmp_path / "completed.png", {"prompt": PROMPT, **settings})
    before = everything(tmp_path)
    result = call("--prompt", PROMPT, *arguments, "--checkpoint", runs[1])
    assert result.code == 1 and re.search(message, result.stderr), result.stderr
    assert len(result.stderr.splitlines()) == 1 and everything(tmp_path) == before


@pytest.mark.parametrize("existing", [False, True])
def test_full_disk_leaves_no_partial_image(call, runs, tmp_path, existing):
    """Files of more than 1000 bytes are refused: a lock fits, but no image."""
    resource = pytest.importorskip("resource")
    if existing:
        (tmp_path / "s").mkdir()
        (tmp_path / "s" / "mine.txt").write_text("precious")
    before, limit = everything(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        result = call(*ONE, "--checkpoint", runs[1], "--output", "s")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert result.code == 1 and re.fullmatch(r"clipgen-sample: error: File too large: s/\S+\.png\n", result.stderr)
    assert everything(tmp_path) == before


def test_help_begins_with_the_prompts(call):
    result = call("--help")
    assert result.code == 0
    groups = [line for line in result.stdout.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert [group.partition(" ")[0].strip(":") for group in groups] == [
        "prompts",
        "images",
        "sampling",
        "model",
        "other",
    ]
    assert result.stdout.partition(groups[0])[2].split()[0] == "--prompt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"keep_fraction": 1.0}, r"keep_fraction must be in \(0, 1\), got 1.0"),
    ],
)
def test_reproduce_names_the_file_with_invalid_settings(call, tmp_path, change, message):
    settings = dict(seed=0, temperature=1.0, top_k=1, top_p=1.0, guidance_scale=1.0, guidance_power=0.0)
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"prompt": PROMPT, **settings, **change})
    result = call("--reproduce", "a.png", "--checkpoint", "shapes")
    assert result.code == 1
    assert re.fullmatch(f"clipgen-sample: error: a.png is not an image of clipgen-sample: {message}\n", result.stderr)
