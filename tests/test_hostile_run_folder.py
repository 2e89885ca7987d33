"""A run folder of somebody else: resuming it runs no command, and writes and removes nothing outside of it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from commands import SHAPES, VQGAN
from omegaconf import OmegaConf

from clipgen.cli import run_lock
from clipgen.cli.config import make
from clipgen.cli.console import guarded
from clipgen.cli.resume_args import run_arguments, with_the_runs
from clipgen.cli.run_lock import LOCK, hold_lock
from clipgen.training.resume import AtomicCheckpointIO, BestCheckpoint

ARGUMENTS = [*VQGAN, *SHAPES, "logger=none", "image_logger.num_images=1", "trainer.max_steps=2"]


@pytest.fixture
def call(call):
    return partial(call, "clipgen-train")


@pytest.fixture
def run(call, tmp_path) -> Path:
    """A run of two steps with a validation."""
    assert call(*ARGUMENTS, "output=run").code == 0
    return tmp_path / "run"


def change(run: Path, **values: object) -> None:
    """Replace values in the state of the run's ModelCheckpoint."""
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith("ModelCheckpoint"))
    checkpoint["callbacks"][key] |= values
    torch.save(checkpoint, path)


# ------------------------------------------------------------------------------------------- paths inside a checkpoint


@pytest.mark.parametrize("spelling", ["local://{thesis}", "{run}/checkpoints/../../thesis", "{thesis}"])
def test_a_path_in_a_checkpoint_is_neither_removed_nor_exported(call, run, tmp_path, spelling):
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


def test_only_a_plain_checkpoint_directly_in_the_folder_is_removed(tmp_path):
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


def test_a_run_folder_that_was_moved_remembers_its_best_score(call, run, tmp_path):
    change(run, best_model_score=torch.tensor(-1.0))  # no later validation is as good
    best = (run / "checkpoints" / "best.ckpt").read_bytes()
    run.rename(tmp_path / "moved")
    assert call("resume=moved", "trainer.max_steps=4").code == 0
    assert (tmp_path / "moved" / "checkpoints" / "best.ckpt").read_bytes() == best
    assert {path.name for path in tmp_path.iterdir()} == {"moved"}


def test_a_run_resumed_in_another_folder_keeps_its_best_model(call, run, tmp_path):
    change(run, best_model_score=torch.tensor(-1.0))
    best = (run / "checkpoints" / "best.ckpt").read_bytes()
    assert call("resume=run", "output=other", "trainer.max_steps=4").code == 0
    assert (tmp_path / "other" / "checkpoints" / "best.ckpt").read_bytes() == best


@pytest.mark.parametrize("score", [None, "low", torch.tensor(float("nan")), torch.zeros(3), [[1]]])
def test_a_score_that_is_none_is_forgotten(tmp_path, score):
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
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_could_run_code_is_not_taken_over_from_a_run(tmp_path, text):
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump(["stage=vqgan", text]))
    with pytest.raises(ValueError, match=r"arguments\.yaml (must hold plain settings only|is damaged)"):
        with_the_runs([f"resume='{tmp_path}'"])


def test_what_could_run_code_is_refused_before_anything_is_done(call, run, tmp_path):
    (run / "arguments.yaml").write_text(yaml.safe_dump([*ARGUMENTS, "metrics.fid_features='run.hook:f'"]))
    (run / "hook.py").write_text("open('marker', 'w')")
    result = call("resume=run", "trainer.max_steps=4")
    assert result.code == 1 and not (tmp_path / "marker").exists()
    assert "give this argument on the command line, too, if you trust it" in result.stderr


def test_what_is_given_on_the_command_line_need_not_be_plain_in_the_file(tmp_path):
    url = "data.train_urls='pipe:cat a.tar'"
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump(["stage=vqgan", "data=webdataset", url]))
    assert with_the_runs([f"resume='{tmp_path}'", url])[:2] == ["stage=vqgan", "data=webdataset"]


