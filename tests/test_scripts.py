"""The scripts that the documentation uses: they run from any folder, and reuse only what fits."""

from __future__ import annotations

import json
import math
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import bundle
import compare_runs
import fuzz
import pytest
import repository_address
import torch
import train_classifier
import train_clip
import train_generator
import train_shapes_clip
import webdataset as wds
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from train_clip import one_cycle

from clipgen import __main__ as clipgen_main
from clipgen.baselines import load_generator
from clipgen.bundled import BUNDLED
from clipgen.clip import FrozenCLIP
from clipgen.data.shapes import ALL_ATTRIBUTES
from clipgen.evaluation.shapes_evaluator import accuracy
from clipgen.nonfinite import NonFiniteError
from clipgen.pipeline import TextToImage
from clipgen.sampling_params import SamplingParams

ROOT = Path(__file__).parents[1]


@pytest.fixture
def shards(tmp_path) -> Path:
    """Return a folder of shards with two classes and their names."""
    (tmp_path / "shards").mkdir()
    for split, number in (("train", 16), ("val", 4)):
        with wds.TarWriter(str(tmp_path / "shards" / f"{split}-000000.tar")) as writer:
            for i in range(number):
                image = Image.new("RGB", (32, 32), (i * 10, 99, 0))
                writer.write({"__key__": f"{i:03d}", "png": image, "cls": i % 2})
    (tmp_path / "shards" / "classes.json").write_text(json.dumps(["cat", "dog"]))
    return tmp_path / "shards"


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 10, 11, 1500])
@pytest.mark.parametrize("warmup", [0.1, 0.2])
def test_learning_rate_follows_one_cycle_for_any_number_of_steps(steps, warmup):
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    schedule = one_cycle(optimizer, 1.0, steps, warmup)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert all(0 < rate <= 1 for rate in rates) and rates[0] < 0.1
    assert steps < 3 or max(rates) > 0.5


def test_one_cycle_equals_that_of_torch():
    optimizers = [torch.optim.AdamW([torch.zeros(1, requires_grad=True)]) for _ in range(2)]
    ours = one_cycle(optimizers[0], 1.0, 100, 0.1)
    torchs = torch.optim.lr_scheduler.OneCycleLR(optimizers[1], 1.0, total_steps=100, pct_start=0.1)
    assert ours.state_dict() == torchs.state_dict()


