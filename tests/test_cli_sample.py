"""``clipgen-sample``: pictures, what is written into them, which model draws them, and how it says no."""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import PROMPT, command, everything, trained
from conftest import needs_bf16
from PIL import Image

import clipgen
from clipgen.cli import sample
from clipgen.cli.list_runs import free_folder, newest_run
from clipgen.cli.sample import sentences_of
from clipgen.images import save_png

BUNDLED = Path(clipgen.__file__).parent / "bundled"
NAME = "00_a-large-blue-ring-on-a-white-background_{}.png"


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """(folder in which both stages were trained, run folder of stage 2)."""
    return trained(tmp_path_factory.getbasetemp())


@pytest.fixture
def call(call):
    return partial(call, "clipgen-sample")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_as_a_process_then_again_in_another_folder(call, runs, tmp_path):
    """The newest run is found and named; the same seed gives the same bytes, also when the run has moved."""
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


def test_what_is_written_into_the_pictures(call, runs, tmp_path):
    settings = ["--temperature", 0.7, "--top-k", 5, "--top-p", 0.8, "--guidance-scale", 2, "--seed", 3]
    assert call("--prompt", PROMPT, "--num-images", 2, "--checkpoint", runs[1], "--output", "s", *settings).code == 0
    for seed in (3, 4):
        picture = Image.open(tmp_path / "s" / NAME.format(seed))
        picture.load()
        assert picture.size == (32, 32) and picture.text["prompt"] == PROMPT
        assert picture.text["clipgen"] == clipgen.__version__ and json.loads(picture.text["seed"]) == seed
        names = ("temperature", "top_k", "top_p", "guidance_scale")
        assert [json.loads(picture.text[name]) for name in names] == [0.7, 5, 0.8, 2.0]


def test_several_prompts_make_one_grid(call, runs, tmp_path):
    prompts = [PROMPT, "a small red star on a black background", PROMPT]
    flags = [part for prompt in prompts for part in ("--prompt", prompt)]
    result = call(*flags, "--num-images", 2, "--checkpoint", runs[1], "--output", "s")
    assert result.code == 0 and len(result.stdout.splitlines()) == 1 + 3 * 2 + 1
    files = content(tmp_path / "s")
    assert len(files) == 7 and {name[:2] for name in files if name != "grid.png"} == {"00", "01", "02"}
    grid = Image.open(tmp_path / "s" / "grid.png")
    assert grid.height > grid.width  # three rows of two


def test_a_sheet_has_an_end(call, runs, monkeypatch, tmp_path):
    """Of thousands of pictures it would be more than viewers open, and than memory holds."""
    monkeypatch.setattr(sample, "SHEET", 4)
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n" * 3)
    result = call("--prompts-file", "prompts.txt", "--num-images", 2, "--checkpoint", runs[1], "--output", "s")
    assert result.stdout.splitlines()[-2:] == ["s/grid.png", "It shows the first 4 of 6 pictures"]
    assert len(content(tmp_path / "s")) == 7
    assert 2 * 128 < Image.open(tmp_path / "s" / "grid.png").height < 3 * 128