PLAIN = [
    "stage=transformer",
    "experiment=coco",
    "data=webdataset",
    "tokenizer=null",
    "model_size=gpt2-small",
    "logger=csv",
    "data.train_urls='a-{000..010}.tar'",
    "data.train_urls=[a.tar,b.tar]",
    "data.val_urls=null",
    "data.root=/photos",
    "data.train_urls='https://host/a-{000..010}.tar'",
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
def test_plain_settings_are_taken_over(tmp_path, text):
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump([text]))
    assert list(run_arguments(tmp_path, {}).values()) == [text]


def test_what_is_taken_over_is_shown(call, run, caplog):
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
        ("- !!python/name:os.system", "damaged"),
        ("- x", "KEY=VALUE"),
        ("\xff", "damaged"),
    ],
)
def test_damaged_arguments_are_refused_in_one_sentence(tmp_path, content, reason):
    (tmp_path / "arguments.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"arguments\.yaml is damaged: .*{reason}|{reason}: "):
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
        make(OmegaConf.create(node))


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
    arguments = {
        "encode": ["vqgan=shapes", "output=out", "data.train_size=8", "data.val_size=4", "device=cpu"],
        "sample": ["--prompt", "a large blue ring on a white background", "--output", "out"],
        "eval": ["--images", "out", "--features", "none", "--judge", "--output", "out"],
    }
    with hold_lock(tmp_path / "out", LOCK if name == "sample" else f"{LOCK}-0"):
        result = Call(monkeypatch, capsys, f"clipgen-{name}", *arguments[name])
    assert result.code == 1 and "output must not be in use, got out" in result.stderr


def test_processes_of_several_ranks_share_a_folder(tmp_path):
    with hold_lock(tmp_path, f"{LOCK}-0"), hold_lock(tmp_path, f"{LOCK}-1"):
        assert {path.name for path in tmp_path.iterdir()} == {f"{LOCK}-0", f"{LOCK}-1"}


def test_one_of_many_claims_a_folder(tmp_path):
    """Also where all find the lock of a dead process first."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    record = {
        "pid": dead.pid,
        "started": "1",
        "process_table": run_lock.process_table(),
        "host": "here",
        "since": "now",
    }
    for _ in range(20):
        (tmp_path / LOCK).write_text(json.dumps(record))
        inside, most, lock = [0], [0], threading.Lock()

        def work(inside=inside, most=most, lock=lock) -> None:
            try:
                with hold_lock(tmp_path):
                    with lock:
                        inside[0] += 1
                        most[0] = max(most[0], inside[0])
                    time.sleep(0.01)
                    with lock:
                        inside[0] -= 1
            except FileExistsError:
                pass

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1] and not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom clipgen.cli.run_lock import hold_lock\n"
        "with hold_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    with pytest.raises(FileExistsError, match=f"process {process.pid} on"), hold_lock(tmp_path):
        pass
    process.kill()
    process.wait()
    with hold_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("lives", [True, False])
def test_a_process_on_another_machine_is_alive_while_it_renews_its_lock(tmp_path, monkeypatch, lives):
    monkeypatch.setattr(run_lock, "TIMEOUT", 0.5)
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "process_table": "elsewhere", "host": "far", "since": "now"}))
    done = threading.Event()
    monkeypatch.setattr(run_lock, "HEARTBEAT", 0.05)
    thread = threading.Thread(target=run_lock.renew, args=(tmp_path / LOCK, done))
    if lives:
        thread.start()
        with pytest.raises(FileExistsError, match="process 1 on far since now"), hold_lock(tmp_path):
            pass
        done.set()
        thread.join()
    else:
        with hold_lock(tmp_path):
            pass


def test_a_damaged_lock_is_one_of_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "TIMEOUT", 0.1)
    (tmp_path / LOCK).write_text("{")
    with hold_lock(tmp_path):
        pass


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
        guarded("clipgen-x", work)
    assert cleaned and signal.getsignal(getattr(signal, name)) == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit, match="0"):
            guarded("clipgen-x", lambda: os.kill(os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_arguments_and_configuration_are_replaced_in_one_step(call, run, monkeypatch):
    """A kill while they are written leaves those of before."""
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