def run_module(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run ``python -m clipgen`` with arguments."""
    return subprocess.run([sys.executable, "-m", "clipgen", *arguments], cwd=cwd, capture_output=True, text=True)


def test_module_without_arguments_lists_the_scripts(tmp_path):
    done = run_module(cwd=tmp_path)
    assert done.returncode == 1 and "make_shards" in done.stderr and "train_clip" in done.stderr


def test_script_runs_from_any_folder(tmp_path):
    """This script imports another one; its help needs no data."""
    done = run_module("recognize", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "usage: recognize.py" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["held_out", "nope"], "nope"),
        (["bundle", "shapes", "nope"], "nope"),
        (["reconstruct", "--vqgan", "nope", "--images", "shapes"], "nope"),
        (["reconstruct", "--vqgan", "shapes", "--images", "shapes", "--image-size", "33"], "33"),
    ],
)
def test_errors_of_scripts_are_one_line(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("sys.argv", ["clipgen", *arguments])
    with pytest.raises(SystemExit) as exit_:
        clipgen_main.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 1 and line.startswith(f"{arguments[0]}.py: error: ") and message in line


def test_template_of_a_clip_needs_the_class_and_may_hold_braces(shards, tmp_path, monkeypatch, capsys):
    options = ["train_clip.py", "--data", str(shards), "--output", str(tmp_path / "clip"), "--template"]
    monkeypatch.setattr("sys.argv", [*options, "a photo"])
    with pytest.raises(SystemExit):
        train_clip.main()
    assert "--template must contain {label}, the place of the class, got 'a photo'" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*options, "a {x} {label}"])
    captions = []

    def keep_captions(folder: Path, names: list[str], *arguments: object) -> None:
        captions.extend(names)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_clip, "train", keep_captions)
    with pytest.raises(KeyboardInterrupt):
        train_clip.main()
    assert captions == ["a {x} cat", "a {x} dog"]


def test_classes_without_a_name_are_refused(shards, tmp_path, monkeypatch):
    (shards / "classes.json").write_text(json.dumps(["cat"]))
    monkeypatch.setattr("sys.argv", ["train_clip.py", "--data", str(shards), "--output", str(tmp_path / "clip")])
    with pytest.raises(ValueError, match=r"classes\.json must name every class, got 1 names and the label 1"):
        train_clip.main()
    settings = train_classifier.Settings(1, 8, 0, 32, 0, (8, 8, 8), ())
    with pytest.raises(ValueError, match=r"classes\.json must name every class, got 1 and label 1"):
        train_classifier.train(settings, shards, 1, tmp_path / "classifier")


@pytest.mark.slow
def test_clip_is_trained_for_ten_steps(shards, tmp_path):
    settings = ["--output", "clip", "--steps", "10", "--batch-size", "2"]
    done = run_module("train_clip", "--data", str(shards), *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 10/10" in done.stdout and "own caption is the nearest" in done.stdout


@pytest.mark.parametrize("script", [train_clip, train_shapes_clip])
def test_two_trainings_of_a_clip_in_one_folder_exclude_each_other(script, shards, tmp_path, monkeypatch):
    data = ["--data", str(shards)] if script is train_clip else []
    monkeypatch.setattr("sys.argv", ["script", *data, "--output", str(tmp_path / "clip")])

    def start_another(*arguments: object) -> None:
        in_use = f"output must not be in use, got {tmp_path / 'clip'}, which process"
        with pytest.raises(FileExistsError, match=in_use):
            script.main()
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "train", start_another)
    with pytest.raises(KeyboardInterrupt):
        script.main()
    assert not (tmp_path / "clip").exists()


def test_claimed_folder_is_replaced_and_released(tmp_path):
    for text in ("old", "new"):
        with train_clip.claim_folder(tmp_path / "clip") as folder:
            (folder / train_clip.WEIGHTS).write_text(text)
    files = [file.name for file in (tmp_path / "clip").iterdir()]
    assert files == [train_clip.WEIGHTS] and (tmp_path / "clip" / train_clip.WEIGHTS).read_text() == "new"


def test_clip_with_non_finite_weights_is_never_saved(tmp_path):
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "width": 32, "heads": 2, "layers": 1}
    sizes = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    train_clip.write_config(tmp_path, sizes, ["a"], (0.5,) * 3, (0.5,) * 3)
    nothing = (torch.full((1, 3, 32, 32), float("nan")), torch.tensor([0]))
    with pytest.raises(NonFiniteError, match="training stopped at step 1 with a loss of nan"):
        train_clip.train(tmp_path, ["a"], lambda step: [nothing], 1, 1e-3, 0, train_clip.checkpoint_of(tmp_path), "")
    with pytest.raises(NonFiniteError, match="must be finite, got 1 of"):
        train_clip.save(torch.nn.Linear(2, 2, bias=False).requires_grad_(False).apply(overflow_in_fp16), tmp_path)
    assert not (tmp_path / "open_clip_model.safetensors").exists()


def overflow_in_fp16(layer: torch.nn.Linear) -> None:
    layer.weight.fill_(1e6)


def test_fuzzing_is_refused_on_other_systems(monkeypatch):
    """Windows has no module ``resource``; the readers are tested there all the same."""
    monkeypatch.setitem(sys.modules, "resource", None)
    names = runpy.run_path(fuzz.__file__)
    assert math.isnan(names["peak_memory"]())
    monkeypatch.setattr(sys, "argv", ["fuzz"])
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="fuzz must run on Linux, where it limits its own memory, got win32"):
        names["main"]()


@pytest.mark.parametrize("name", fuzz.targets())
def test_fuzzed_files_are_read_or_refused_in_one_sentence(name):
    for seed in range(3):
        finding = fuzz.run_input(name, fuzz.targets()[name], seed, fuzz.Limits(seconds=10, memory=512))
        assert finding is None, f"{name} --seed {seed}: {finding}"


def test_runs_are_compared_by_their_curves_and_last_grids(tmp_path, monkeypatch, capsys):
    for name, values in {"a": (1.0, 2.5), "b": (1.0, 3.0)}.items():
        (tmp_path / name / "grids").mkdir(parents=True)
        rows = "".join(f"{step},{value}\n" for step, value in zip((9, 19), values))
        (tmp_path / name / "metrics.csv").write_text(f"step,train/loss\n{rows}")
        for step, color in ((10, "black"), (20, "red")):
            Image.new("RGB", (400, 100), color).save(tmp_path / name / "grids" / f"grid_{step:07d}.png")
    output = tmp_path / "compared.png"
    options = ["--metrics", "train/loss", "--grids", "grid", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["compare_runs", str(tmp_path / "a"), str(tmp_path / "b"), *options])
    compare_runs.main()
    assert "| a | 2.5 |\n| b | 3 |" in capsys.readouterr().out
    assert Image.open(output).getpixel((10, Image.open(output).height - 10)) == (255, 0, 0)


def test_trained_generator_is_a_biggan_with_conditions_per_layer(tmp_path, monkeypatch, capsys):
    """Its file holds every tensor of ajbrock's layout, and equal weights of all classes add up to nothing."""
    file = tmp_path / "generator" / "G_ema.pth"
    monkeypatch.setattr(sys, "argv", ["train_generator", "--output", str(file), "--steps", "2", "--batch-size", "4"])
    train_generator.main()
    assert "step 2, loss" in capsys.readouterr().out and file.with_name("samples.png").is_file()
    model = load_generator(f"biggan:{file}", class_names=list(map(str, ALL_ATTRIBUTES))).model
    assert (model.num_layers, model.layer_noise_dim, model.num_classes) == (4, 16, 288)
    weights = torch.full((1, 4, 288), 0.02)
    assert (weights @ model.classes.weight).abs().max() < 1e-4
    assert model.generate(torch.randn(1, 4, 16), weights).shape == (1, 3, 32, 32)


def test_noise_decides_position_and_radius_of_a_render():
    classes = torch.tensor([5, 5, 200])
    noise = torch.zeros(3, train_generator.NOISE_DIM)
    noise[1, 0] = 3.0
    images = train_generator.render(noise, classes)
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images[:1], train_generator.render(noise[:1], classes[:1]))
    named = [ALL_ATTRIBUTES[i] for i in classes]
    assert accuracy(images, named)["all"] == 1