def test_a_name_of_any_prompt_is_a_file_name(call, runs, tmp_path):
    prompts = ["a/../../ring", "日本 ☃", "x" * 500]
    flags = [part for prompt in prompts for part in ("--prompt", prompt)]
    assert call(*flags, "--num-images", 1, "--checkpoint", runs[1], "--output", "s").code == 0
    assert {path for path in everything(tmp_path) if not path.startswith("s")} == set()
    assert [len(list((tmp_path / "s").glob(f"0{i}_*.png"))) for i in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("place", ["transformer", "checkpoints/last.ckpt", "checkpoints/best.ckpt"])
def test_other_names_of_the_same_run(call, runs, tmp_path, place):
    assert call("--prompt", PROMPT, "--num-images", 1, "--checkpoint", runs[1] / place, "--output", "s").code == 0
    assert (tmp_path / "s" / NAME.format(0)).is_file()


def test_the_newest_finished_run_is_taken(tmp_path):
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


def test_unfinished_runs_that_are_passed_over_are_named(tmp_path, monkeypatch, caplog):
    """But none that is older than the one that is taken, and no cache, which looks like a run of stage 2."""
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


def test_runs_are_listed(call, runs, monkeypatch):
    monkeypatch.chdir(runs[0])
    result = call("--list")
    assert result.code == 0
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["STAGE", "STEP", "BEST", "STATE", "PATH"]
    assert re.fullmatch(r"transformer +4 +val/cross_entropy \d\S* +finished +outputs/transformer/\S+", lines[0])
    assert re.fullmatch(r"vqgan +4 +val/loss \d\S* +finished +outputs/vqgan/\S+", lines[1])
    assert lines[2].startswith("Bundled: shapes")


def test_a_folder_without_runs_is_listed(call):
    assert "There are no runs below outputs/" in call("--list").stdout


def test_a_bare_sentence_is_a_prompt(call, runs, tmp_path):
    result = call("--num-images", 1, "a red ring", "--checkpoint", runs[1], "--output", "s", "a blue star")
    assert result.code == 0, result.stderr
    assert {path.name for path in (tmp_path / "s").glob("0*")} == {"00_a-red-ring_0.png", "01_a-blue-star_0.png"}
    assert sentences_of(["a", "red", "ring"]) == ["a red ring"] and sentences_of(["ring"]) == ["ring"]


def test_a_second_call_leaves_the_pictures_of_the_first(call, runs, tmp_path):
    for setting in (1, 5):
        assert call(*ONE, "--checkpoint", runs[1], "--output", "s", "--top-k", setting).code == 0
    found = [json.loads(Image.open(tmp_path / name / NAME.format(0)).text["top_k"]) for name in ("s", "s-2")]
    assert found == [1, 5] and (tmp_path / "s-2" / "grid.png").is_file()


def test_the_next_free_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert free_folder(Path("a/b"), "*.png") == Path("a/b")
    for name in (".", "a", "a-2"):
        Path(name).mkdir(exist_ok=True)
        Path(name, "x.png").touch()
    assert free_folder(Path("a"), "*.png") == Path("a-3") and free_folder(Path("."), "*.png") == Path("samples-2")


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ([PROMPT], ""),
        (["a red ring"], ""),
        (["a red ring on a blue background"], "has never seen a blue background"),
        (["a photo of a dog"], "does not know 'photo', 'of', 'dog'"),
        (["a red ring and a blue star"], "has never seen more than one shape"),
        (["--interpolate", PROMPT, "a red cat"], "does not know 'cat'"),
        (["--mix", "a red ring - a cat"], "does not know 'cat'"),
        (["--image", "photo.png"], "has never seen a photograph: photo"),
    ],
)
def test_the_bundled_model_says_what_it_knows(call, tmp_path, request_, told):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "photo.png")
    result = call("--num-images", 1, "--checkpoint", "shapes", "--output", "s", *request_)
    assert result.code == 0, result.stderr
    knows = "32 x 32 pixels" in result.stderr and "the backgrounds white, gray, black" in result.stderr
    assert told in result.stderr and knows == bool(told)


@pytest.mark.skipif(not (BUNDLED / "transformer").is_dir(), reason="no transformer is bundled with the package yet")
@pytest.mark.parametrize("arguments", [[], ["--checkpoint", "shapes"]], ids=["by default", "by name"])
def test_the_bundled_model(call, tmp_path, arguments):
    result = call("--prompt", PROMPT, "--num-images", 1, *arguments)
    assert result.code == 0 and result.stdout.splitlines()[0] == "Model: the bundled shapes model"
    assert Image.open(tmp_path / "samples" / NAME.format(0)).size == (32, 32)


# ---------------------------------------------------------------------------------------------------- clear refusals

