"""Resuming a run folder of somebody else runs no commands and changes no files outside of it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from commands import SHAPES, VQGAN
from omegaconf import OmegaConf

from clipgen.cli import demo, resume_args
from clipgen.cli.config import instantiate_node
from clipgen.cli.console import run_command
from clipgen.cli.resume_args import add_run_arguments, run_arguments
from clipgen.hardware.environment import environment_int
from clipgen.runs import find_runs, runs_table
from clipgen.storage.links import refuse_links
from clipgen.storage.run_lock import LOCK, hold_lock
from clipgen.training.callbacks import AtomicCheckpointIO, BestCheckpoint
from clipgen.training.csv_logger import read_rows
from clipgen.training.resume import copy_best_checkpoint, read_training_state

ARGUMENTS = [*VQGAN, *SHAPES, "logger=none", "image_logger.num_images=1", "trainer.max_steps=2"]


@pytest.fixture
def call(call):
    return partial(call, "clipgen-train")


@pytest.fixture
def run(call, tmp_path) -> Path:
    """Return a run folder after two steps and a validation."""
    assert call(*ARGUMENTS, "output=run").code == 0
    return tmp_path / "run"


def change(run: Path, **values: object) -> None:
    """Replace values in the state of the ModelCheckpoint of a run."""
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith("ModelCheckpoint"))
    checkpoint["callbacks"][key] |= values
    torch.save(checkpoint, path)


# ------------------------------------------------------------------------------------------- paths inside a checkpoint


@pytest.mark.parametrize("spelling", ["local://{thesis}", "{run}/checkpoints/../../thesis", "{thesis}"])
def test_paths_in_a_checkpoint_are_neither_removed_nor_exported(call, run, tmp_path, spelling):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.ckpt").write_text("years of work")
    path = spelling.format(run=run, thesis=thesis)
    score = torch.tensor(1e9)
    change(
        run,
        dirpath=str(run / "checkpoints"),
        best_model_path=path,
        kth_best_model_path=path,
        best_k_models={path: score},
        best_model_score=score,
        kth_value=score,
        last_model_path=path,
    )
    result = call("resume=run", "trainer.max_steps=4")
    assert result.code == 0, result.stderr
    assert (thesis / "chapter.ckpt").read_text() == "years of work"
    assert "thesis" not in str(best_state(run))


def best_state(run: Path) -> dict:
    callbacks = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["callbacks"]
    return next(state for key, state in callbacks.items() if key.startswith("ModelCheckpoint"))


def test_only_regular_checkpoints_in_the_folder_are_removed(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    (folder / "deeper").mkdir(parents=True)
    kept = [folder / "notes.txt", folder / "deeper" / "a.ckpt", tmp_path / "a.ckpt", folder / "linked.ckpt"]
    for path in kept[:3]:
        path.write_text("mine")
    kept[3].symlink_to(tmp_path / "a.ckpt")
    old = folder / "old.ckpt"
    old.touch()
    files = AtomicCheckpointIO(folder)
    for path in (*kept, folder, folder / ".." / ".." / "a.ckpt", f"local://{tmp_path}", old):
        files.remove_checkpoint(path)
    assert all(path.exists() for path in (*kept, folder)) and not old.exists()


def test_moved_run_folder_keeps_its_best_score(call, run, tmp_path):
    change(run, best_model_score=torch.tensor(-1.0))  # no later validation is as good
    best = (run / "checkpoints" / "best.ckpt").read_bytes()
    run.rename(tmp_path / "moved")
    assert call("resume=moved", "trainer.max_steps=4").code == 0
    assert (tmp_path / "moved" / "checkpoints" / "best.ckpt").read_bytes() == best
    assert {path.name for path in tmp_path.iterdir()} == {"moved"}


def test_run_resumed_in_another_folder_keeps_its_best_model(call, run, tmp_path):
    change(run, best_model_score=torch.tensor(-1.0))
    best = (run / "checkpoints" / "best.ckpt").read_bytes()
    assert call("resume=run", "output=other", "trainer.max_steps=4").code == 0
    assert (tmp_path / "other" / "checkpoints" / "best.ckpt").read_bytes() == best


@pytest.mark.parametrize("monitor", ["val/psnr", "val/ssim", "val/codebook_usage", "val/perplexity"])
def test_metric_whose_highest_value_is_the_best_cannot_select_the_best(tmp_path, monitor):
    with pytest.raises(ValueError, match=f"monitor must be a metric whose lowest value is the best, got {monitor}"):
        BestCheckpoint(tmp_path, monitor)


@pytest.mark.parametrize("score", [None, "low", torch.tensor(float("nan")), torch.zeros(3), [[1]]])
def test_invalid_best_score_is_ignored(tmp_path, score):
    (tmp_path / "best.ckpt").touch()
    best = BestCheckpoint(tmp_path, "val/loss")
    best.load_state_dict({"best_model_score": score})
    assert best.best_k_models == {} and best.best_model_path == ""


# ------------------------------------------------------------------------------------------------------ arguments.yaml

HOSTILE = [
    "data.train_urls='pipe:touch marker'",
    "data.train_urls=['a.tar','pipe:touch marker']",
    "data.train_urls='{pipe,pipe}:touch marker'",
    "data.train_urls=\"https://x/'; touch marker; '\"",
    "data.train_urls='https://host/a-{000..010}.tar'",
    "logger=wandb",
    "metrics.fid_features='run.hook:f'",
    "metrics.fid_features='clip:hf-hub:evil/model'",
    "vqgan='hf-hub:evil/model'",
    "+logger.x={_target_:os.system,command:'touch marker'}",
    "logger._target_=os.system",
    "model={_target_:os.system}",
    "++trainer.max_steps=3",
    "~metrics",
    "hydra.run.dir=/elsewhere",
    "hydra.output_subdir=h",
    "logger.save_dir=/tmp",
    "logger.version=../../x",
    "data.root='${oc.env:HOME}'",
    "experiment=../../x",
    "data@evil=shapes",
    "trainer.max_steps=1,2",
    "model.nothing=1",
    "trainer.plugins=x",
    "--config-dir=/tmp",
    "checkpoint._target_=os.remove",
    "data.dataset=evil/pictures",
    "init_from_gpt2=evil/gpt2",
    "data.cache_dir=/elsewhere",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_arguments_that_could_run_code_are_refused(tmp_path, text):
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump(["stage=vqgan", text]))
    with pytest.raises(ValueError, match=r"arguments\.yaml (must contain plain settings only|is damaged)"):
        add_run_arguments([f"resume='{tmp_path}'"])


def test_arguments_that_could_run_code_are_refused_before_training(call, run, tmp_path):
    (run / "arguments.yaml").write_text(yaml.safe_dump([*ARGUMENTS, "metrics.fid_features='run.hook:f'"]))
    (run / "hook.py").write_text("open('marker', 'w')")
    result = call("resume=run", "trainer.max_steps=4")
    assert result.code == 1 and not (tmp_path / "marker").exists()
    assert "give this argument also on the command line if you trust it" in result.stderr


def test_command_line_replaces_refused_arguments(tmp_path):
    url = "data.train_urls='pipe:cat a.tar'"
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump(["stage=vqgan", "data=webdataset", url]))
    assert add_run_arguments([f"resume='{tmp_path}'", url])[:2] == ["stage=vqgan", "data=webdataset"]


PLAIN = [
    "stage=transformer",
    "experiment=coco",
    "data=webdataset",
    "quantizer=null",
    "model_size=gpt2-small",
    "logger=csv",
    "data.train_urls='a-{000..010}.tar'",
    "data.train_urls=[a.tar,b.tar]",
    "data.val_urls=null",
    "data.root=/photos",
    "model.autoencoder.ch_mult=[1,2]",
    "model.optimizer.learning_rate=1e-5",
    "model.compile=true",
    "metrics.fid_features='clip:ViT-B-32-quickgelu:openai'",
    "metrics.fid_features=inception",
    "image_logger.prompts=['a sign: stop','two']",
    "seed=3",
    "clip.model_name=ViT-B-32",
    "shards=data/cifar10",
    "logger.name=mine",
    "monitor=val/loss",
    "trainer.strategy=ddp",
    "vqgan=runs/a",
    "init_from_gpt2=gpt2",
]


@pytest.mark.parametrize("text", PLAIN)
def test_plain_arguments_are_accepted(tmp_path, text):
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump([text]))
    assert list(run_arguments(tmp_path, {}).values()) == [text]


DRIVES = [r"data.root=C:\photos", "data.root='d:/my photos'", r"data.train_urls=['C:\a.tar','D:\b.tar']"]


@pytest.mark.parametrize("text", DRIVES)
def test_drives_are_accepted_on_windows_only(tmp_path, monkeypatch, text):
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump([text]))
    with pytest.raises(ValueError, match="must contain plain settings only"):
        run_arguments(tmp_path, {})
    monkeypatch.setattr(resume_args, "IS_WINDOWS", True)
    assert list(run_arguments(tmp_path, {}).values()) == [text]


HOSTILE_DRIVES = [
    "data.root=C:photos",
    r"data.root=C:\a:b",
    r"data.root='C:\${oc.env:HOME}'",
    "metrics.fid_features=c:/x",
    r"data.root='\\host\share'",
    "data.root=//host/share",
]


@pytest.mark.parametrize("text", [*HOSTILE, *HOSTILE_DRIVES])
def test_arguments_that_could_run_code_are_refused_on_windows(tmp_path, monkeypatch, text):
    monkeypatch.setattr(resume_args, "IS_WINDOWS", True)
    test_arguments_that_could_run_code_are_refused(tmp_path, text)


def test_accepted_arguments_are_logged(call, run, caplog):
    caplog.set_level(logging.INFO)
    assert call("resume=run", "trainer.max_steps=3").code == 0
    assert "Resuming run with its arguments: stage=vqgan " in caplog.text
    (line,) = (line for line in caplog.messages if line.startswith("Resuming"))
    assert "trainer.max_steps" not in line  # which is given


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: &a [x]\nb: *a", "alias"),
        ("- &a x=1\n- *a", "alias"),
        ("{}", "list"),
        ("- [a]", "list"),
        ("- 1", "list"),
        ("- '" + "x" * 1_000_000 + "'", "at most"),
        ("[" * 100_000, "damaged"),
        ("- seed=1\n" * 1001, "at most 1000 arguments"),
        ("- 'model.autoencoder.ch_mult=" + "[" * 10_000 + "'", "at most 10000 letters"),
        ("- !!python/name:os.system", "damaged"),
        ("- x", "KEY=VALUE"),
        ("\xff", "damaged"),
    ],
)
def test_damaged_arguments_file_is_refused(tmp_path, content, reason):
    (tmp_path / "arguments.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"arguments\.yaml (is damaged: .*|must \w+ ){reason}|{reason}: "):
        run_arguments(tmp_path, {})


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "os.system", "command": "true"},
        {"_target_": "clipgen.data.webdataset.gopen", "url": "pipe:true"},
        {"_target_": "pytorch_lightning.Trainer", "logger": {"_target_": "torch.hub.load"}},
        {"_target_": "pytorch_lightning.Trainer", "callbacks": [{"_target_": "builtins.exec"}]},
        {"_target_": ["x"]},
    ],
)
def test_only_listed_targets_are_called(node):
    with pytest.raises(ValueError, match=r"_target_ must be one of .*, got"):
        instantiate_node(OmegaConf.create(node))


# --------------------------------------------------------------------------------------------------------------- locks


def test_a_second_training_into_a_folder_is_refused(call, run):
    with hold_lock(run):
        result = call("resume=run", "trainer.max_steps=4")
    assert result.code == 1
    assert f"output must not be in use, got run, which process {os.getpid()} on {socket.gethostname()}" in result.stderr
    assert call("resume=run", "trainer.max_steps=4").code == 0  # afterwards it may
    assert not (run / LOCK).exists()


def test_a_refused_training_removes_nothing_of_the_one_that_holds_the_folder(call, tmp_path):
    (tmp_path / "run").mkdir()
    with hold_lock(tmp_path / "run"):
        assert call(*ARGUMENTS, "output=run").code == 1
        assert {path.name for path in (tmp_path / "run").iterdir()} == {LOCK}


@pytest.mark.parametrize("name", ["encode", "sample", "eval"])
def test_other_commands_hold_their_folder(monkeypatch, capsys, tmp_path, name):
    from commands import Call

    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "image.png").touch()
    arguments = {
        "encode": ["vqgan=shapes", "output=out", "data.train_size=8", "data.val_size=4", "device=cpu"],
        "sample": ["--prompt", "a large blue ring on a white background", "--output", "out"],
        "eval": ["--images", "images", "--features", "none", "--shapes-eval", "--output", "out"],
    }
    with hold_lock(tmp_path / "out", LOCK if name == "sample" else f"{LOCK}-0"):
        result = Call(monkeypatch, capsys, f"clipgen-{name}", *arguments[name])
    assert result.code == 1 and "output must not be in use, got out" in result.stderr


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_outside_of_training_interrupts_as_ctrl_c_does(name):
    cleaned = []

    def work() -> None:
        try:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(5)
        finally:
            cleaned.append(True)

    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(SystemExit, match="130"):
        run_command("clipgen-x", work)
    assert cleaned and signal.getsignal(getattr(signal, name)) == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit, match="0"):
            run_command("clipgen-x", lambda: os.kill(os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_arguments_and_configuration_are_replaced_in_one_step(call, run, monkeypatch):
    """If writing fails, the previous ones stay."""
    before = {name: (run / name).read_text() for name in ("config.yaml", "arguments.yaml")}
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(28, "No space left")))
    result = call("resume=run", "trainer.max_steps=4")
    assert result.code == 1 and "No space left: run/config.yaml" in result.stderr
    assert {name: (run / name).read_text() for name in before} == before
    assert not list(run.glob(".*"))


def test_a_copied_run_does_not_use_the_weights_of_its_original(call, run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    original = (run / "checkpoints" / "best.ckpt").read_bytes()
    assert call("resume=copy", "trainer.max_steps=4").code == 0
    assert (run / "checkpoints" / "best.ckpt").read_bytes() == original
    assert str(run) not in str(best_state(tmp_path / "copy"))


# --------------------------------------------------------------------------------------------- parts of a run folder


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("name", ["metrics.csv", "checkpoints", "grids/a.png"])
def test_links_and_pipes_in_a_run_folder_are_not_written_through(tmp_path, name, kind):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/etc")
    with pytest.raises(ValueError, match=rf"run/{name} must (lie in|be a regular file)"):
        refuse_links(tmp_path / "run")


def test_links_inside_a_run_folder_are_allowed(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").symlink_to("a")
    refuse_links(tmp_path)


def test_the_best_checkpoint_of_another_run_is_no_link_out_of_it(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "secret").write_text("key")
    (tmp_path / "run" / "checkpoints" / "best.ckpt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="must lie in"):
        copy_best_checkpoint(str(tmp_path / "run" / "checkpoints" / "last.ckpt"), tmp_path / "own")


def lock_pipe(path: Path) -> None:
    os.mkfifo(path)


def lock_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make_lock", [lock_pipe, lock_device])
def test_a_lock_that_is_a_pipe_or_a_device_is_refused_at_once(tmp_path, make_lock):
    make_lock(tmp_path / LOCK)
    with pytest.raises(FileExistsError, match="must be the lock file of a run"), hold_lock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "step,a\nx,1\n", "step\n1,2\n", "step,a\n1," + "x" * 200_000])
def test_damaged_metrics_name_the_file(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.csv is damaged"):
        read_rows(tmp_path / "metrics.csv")


DAMAGES = [
    {"global_step": None},
    {"hyper_parameters": [1]},
    {"hyper_parameters": {"optimizer": None}},
    {"optimizer_states": [1]},
    {"loops": None},
    {"callbacks": [1]},
    {"state_dict": {"a": 1}},
    {"state_dict": {"a": torch.tensor([float("nan")])}},
    {"optimizer_states": [{"state": {0: {"exp_avg": torch.tensor([float("inf")])}}, "param_groups": []}]},
    {"optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(1).expand(10**6, 10**6)}}, "param_groups": []}]},
]
STATE = {
    "clipgen_model": "VQGAN",
    "global_step": 1,
    "epoch": 0,
    "pytorch-lightning_version": "2.6.0",
    "hyper_parameters": {"optimizer": {}},
    "state_dict": {},
    "optimizer_states": [],
    "lr_schedulers": [],
    "loops": {},
    "callbacks": {},
}


@pytest.mark.parametrize("changes", [{}, *DAMAGES], ids=str)
def test_damaged_checkpoints_to_resume_name_the_file(tmp_path, changes):
    path = tmp_path / "last.ckpt"
    torch.save(STATE | changes, path)
    if not changes:
        assert read_training_state(path, "VQGAN")["global_step"] == 1
        return
    with pytest.raises(ValueError, match=r"last\.ckpt is (damaged|refused)"):
        read_training_state(path, "VQGAN")


@pytest.mark.parametrize(
    "state",
    [{"best_model_score": "x", "monitor": "a"}, {"best_model_score": torch.zeros(3), "monitor": "a"}, [1]],
    ids=["text", "vector", "list"],
)
def test_runs_of_others_are_listed_whatever_their_checkpoint_holds(tmp_path, state):
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"global_step": 3, "callbacks": {"a": state} if isinstance(state, dict) else state}, path)
    assert "-" in runs_table(find_runs(tmp_path))[1]


def test_moments_of_another_shape_are_not_used(call, run):
    """Fused kernels would read and write beyond their ends, and crash."""
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for moments in checkpoint["optimizer_states"][0]["state"].values():
        moments["exp_avg"] = torch.zeros(3)
    torch.save(checkpoint, path)
    result = call("resume=run", "trainer.max_steps=4")
    assert result.code == 1 and "the checkpoint must contain exp_avg of the optimizer as" in result.stderr


def test_environment_variables_that_are_not_numbers_are_named(monkeypatch):
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="the environment variable RANK must be a whole number, got 'first'"):
        environment_int("RANK", 0)
    monkeypatch.setenv("RANK", "")
    assert environment_int("RANK", 0) == 0


# ---------------------------------------------------------------------------------------------------- resumed demos


@pytest.mark.parametrize(
    "settings",
    [
        {"overrides": ["data=webdataset", "data.train_urls='pipe:touch marker'"]},
        {"overrides": ["+logger.x={_target_:os.system,command:'touch marker'}"]},
        {"overrides": ["hydra.run.dir=/elsewhere"]},
        {"overrides": [1]},
        {"overrides": ["seed=1"] * 1001},
        {"seed": "${oc.env:HOME}"},
        {"steps": "many"},
        5,
    ],
    ids=str,
)
def test_the_report_of_a_demo_gives_plain_settings_only(tmp_path, settings):
    good = {"seed": 0, "steps": None, "overrides": []}
    content = {"settings": good | settings if isinstance(settings, dict) else settings}
    (tmp_path / "report.json").write_text(json.dumps(content))
    args = argparse.Namespace(output=tmp_path, overrides=[], steps=None, seed=None)
    with pytest.raises(ValueError, match=r"report\.json (must contain plain settings only|is damaged)"):
        demo.read_settings(args)
    (tmp_path / "report.json").write_text(json.dumps({"settings": good | {"overrides": ["trainer.max_steps=2"]}}))
    args = argparse.Namespace(output=tmp_path, overrides=[], steps=None, seed=None)
    demo.read_settings(args)
    assert args.overrides == ["trainer.max_steps=2"]