def test_interrupted_training_of_a_clip_resumes_bit_identically(tmp_path, monkeypatch):
    monkeypatch.setattr(train_clip, "CHECKPOINT_EVERY", 2)
    captions = ["a red ring", "a blue star"]
    sizes = train_shapes_clip.SHAPES_CLIP

    def batches_from(step: int, stop: int = 10) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(step, stop):
            yield torch.rand(2, 3, 32, 32) * 2 - 1, torch.arange(2)

    def trained(folder: Path, *batches: Callable) -> dict[str, Tensor]:
        train_clip.write_config(folder, sizes, captions, (0.5,) * 3, (0.5,) * 3)
        for part in batches:
            with suppress(RuntimeError):
                train_clip.train(folder, captions, part, 5, 1e-3, 0, train_clip.checkpoint_of(folder), "pairs")
        return load_file(folder / "open_clip_model.safetensors")

    def interrupted(step: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches_from(step, 3)
        raise RuntimeError("interrupted")

    expected = trained(tmp_path / "whole", batches_from)
    actual = trained(tmp_path / "parts", interrupted, batches_from)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert not train_clip.checkpoint_of(tmp_path / "parts").exists()
    checkpoint = train_clip.checkpoint_of(tmp_path / "other")
    with suppress(RuntimeError):
        train_clip.train(tmp_path / "parts", captions, interrupted, 5, 1e-3, 0, checkpoint, "pairs")
    with pytest.raises(ValueError, match="must be of the same settings"):
        train_clip.train(tmp_path / "parts", captions, batches_from, 5, 1e-3, 0, checkpoint, "other pairs")


# ------------------------------------------------------------------------------------------- address of the repository


@pytest.fixture
def checkout(monkeypatch, tmp_path) -> Path:
    """Return a folder with copies of the files that name the repository."""
    for pattern in ("pyproject.toml", *repository_address.FILES):
        for path in ROOT.glob(pattern):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    monkeypatch.setattr(repository_address, "ROOT", tmp_path)
    return tmp_path


def test_address_of_the_repository_stands_in_one_place():
    """All files state what pyproject.toml states, and no file has the address that the script does not know."""
    name = repository_address.repository_name()
    assert repository_address.outdated_files(name) == {}
    known = {ROOT / "pyproject.toml"}
    for pattern in repository_address.FILES:
        known |= set(ROOT.glob(pattern))
    named = set()
    for folder in (".github", "clipgen", "configs", "scripts"):
        for path in (ROOT / folder).rglob("*.*"):
            generated = path.parts[len(ROOT.parts) :][:2] in ((".github", "site"), (".github", "site_source"))
            if path.is_file() and not generated and f"/{name}".encode() in path.read_bytes():
                named.add(path)
    assert named <= known


def test_address_of_the_repository_is_written_to_all_files(checkout, monkeypatch, capsys):
    pyproject = checkout / "pyproject.toml"
    old = repository_address.repository_name()
    pyproject.write_text(pyproject.read_text().replace(f"github.com/{old}", "github.com/me/made.up", 1))
    monkeypatch.setattr(sys, "argv", ["repository_address"])
    repository_address.main()
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(written) == 9 and pyproject in written and not repository_address.outdated_files("me/made.up")
    for path in written:
        assert "github.com/me/made.up" in path.read_text() and old not in path.read_text()
    json.loads((checkout / "scripts/notebooks/inside.ipynb").read_text())


def test_release_is_refused_while_the_address_is_not_that_of_the_repository(checkout, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["repository_address", "--expect", "me/clipgen"])
    with pytest.raises(SystemExit, match=r"must be me/clipgen, got "):
        repository_address.main()
    pyproject = checkout / "pyproject.toml"
    old = repository_address.repository_name()
    pyproject.write_text(pyproject.read_text().replace(f"github.com/{old}", "github.com/me/clipgen"))
    with pytest.raises(SystemExit, match=r"first_images.ipynb names another repository: run python -m clipgen"):
        repository_address.main()


def test_a_bundled_model_is_loaded_by_its_name_and_so_is_its_clip(pipe, tmp_path, monkeypatch):
    own = shutil.copytree(BUNDLED["shapes"] / "clip", tmp_path / "own_clip")
    model = TextToImage(pipe.vqgan, pipe.transformer, FrozenCLIP(str(own)), params=SamplingParams(top_k=9))
    monkeypatch.setitem(BUNDLED, "mine", tmp_path / "mine")
    for _ in range(2):  # the second time over itself, with the CLIP that is bundled already
        bundle.bundle(model, "mine")
        model = TextToImage.load("mine")
        assert model.params.top_k == 9 and model.clip.model_name == "mine"
    assert FrozenCLIP("mine").folder == (tmp_path / "mine" / "clip").resolve()
    halved = pipe.transformer.gpt.clip_proj.weight.half().float()
    assert torch.equal(model.transformer.gpt.clip_proj.weight, halved)
    names = {"clip", "clip.json", "sampling.json", "transformer", "vqgan"}
    assert {path.name for path in (tmp_path / "mine").iterdir()} == names