ONE = ["--prompt", PROMPT, "--num-images", "1"]
OURS = [*ONE, "--checkpoint", "{transformer}"]
ERRORS = {
    "top_p": ([*OURS, "--top-p", "1.3"], r"top_p must be in \(0, 1\], got 1.3"),
    "top_p 0": ([*OURS, "--top-p", "0"], r"top_p must be in \(0, 1\], got 0.0"),
    "top_k": ([*OURS, "--top-k", "0"], "top_k must be at least 1, got 0"),
    "temperature": ([*OURS, "--temperature", "nan"], "temperature must be at least 0, got nan"),
    "guidance": ([*OURS, "--guidance-scale", "-1"], "guidance_scale must be at least 0, got -1.0"),
    "empty prompt": (["--prompt", ""], "prompt must not be empty, got ''"),
    "blank prompt": (["--prompt", PROMPT, "--prompt", " "], "prompt must not be empty, got ' '"),
    "no pictures": ([*OURS, "--num-images", "0"], "num_images must be at least 1, got 0"),
    "too few to choose from": ([*OURS, "--num-images", "4", "--rerank-from", "3"], "rerank_from must be at least"),
    "negative seed": ([*OURS, "--seed", "-1"], r"seed must be in \[0, 2\*\*63\), got -1"),
    "huge seed": ([*OURS, "--seed", "9" * 30], r"seed must be in \[0, 2\*\*63\), got 9+"),
    "unknown device": ([*OURS, "--device", "x"], "device"),
    "missing": ([*ONE, "--checkpoint", "x"], "x does not exist; `clipgen-train stage=transformer` makes one"),
    "empty": ([*ONE, "--checkpoint", "{vqgan}/pictures"], "pictures holds no such model"),
    "wrong stage, run": ([*ONE, "--checkpoint", "{vqgan}"], "is a VQGAN checkpoint .*Transformer is needed"),
    "wrong stage, folder": ([*ONE, "--checkpoint", "{vqgan}/vqgan"], "is a VQGAN checkpoint"),
    "wrong stage, file": ([*ONE, "--checkpoint", "{vqgan}/checkpoints/best.ckpt"], "is a VQGAN checkpoint"),
    "damaged": ([*ONE, "--checkpoint", "{tmp}/damaged.ckpt"], "damaged.ckpt is no readable checkpoint"),
    "damaged CLIP": ([*ONE, "--checkpoint", "{tmp}/broken"], "clip.json is damaged"),
    "output in a file": ([*OURS, "--output", "{tmp}/damaged.ckpt/s"], "output must be a folder .*, got .*s:"),
    "output is a file": ([*OURS, "--output", "{tmp}/damaged.ckpt"], "output must be .*damaged.ckpt: File exists"),
    "output that cannot be": ([*OURS, "--output", "/proc/none"], "output must be a folder .*, got /proc/none:"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_refusals(call, runs, tmp_path, name):
    """One sentence, no traceback, and nothing is left behind."""
    (tmp_path / "damaged.ckpt").write_bytes(b"PK\x03\x04 no checkpoint")
    shutil.copytree(runs[1] / "transformer", tmp_path / "broken" / "transformer")
    shutil.copytree(runs[1] / "vqgan", tmp_path / "broken" / "vqgan")
    (tmp_path / "broken" / "clip.json").write_text("{")
    places = {"vqgan": (runs[0] / "vqgan_run").resolve(), "transformer": runs[1], "tmp": tmp_path}
    before, (arguments, message) = everything(tmp_path), ERRORS[name]
    result = call(*(re.sub(r"\{(\w+)\}", lambda found: str(places[found[1]]), argument) for argument in arguments))
    assert result.code == 1 and result.stderr.count("\n") == 1
    assert re.search(f"^clipgen-sample: error: .*{message}", result.stderr), result.stderr
    assert everything(tmp_path) == before


def test_guidance_needs_a_null_condition(call, pipe, tmp_path, tiny_transformer):
    pipe.transformer.gpt.null = None
    pipe.transformer.hparams["cond_drop_prob"] = 0.0
    pipe.save(tmp_path / "pipe")
    before = everything(tmp_path)
    result = call(*ONE, "--checkpoint", "pipe", "--guidance-scale", 2)
    assert result.code == 1 and "train it with cond_drop_prob > 0" in result.stderr
    assert everything(tmp_path) == before


@pytest.mark.parametrize("arguments", [[], ["--prompt", "a", "--top-k", "many"]], ids=["no prompt", "no number"])
def test_the_command_line_itself(call, tmp_path, arguments):
    result = call(*arguments)
    assert result.code and "Traceback" not in result.stderr and everything(tmp_path) == set()
    assert re.search("clipgen-sample: error: .*--(prompt|top-k)", result.stderr)


def test_every_kind_of_request_at_once(call, runs, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\na small red star on a black background\n")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    result = call(
        "--prompts-file",
        "prompts.txt",
        "--image",
        "red.png",
        "--mix",
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
        "--complete",
        "red.png",
        "--preview",
    )
    assert result.code == 0, result.stderr
    files = content(tmp_path / "s")
    assert len([name for name in files if name[:2].isdigit()]) == 4 * 2
    assert {"grid.png", "preview.png"} < set(files) and any(name.startswith("interpolation_00") for name in files)


def test_strips_are_drawn_again_and_swept(call, runs, tmp_path):
    """What lies between two sentences, completed too, by each of the settings."""
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    options = ["--complete", "red.png", "--checkpoint", runs[1]]
    request = ["--interpolate", PROMPT, "a red star", "--num-images", 3, "--seed", 5, "--sweep", "top_k=1,9"]
    result = call(*request, *options, "--output", "a")
    assert result.code == 0, result.stderr
    strips = sorted((tmp_path / "a").iterdir())
    name = "interpolation_00_a-large-blue-ring-on-a-white-background_a-red-star{}.png"
    assert [strip.name for strip in strips] == [name.format("_top_k-1"), name.format("_top_k-9")]
    for number, strip in enumerate(strips):
        result = call("--from", strip, *options, "--output", number)
        assert result.code == 0, result.stderr
        assert (tmp_path / str(number) / name.format("")).read_bytes() == strip.read_bytes()
    result = call("--from", strips[0], "--checkpoint", runs[1])
    assert result.code == 1 and "completes a picture which it does not hold: give --complete" in result.stderr


@pytest.mark.parametrize(
    "request_",
    [
        ["--prompt", PROMPT],
        ["--mix", f"0.5 {PROMPT} + 0.5 a small red star"],
        pytest.param(["--prompt", PROMPT, "--dtype", "bfloat16"], marks=needs_bf16),
    ],
)
def test_a_picture_is_drawn_again_from_itself(call, runs, tmp_path, request_):
    settings = ["--temperature", 0.7, "--top-k", 5, "--guidance-scale", 2, "--seed", 3, "--checkpoint", runs[1]]
    assert call(*request_, "--num-images", 1, *settings, "--output", "a").code == 0
    (first,) = (tmp_path / "a").glob("00_*.png")
    result = call("--from", first, "--checkpoint", runs[1], "--output", "b")
    assert result.code == 0, result.stderr
    assert (tmp_path / "b" / first.name).read_bytes() == first.read_bytes()
    result = call("--from", first, "--checkpoint", "shapes", "--output", "c")
    assert result.code == 1 and "was drawn by another model than shapes" in result.stderr
    assert not (tmp_path / "c").exists()


def test_a_completed_picture_is_drawn_again(call, runs, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    drawing = ["--complete", "red.png", "--checkpoint", runs[1]]
    assert call("--prompt", PROMPT, "--num-images", 1, "--seed", 3, *drawing, "--output", "a").code == 0
    (first,) = (tmp_path / "a").glob("00_*.png")
    assert call("--from", first, *drawing, "--output", "b").code == 0
    assert (tmp_path / "b" / first.name).read_bytes() == first.read_bytes()


@pytest.mark.parametrize("more", [[], ["--complete", "red.png"]])
def test_a_variation_is_drawn_again(call, runs, tmp_path, more):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    request = ["--image", "red.png", *more, "--num-images", 1, "--seed", 3, "--top-k", 5]
    assert call(*request, "--checkpoint", runs[1], "--output", "a").code == 0
    (first,) = (tmp_path / "a").glob("00_*.png")
    again = ["--from", first, "--checkpoint", runs[1], "--output", "b"]
    assert call(*again, "--image", "red.png", *more).code == 0
    assert (tmp_path / "b" / first.name).read_bytes() == first.read_bytes()
    assert len(list((tmp_path / "b").glob("0*.png"))) == 1
    result = call(*again, *more)
    assert result.code == 1 and "was drawn of an image, which it does not hold: give --image" in result.stderr


def test_long_sentences_of_any_script(call, runs, tmp_path):
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


def test_pictures_stay_where_a_later_one_fails(call, runs, monkeypatch, tmp_path):
    """Also those of another process in the same folder."""
    calls = iter(range(100))

    def interrupted(*arguments):
        if next(calls) == 1:
            raise KeyboardInterrupt  # no signal: a shell's background jobs ignore it
        return save_png(*arguments)

    monkeypatch.setattr(clipgen.images, "save_png", interrupted)
    assert call("--prompt", PROMPT, "--num-images", 2, "--checkpoint", runs[1], "--output", "s").code == 130
    assert len(list((tmp_path / "s").glob("00_*.png"))) == 1


def test_progress_counts_all_images_and_decodes_each_once(call, runs, monkeypatch):
    from clipgen.vqgan import VQGAN

    done, decoded, decode = [], [], VQGAN.decode
    monkeypatch.setattr("clipgen.cli.sample.rate_bar", lambda name, total: nullcontext(done.append))
    monkeypatch.setattr(VQGAN, "decode", lambda self, indices: decoded.append(len(indices)) or decode(self, indices))
    request = [*ONE, "--interpolate", PROMPT, "a red star", "--sweep", "top_k=1,9", "--rerank-from", 3]
    assert call(*request, "--checkpoint", runs[1], "--output", "s").code == 0
    assert sum(done) == sum(decoded) == 2 * (3 + 2)


def test_a_sweep_is_one_labelled_sheet(call, runs, tmp_path):
    result = call(*ONE, "--checkpoint", runs[1], "--sweep", "top_k=1,5,9", "top_p=0.5,1.0", "--output", "s")
    assert result.code == 0, result.stderr
    pictures = [Image.open(path) for path in sorted((tmp_path / "s").glob("0*.png"))]
    found = [(json.loads(p.text["top_k"]), json.loads(p.text["top_p"])) for p in pictures]
    assert found == [(k, p) for k in (1, 5, 9) for p in (0.5, 1.0)]


def test_a_sweep_of_several_prompts_in_several_batches(call, runs, monkeypatch, tmp_path):
    monkeypatch.setattr("clipgen.generation.generator.BATCH", 4)
    prompts = [PROMPT, "a red star", "a green square"]
    flags = [part for prompt in prompts for part in ("--prompt", prompt)]
    options = ("--num-images", 2, "--sweep", "top_k=1,5", "--checkpoint", runs[1], "--output", "s")
    assert call(*flags, *options).code == 0
    pictures = [Image.open(path) for path in sorted((tmp_path / "s").glob("0*.png"))]
    found = [(p.text["prompt"], json.loads(p.text["top_k"]), json.loads(p.text["seed"])) for p in pictures]
    assert found == [(prompt, k, seed) for prompt in prompts for k in (1, 5) for seed in (0, 1)]
    sheet = np.asarray(Image.open(tmp_path / "s" / "grid.png"))  # six rows of two cells of 128, under them two lines
    for i, picture in enumerate(pictures):
        y, x = 6 + i // 2 * (sheet.shape[0] - 6) // 6, 6 + i % 2 * 134
        cell = sheet[y : y + 128, x : x + 128]
        assert np.array_equal(cell[:: 128 // picture.height, :: 128 // picture.width], np.asarray(picture))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "beauty=1"], "sweep must be KEY=VALUE,VALUE with a key of temperature, top_k"),
        (["--sweep", "top_k=a"], "sweep must be KEY=VALUE"),
        (["--sweep", "top_p=0.5,2"], r"top_p must be in \(0, 1\], got 2.0"),
        (["--image", "none.png"], "none.png"),
        (["--image", "text.png"], "text.png cannot be used as an image: not an image"),
        (["--from", "plain.png"], "plain.png is no picture of clipgen-sample"),
        (["--from", "text.png"], "text.png is no picture of clipgen-sample"),
        (["--mix", "a + "], "a mixture must be terms"),
        (["--prompts-file", "none.txt"], "No such file or directory: none.txt"),
        (["--prompts-file", "latin.txt"], "latin.txt must be a text in UTF-8"),
        (["--prompt", "a \udce9"], "prompt must be text in UTF-8"),
        (["--interpolate", "", "a red star"], "prompt must not be empty"),
        (["--mix", "1 a red star - 1 a red star"], "a mixture must have finite weights that are not all 0"),
        (["--from", "cut.png"], "cut.png is no picture of clipgen-sample"),
        (["--from", "completed.png"], "completed.png completes a picture which it does not hold: give --complete"),
    ],
)
def test_refused_requests(call, runs, tmp_path, arguments, message):
    (tmp_path / "text.png").write_text("text")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "latin.txt").write_bytes("a \u00e9".encode("latin-1"))
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:60])
    settings = dict(seed=0, temperature=1, top_k=1, top_p=1, guidance_scale=1, guidance_power=0, complete=0.5)
    save_png(Image.new("RGB", (8, 8)), tmp_path / "completed.png", {"prompt": PROMPT, **settings})
    before = everything(tmp_path)
    result = call(*ONE, *arguments, "--checkpoint", runs[1])
    assert result.code == 1 and re.search(message, result.stderr), result.stderr
    assert len(result.stderr.splitlines()) == 1 and everything(tmp_path) == before


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk(call, runs, tmp_path, existing):
    """The system refuses files of more than 100 bytes: no picture is half there."""
    resource = pytest.importorskip("resource")
    if existing:
        (tmp_path / "s").mkdir()
        (tmp_path / "s" / "mine.txt").write_text("precious")
    before, limit = everything(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        result = call(*ONE, "--checkpoint", runs[1], "--output", "s")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert result.code == 1 and re.fullmatch(r"clipgen-sample: error: File too large: s/\S+\.png\n", result.stderr)
    assert everything(tmp_path) == before
