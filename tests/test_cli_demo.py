"""``clipgen-demo``, with trainings of two steps."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path

import pytest
from commands import everything, interrupt_at
from PIL import Image

from clipgen import VQGAN, ConditionalTransformer
from clipgen.cli import demo
from clipgen.training.callbacks import TimeForecast

TINY = ["trainer.max_steps=2", "trainer.val_check_interval=1", "data.train_size=64", "data.val_size=64"]


@pytest.fixture
def call(call):
    return partial(call, "clipgen-demo")


def test_demo_writes_models_images_and_report(call, tmp_path):
    """In a folder whose name Hydra's grammar does not accept."""
    done = call("--output", "de mo (1)", "--seed", 3, *TINY)
    output = tmp_path / "de mo (1)"
    assert done.code == 0, done.stderr
    names = {"grid.png", "reconstructions.png", "losses.png", "report.json", "vqgan", "transformer"}
    assert {path.name for path in output.iterdir()} == names and everything(tmp_path) > {"de mo (1)/grid.png"}
    for name in ("grid", "reconstructions", "losses"):
        picture = Image.open(output / f"{name}.png").convert("L")
        assert picture.width > 200 and picture.getextrema()[0] < 200
    report = json.loads((output / "report.json").read_text())
    assert set(report["accuracy"]) == {"all", "shape", "color", "size", "background"}
    assert all(0 <= value <= 1 for value in report["accuracy"].values())
    assert report["accuracy"]["all"] <= min(report["accuracy"].values())
    parts = {"imports", "vqgan", "transformer", "sampling", "plots"}
    assert set(report["seconds"]) == {*parts, "total"}
    sampling = {"temperature": 1.0, "top_k": 300, "top_p": 0.8}
    assert report["settings"] == {"seed": 3, "steps": None, "overrides": TINY, "prompts": 200, "sampling": sampling}
    assert "torch" in report["versions"]
    assert done.stdout.startswith("clipgen-demo trains a tokenizer (2 steps) and a transformer (2 steps)")
    for word in ("Training stage=vqgan", "Training stage=transformer", "background", "clipgen-sample --checkpoint"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.chh=1"], "there is no key model.chh"),
        (["trainer.max_steps"], "arguments must be KEY=VALUE, got trainer.max_steps"),
        (["stage=vqgan"], "overrides must leave stage, output, vqgan, resume, logger to the demo, got stage=vqgan"),
        (["logger=none"], "overrides must leave stage, output, vqgan, resume, logger to the demo, got logger=none"),
        (["+logger.version=a"], "overrides must leave stage, output, vqgan, resume, logger to the demo"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--resume"], "no demo to resume in demo: there is no demo/report.json"),
        (["--resume", "--steps", "9"], "--resume uses the settings of the interrupted demo"),
        (["--resume", "--seed", "0"], "--resume uses the settings of the interrupted demo"),
        (["output=x"], "overrides must leave stage, output, vqgan"),
        (["model.n_layer=1"], "there is no key model.n_layer"),  # of stage 2 alone: said before stage 1 is trained
        (["trainer.max_steps=many"], "trainer.max_steps must be int, got 'many'"),
        (["--output", "/proc/none"], "output must be a folder that can be written to, got /proc/none"),
    ],
)
def test_wrong_arguments_give_one_sentence_and_leave_no_files(call, tmp_path, arguments, message):
    result = call(*arguments, *([] if "--output" in arguments else ["--output", "demo"]))
    assert result.code == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"clipgen-demo: error: {message}"), result.stderr
    assert everything(tmp_path) == set()


def test_an_error_in_the_plots_does_not_lose_the_result(call, monkeypatch, tmp_path):
    def fail(files: list[Path], path: Path) -> None:
        raise ValueError("no plots today")

    monkeypatch.setattr(demo, "plot_losses", fail)
    assert call("--output", "demo", *TINY).code == 1
    assert set(json.loads((tmp_path / "demo" / "report.json").read_text())["accuracy"]) > {"all", "shape"}


@pytest.mark.parametrize(("model", "again"), [(VQGAN, "vqgan"), (ConditionalTransformer, "transformer")])
def test_interrupted_demo_is_resumed_by_the_printed_command(call, monkeypatch, caplog, tmp_path, model, again):
    """It keeps its settings, and finished stages are not trained again."""
    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patch:
        interrupt_at(patch, model, "training_step", 1)
        assert call("--seed", 3, "--output", "my demo", *TINY).code == 130
    assert "Stopped at step 1; clipgen-demo --resume --output 'my demo' continues" in caplog.text
    caplog.clear()
    done = call("--resume", "--output", "my demo")
    assert done.code == 0, done.stderr
    assert ("stage=vqgan is already trained" in done.stdout) == (again == "transformer")
    report = json.loads((tmp_path / "my demo" / "report.json").read_text())
    assert report["settings"]["seed"] == 3 and report["settings"]["overrides"] == TINY and "accuracy" in report
    assert {path.name for path in tmp_path.iterdir()} == {"my demo"}


def test_second_demo_does_not_overwrite_the_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "report.json").write_text("{}")
    args = demo.make_parser().parse_args([])
    demo.choose_settings(args)
    assert args.output == Path("demo-2")
    assert "demo contains an interrupted demo: clipgen-demo --resume resumes it" in capsys.readouterr().out


def test_steps_are_shared_between_the_stages():
    stages = demo.compose_stages(Path("demo"), 0, 360, [])
    assert [config.trainer.max_steps for config in stages.values()] == [360, 160]


@pytest.mark.parametrize(
    ("steps", "seconds", "fewer_steps"),
    [(1800, 100, ""), (360, 700, ""), (1800, 700, "20%"), (600, 700, "60%")],
)
def test_slow_machines_get_a_suggestion(capsys, steps, seconds, fewer_steps):
    demo.print_forecast(steps=steps, later_steps=3, steps_left=1, seconds_per_step=seconds / 4)
    out = capsys.readouterr().out
    assert f"About 0:{seconds // 60:02d}:{seconds % 60} left" in out
    assert ("clipgen-sample" in out) == (seconds == 700)
    assert ("--steps" in out) == bool(fewer_steps)
    assert not fewer_steps or f"--steps 360 would take {fewer_steps} of the time" in out


def test_time_is_forecast_once_after_the_first_20_steps(fit, tiny_vqgan):
    reports = []
    fit(
        tiny_vqgan,
        25,
        TimeForecast(lambda steps_left, seconds_per_step: reports.append((steps_left, seconds_per_step))),
    )
    ((steps_left, seconds_per_step),) = reports
    assert steps_left == 5 and seconds_per_step > 0
