"""``clipgen-train``: run folders, interruption and resuming, and error messages."""

from __future__ import annotations

import errno
import gc
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import make_shards
import pytest
import torch
import yaml
from commands import SHAPES, TRANSFORMER, VQGAN, command, everything, interrupt_at, only, trained
from hydra.core.utils import JobReturn
from models import VQGAN_SIZES, make_vqgan
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import GPT2Config, GPT2LMHeadModel

from clipgen import VQGAN as Tokenizer
from clipgen import ConditionalTransformer, TextToImage
from clipgen.cli.config import config_dir
from clipgen.cli.train import CHOICES
from clipgen.training.callbacks import AtomicCheckpointIO


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Return the run folders of stage 1 and of stage 2."""
    folder, transformer = trained(tmp_path_factory.getbasetemp())
    return (folder / "vqgan_run").resolve(), transformer


@pytest.fixture
def call(call):
    return partial(call, "clipgen-train")


def steps_of(run: Path) -> int:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


# --------------------------------------------------------------------------------------------------------- run folders


def test_run_folder_has_models_checkpoints_and_settings(runs):
    for run, model in zip(runs, (Tokenizer, ConditionalTransformer)):
        names = {path.name for path in run.iterdir()}
        assert {"config.yaml", "versions.json", "checkpoints", "grids"} <= names
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
        assert steps_of(run) == 4
        assert not [name for name in everything(run) if "partial" in name]
        for checkpoint in (run, run / "checkpoints" / "best.ckpt", run / "checkpoints" / "last.ckpt"):
            assert isinstance(model.load(checkpoint), model)


def test_run_folder_has_the_resolved_configuration_and_versions(runs):
    for run, stage in zip(runs, ("vqgan", "transformer")):
        text = (run / "config.yaml").read_text()
        config = yaml.safe_load(text)
        assert "${" not in text and config["stage_name"] == stage and config["data"]["train_size"] == 64
        assert json.loads((run / "versions.json").read_text()).keys() >= {"python", "clipgen", "torch", "transformers"}
    assert yaml.safe_load((runs[0] / "config.yaml").read_text())["model"]["quantizer"]["codebook_size"] == 16


def test_image_grids_are_written_after_each_validation(runs):
    for run, names in zip(runs, ({"reconstructions", "codebook_usage"}, {"from_images", "from_texts"})):
        grids = list((run / "grids").iterdir())
        assert {path.name for path in grids} == {f"{name}_{step:07d}.png" for name in names for step in (2, 4)}
        for path in grids:
            assert Image.open(path).convert("L").getextrema()[0] < 250  # not a white sheet


def test_tensorboard_has_losses_and_images(runs):
    logged = []
    for run in runs:
        events = EventAccumulator(str(run)).Reload().Tags()
        logged.append(set(events["scalars"]) | set(events["images"]))
    assert logged[0] >= {
        "train/reconstruction_loss",
        "train/commitment_loss",
        "train/perplexity",
        "val/reconstruction_loss",
        "val/codebook_usage",
        "val/perplexity",
        "val/reconstructions",
    }
    assert logged[1] >= {"train/cross_entropy", "val/cross_entropy", "val/from_images", "val/from_texts"}


def test_discriminator_starts_at_its_start_step(runs):
    events = EventAccumulator(str(runs[0])).Reload()
    for name in ("discriminator_loss", "generator_loss", "adaptive_weight"):
        assert [event.step for event in events.Scalars(f"train/{name}")] == [1, 2, 3]  # it starts at step 1
    state = torch.load(runs[0] / "checkpoints" / "last.ckpt", weights_only=True)
    assert any(name.startswith("discriminator.") for name in state["state_dict"])
    assert len(state["optimizer_states"]) == 2


def test_frozen_models_are_in_the_run_folder_but_not_in_checkpoints(runs):
    state = torch.load(runs[1] / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("gpt.") for name in state)
    assert {"vqgan", "transformer", "clip.json"} <= {path.name for path in runs[1].iterdir()}
    assert TextToImage.load(runs[1]).vqgan.codebook_size == 16


@pytest.mark.parametrize("gone", ["checkpoints", "vqgan"])
def test_another_run_is_not_overwritten(call, runs, tmp_path, gone):
    """Neither a finished run nor an interrupted one, unless it is resumed."""
    shutil.copytree(runs[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / gone)
    before = (tmp_path / "run" / "config.yaml").read_text()
    result = call(*VQGAN, *SHAPES, "output=run", "seed=5")
    assert result.code == 1 and "output already contains a run: run. Use resume=run to resume it" in result.stderr
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    if gone == "vqgan":
        adversary = ["model.gan.weight=0.8", "model.gan.start_step=1", "model.gan.channels=8", "model.gan.num_layers=1"]
        more = call(*VQGAN, *SHAPES, *adversary, "output=run", "resume=run", "trainer.max_steps=5")
        assert more.code == 0 and steps_of(tmp_path / "run") == 5, more.stderr


def test_run_without_a_checkpoint_starts_again(call, runs, tmp_path):
    """By then stage 2 has copied its tokenizer, which is not a run of stage 1."""
    (tmp_path / "run").mkdir()
    shutil.copytree(runs[1] / "vqgan", tmp_path / "run" / "vqgan")
    shutil.copy(runs[1] / "clip.json", tmp_path / "run" / "clip.json")
    assert call(*TRANSFORMER, *SHAPES, f"vqgan={runs[0]}", "output=run").code == 0


def test_adversarial_training_exports_the_last_checkpoint(runs):
    """The validation loss has no adversarial term, so its minimum is misleading."""
    last = Tokenizer.load(runs[0] / "checkpoints" / "last.ckpt").active_model.state_dict()
    finished = Tokenizer.load(runs[0] / "vqgan").active_model.state_dict()
    assert not [name for name in last if not torch.equal(last[name], finished[name])]


def test_leftovers_of_an_interrupted_checkpoint_are_removed(tmp_path):
    left = tmp_path / ".last.ckpt.123.partial"
    left.write_bytes(b"0" * 100)
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_another_optimizer_is_refused_before_the_configuration_is_written(call, runs, tmp_path):
    shutil.copytree(runs[1], tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()
    arguments = [
        *TRANSFORMER,
        *SHAPES,
        f"vqgan={runs[0]}",
        "model.conditioning.drop_prob=0.5",
        "model.optimizer.name=adamw",
    ]
    result = call(*arguments, "output=run", "resume=run")
    assert result.code == 1 and "model.optimizer.name must be muon, as in the checkpoint" in result.stderr, (
        result.stderr
    )
    assert (tmp_path / "run" / "config.yaml").read_text() == before


# --------------------------------------------------------------------------------------------------------- other data


@pytest.fixture
def photos(tmp_path) -> Path:
    for i in range(12):
        path = tmp_path / "photos" / f"{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (i * 20, 99, 0)).save(path)
    return tmp_path / "photos"


SMALL = ["data.image_size=32", "data.batch_size=4", "data.num_workers=0", "trainer.max_steps=2"]


def test_trains_on_a_folder_of_images(call, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"no picture")
    assert call(*VQGAN, "data=folder", f"data.root={photos}", *SMALL, "data.val_fraction=0.4", "output=run").code == 0
    assert steps_of(tmp_path / "run") == 2 and Tokenizer.load(tmp_path / "run")


def test_trains_on_shards(call, photos, tmp_path):
    make_shards.main([str(photos), "--output", "shards", "--shard-size", "3", "--val-fraction", "0.4"])
    urls = ["data.train_urls='shards/train-*.tar'", "data.val_urls='shards/val-{000000..000000}.tar'"]
    assert call(*VQGAN, "data=webdataset", *urls, *SMALL, "output=run").code == 0
    assert steps_of(tmp_path / "run") == 2 and (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()


# ------------------------------------------------------------------------------------------------ stopping and resuming


@pytest.mark.parametrize(
    ("method", "when", "step"), [("training_step", 3, 3), ("validation_step", 2, 2)], ids=["training", "validation"]
)
def test_ctrl_c_saves_a_checkpoint_that_resume_continues(call, monkeypatch, caplog, tmp_path, method, when, step):
    caplog.set_level(logging.INFO)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, Tokenizer, method, when)  # the first validation step is the sanity check's
        stopped = call(*VQGAN, *SHAPES, "output=run")
    assert (stopped.code, stopped.stderr) == (130, "")
    assert f"Stopped at step {step}; clipgen-train resume=run continues" in caplog.text
    assert steps_of(tmp_path / "run") == step and not (tmp_path / "run" / "vqgan").exists()
    assert signal.getsignal(signal.SIGINT) == handler  # what comes after training can be interrupted as before

    seen = []
    original = Tokenizer.training_step
    monkeypatch.setattr(
        Tokenizer, "training_step", lambda self, *a: (seen.append(self.global_step), original(self, *a))[1]
    )
    assert (go := call(*VQGAN, *SHAPES, "output=run2", "resume=run", "trainer.max_steps=5")).code == 0, go.stderr
    assert seen == list(range(step, 5)) and steps_of(tmp_path / "run2") == 5
    assert Tokenizer.load(tmp_path / "run2")


def test_resume_takes_the_arguments_of_the_run(call, monkeypatch, tmp_path):
    """The run continues in its folder. Arguments of the command line replace its own, also when it is resumed later."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, Tokenizer, "training_step", 3)
        assert call(*VQGAN, *SHAPES, r"output='o\'run'", "trainer.max_steps=3").code == 130
    for more, steps in (([], 3), (["trainer.max_steps=5"], 5), ([], 5)):
        done = call(r"resume='o\'run'", *more)
        assert done.code == 0 and steps_of(tmp_path / "o'run") == steps, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"o'run"}
    less = call(r"resume='o\'run/checkpoints/last.ckpt'", "trainer.max_steps=2")
    assert (
        less.code == 1
        and "trainer.max_steps must be at least 5, the step of o'run/checkpoints/last.ckpt" in less.stderr
    )
    assert "must name a .ckpt" in call("resume=nowhere", *VQGAN).stderr


@pytest.mark.parametrize(("method", "when"), [("training_step", 3), ("validation_step", 2)])
def test_ctrl_c_stops_between_optimizer_steps(call, monkeypatch, tmp_path, method, when):
    """Accumulated gradients are not in the checkpoint."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, Tokenizer, method, when)  # the first validation step is the sanity check's
        more = ["model.optimizer.grad_accum_steps=2", "trainer.val_check_interval=0.375", "trainer.limit_val_batches=1"]
        assert call(*VQGAN, *SHAPES, "output=run", *more).code == 130
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
    assert (checkpoint["global_step"], batches) == (2, 4)


def test_gpt2_weights_are_read_only_at_the_start(call, runs, monkeypatch, tmp_path):
    """They are not needed to resume, to sample or to load the model."""
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=50)).save_pretrained(tmp_path / "gpt2")
    arguments = [*TRANSFORMER, *SHAPES, f"vqgan={runs[0]}", "output=run", "init_from_gpt2=gpt2"]
    seen = []
    original = ConditionalTransformer.init_from_gpt2
    monkeypatch.setattr(
        ConditionalTransformer, "init_from_gpt2", lambda self, name: (seen.append(name), original(self, name))[1]
    )
    assert call(*arguments, "trainer.max_steps=2").code == 0
    shutil.rmtree(tmp_path / "gpt2")
    resumed = call(*arguments, "resume=run")
    assert resumed.code == 0, resumed.stderr
    assert seen == ["gpt2"] and steps_of(tmp_path / "run") == 4
    for place in ("transformer", "checkpoints/last.ckpt"):
        assert "init_from_gpt2" not in ConditionalTransformer.load(tmp_path / "run" / place).hparams


def test_ctrl_c_before_the_first_step_leaves_no_files(call, monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    interrupt_at(monkeypatch, Tokenizer, "validation_step", 1)
    assert call(*VQGAN, *SHAPES, "output=run/deep").code == 130
    assert "Stopped at step 0" in caplog.text and "resume" not in caplog.text
    assert everything(tmp_path) == set()


def test_ctrl_c_stops_a_sweep(call, monkeypatch, tmp_path):
    interrupt_at(monkeypatch, Tokenizer, "training_step", 2)
    assert call("--multirun", *VQGAN, *SHAPES, "output=sweep", "seed=1,2").code == 130
    assert steps_of(tmp_path / "sweep" / "0") == 2 and not (tmp_path / "sweep" / "1").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for other processes")
def test_ctrl_c_stops_the_installed_command(tmp_path):
    program = Path(sys.executable).parent / "clipgen-train"
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    arguments = [*VQGAN, *SHAPES, "output=run", "trainer.max_steps=1000000", "trainer.val_check_interval=1000000"]
    process = subprocess.Popen([program, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not last.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "Traceback" not in stderr
    step = steps_of(tmp_path / "run")
    assert step == int(re.search(r"Stopped at step (\d+)", stderr)[1]) >= 2
    done = command("clipgen-train", *VQGAN, *SHAPES, "resume=run", f"trainer.max_steps={step + 2}", cwd=tmp_path)
    assert done.returncode == 0 and f"Finished {step + 2} steps" in done.stderr


def test_failed_run_of_a_sweep_does_not_stop_the_others(call, tmp_path, monkeypatch):
    """With --multirun each run has its own folder, and a sweeper gets its best monitored value, or None."""
    returned = []
    return_value = JobReturn.return_value
    record = return_value.setter(lambda result, value: returned.append(value) or return_value.fset(result, value))
    monkeypatch.setattr(JobReturn, "return_value", record)
    result = call("--multirun", *VQGAN, *SHAPES, "output=sweep", "trainer.max_steps=abc,2")
    assert result.code == 1 and "trainer.max_steps must be int, got 'abc'" in result.stderr
    assert everything(tmp_path / "sweep" / "0") == set() and steps_of(tmp_path / "sweep" / "1") == 2
    last = torch.load(tmp_path / "sweep" / "1" / "checkpoints" / "last.ckpt", weights_only=True)
    states = [state for state in last["callbacks"].values() if state.get("monitor") == "val/loss"]
    assert returned[0] is None and returned[1] == pytest.approx(float(states[0]["best_model_score"]))


def optuna_sweep(tmp_path: Path, trials: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a sweep with Optuna."""
    pytest.importorskip("hydra_plugins", reason="needs hydra-optuna-sweeper: pip install -e '.[sweep]'")
    if importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
        pytest.skip("needs hydra-optuna-sweeper: pip install -e '.[sweep]'")
    settings = [argument for argument in (*VQGAN, *SHAPES) if argument.split("=")[0] != arguments[0].split("=")[0]]
    call = [sys.executable, "-m", "clipgen.cli.train", "--multirun", "hydra/sweeper=optuna", *settings]
    sweeper = [f"hydra.sweeper.n_trials={trials}", "hydra.sweeper.n_jobs=1"]
    return subprocess.run([*call, *sweeper, "output=sweep", *arguments], cwd=tmp_path, capture_output=True, text=True)


@pytest.mark.slow
def test_optuna_finds_the_best_learning_rate(tmp_path):
    done = optuna_sweep(tmp_path, 2, "model.optimizer.learning_rate=tag(log,interval(1e-9,1e-2))")
    assert done.returncode == 0, done.stderr
    best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    values = {}
    for number in range(2):
        last = torch.load(tmp_path / "sweep" / str(number) / "checkpoints" / "last.ckpt", weights_only=True)
        (state,) = [state for state in last["callbacks"].values() if state.get("monitor") == "val/loss"]
        rate = yaml.safe_load((tmp_path / "sweep" / str(number) / "config.yaml").read_text())["model"]["optimizer"]
        values[float(state["best_model_score"])] = float(rate["learning_rate"])
    assert best["best_value"] == pytest.approx(min(values))
    assert best["best_params"]["model.optimizer.learning_rate"] == pytest.approx(values[min(values)])


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "succeeds"), [("8,500", True), ("499,500", False)])
def test_optuna_continues_after_failed_runs_and_reports_them(tmp_path, sizes, succeeds):
    # With this seed both sizes are tried. (With sampler=grid the plugin fails if the last run fails.)
    done = optuna_sweep(tmp_path, 2, f"data.batch_size=choice({sizes})", "hydra.sweeper.sampler.seed=0")
    assert done.returncode == 1
    assert "error: data.batch_size must be at most 64, the training images, got" in done.stderr.splitlines()[-1]
    assert (tmp_path / "sweep" / "optimization_results.yaml").is_file() == succeeds, done.stderr


@pytest.mark.slow
def test_submitit_trains_in_another_process_and_reports_its_errors(tmp_path):
    pytest.importorskip("hydra_plugins", reason="needs hydra-submitit-launcher: pip install -e '.[sweep]'")
    if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        pytest.skip("needs hydra-submitit-launcher: pip install -e '.[sweep]'")
    call = [sys.executable, "-m", "clipgen.cli.train", "--multirun", "hydra/launcher=submitit_local", *VQGAN, *SHAPES]
    done = subprocess.run([*call, "output=good", "seed=3"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert steps_of(tmp_path / "good" / "0") == 4
    bad = [*call, "output=bad", "data.batch_size=500"]
    done = subprocess.run(bad, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "batch_size must be at most 64" in done.stderr


def test_failed_run_of_a_sweep_frees_its_memory(call, monkeypatch):
    models: list[weakref.ref] = []
    alive = []

    def fail(self, *_):
        models.append(weakref.ref(self))
        gc.collect()
        alive.append(sum(model() is not None for model in models))
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(Tokenizer, "training_step", fail)
    result = call("--multirun", *VQGAN, *SHAPES, "output=sweep", "seed=1,2,3")
    assert result.code == 1 and "no memory left" in result.stderr
    assert alive == [1, 1, 1]


# ---------------------------------------------------------------------------------------------------- clear refusals

ERRORS = {
    "no stage": ([], r"stage must be one of transformer, vqgan; give stage=\.\.\."),
    "wrong stage": (["stage=gan"], "stage must be one of transformer, vqgan, got gan"),
    "two stages": (["stage=vqgan,transformer"], "stage=vqgan,transformer has several values"),
    "no value": (["vqgan"], "arguments must be KEY=VALUE, got vqgan"),
    "output as a number": ([*VQGAN, "output=1_2"], "output must be a path, got 12: put quotes around it"),
    "no output": ([*VQGAN, "output=null"], "output must be a path, got None"),
    "resume as a number": ([*VQGAN, "resume=123"], "resume must be a path, got 123"),
    "umlauts": ([*VQGAN, "output=Bücher"], "output=Bücher cannot be read: put quotes around the value, 'output=\"Bü"),
    "equals sign": ([*VQGAN, "output=a=b"], "output=a=b cannot be read: put quotes around the value, 'output=\"a=b\"'"),
    "unknown experiment": (["stage=vqgan", "experiment=x"], "experiment must be one of cifar10, .*, got x"),
    "unknown data": (
        ["stage=vqgan", "data=x"],
        "data must be one of cached, folder, huggingface, shapes, webdataset, got x",
    ),
    "unknown logger": (["stage=vqgan", "logger=x"], "logger must be one of .*tensorboard.*, got x"),
    "unknown key": ([*VQGAN, "model.chh=1"], r"there is no key model\.chh; --cfg job"),
    "unknown top key": ([*VQGAN, "modle.ch=1"], r"there is no key modle\.ch"),
    "unknown argument": ([*VQGAN, *SHAPES, "+model.chh=1"], "unexpected keyword argument 'chh'"),
    "a word for a size": ([*VQGAN, *SHAPES, "model.autoencoder.ch=abc"], "model.autoencoder.ch must be int, got 'abc'"),
    "a list for a size": (
        [*VQGAN, *SHAPES, "model.autoencoder.ch=[1]"],
        r"model.autoencoder.ch must be int, got \[1\]",
    ),
    "a size for a list": (
        [*VQGAN, *SHAPES, "model.autoencoder.ch_mult=2"],
        "model.autoencoder.ch_mult must be list of int, got 2",
    ),
    "a word for a number": (
        [*VQGAN, *SHAPES, "model.optimizer.learning_rate=fast"],
        "learning_rate must be float, got 'fast'",
    ),
    "a word for steps": ([*VQGAN, *SHAPES, "trainer.max_steps=abc"], "trainer.max_steps must be int, got 'abc'"),
    "a word for a batch": ([*VQGAN, "data.batch_size=abc"], "data.batch_size must be int, got 'abc'"),
    "a word for a seed": ([*VQGAN, *SHAPES, "seed=abc"], "seed must be int, got 'abc'"),
    "unknown kind": (
        [*VQGAN, *SHAPES, "model.loss.reconstruction=l3"],
        "reconstruction must be one of l1, l2, got 'l3'",
    ),
    "unknown precision": ([*VQGAN, *SHAPES, "trainer.precision=8"], "trainer.precision must be .*bf16-mixed.*, got 8"),
    "no such device": ([*VQGAN, *SHAPES, "trainer.accelerator=hpu"], "HPU|hpu"),
    "top_p": ([*VQGAN, *SHAPES, "image_logger.top_p=1.3"], r"top_p must be in \(0, 1\], got 1.3"),
    "every 0 steps": ([*VQGAN, *SHAPES, "checkpoint.every_n_steps=0"], "every_n_steps must be at least 1, got 0"),
    "monitor": ([*VQGAN, *SHAPES, "monitor=val/x", "output=run"], "monitor='val/x'"),
    "a large batch": ([*VQGAN, *SHAPES, "data.batch_size=100"], "batch_size must be at most 64"),
    "an odd size": ([*VQGAN, *SHAPES, "data.image_size=30"], r"divisible by 8, got \(8, 3, 30, 30\)"),
    "no data": ([*VQGAN, "data=folder"], "stage=vqgan needs a value for data.root: give data.root="),
    "no token cache": (
        ["stage=transformer", "data=cached"],
        "stage=transformer needs a value for data.root: give data.root=",
    ),
    "missing data": ([*VQGAN, "data=folder", "data.root=/none"], "data.root must be an existing folder .*, got /none"),
    "missing shards": (
        [*VQGAN, "data=webdataset", "data.train_urls=/none/*.tar", "data.val_urls=null"],
        r"data\.train_urls must name existing shards, got /none/\*.tar",
    ),
    "data without images": (
        [*VQGAN, "data=folder", "data.root={vqgan}/checkpoints"],
        r"must contain \.jpg",
    ),
    "no vqgan": ([*TRANSFORMER, *SHAPES], "stage=transformer needs a tokenizer: give vqgan=RUN"),
    "missing vqgan": ([*TRANSFORMER, *SHAPES, "vqgan=x"], "x does not exist; `clipgen-train stage=vqgan` makes"),
    "empty vqgan": ([*TRANSFORMER, *SHAPES, "vqgan={vqgan}/grids"], "grids contains no such model"),
    "damaged vqgan": ([*TRANSFORMER, *SHAPES, "vqgan={damaged}"], "damaged.ckpt is not a readable checkpoint"),
    "wrong vqgan folder": (
        [*TRANSFORMER, *SHAPES, "vqgan={transformer}/transformer"],
        "is a ConditionalTransformer .* VQGAN is needed",
    ),
    "wrong vqgan file": (
        [*TRANSFORMER, *SHAPES, "vqgan={transformer}/checkpoints/best.ckpt"],
        "is a ConditionalTransformer checkpoint",
    ),
    "unknown clip": ([*TRANSFORMER, *SHAPES, "vqgan={vqgan}", "clip.model_name=x"], "CLIP 'x' must be a bundled model"),
    "no clip folder": (
        [*TRANSFORMER, *SHAPES, "vqgan={vqgan}", "clip.model_name={vqgan}"],
        "no open_clip_config.json in",
    ),
    "clip without weights": (
        [*TRANSFORMER, *SHAPES, "vqgan={vqgan}", "clip.model_name={clip}"],
        "weights of CLIP .* cannot",
    ),
    "no language weights": (
        [*TRANSFORMER, *SHAPES, "vqgan={vqgan}", "init_from_gpt2={clip}"],
        "init_from_gpt2 must name a GPT-2",
    ),
    "a size of the other stage": (["stage=vqgan", "model_size=gpt2-small"], "there is no key|n_layer"),
    "unknown size": (["stage=transformer", "model_size=x"], "model_size must be one of gpt2-large, .*, got x"),
    "fsdp in stage 1": ([*VQGAN, *SHAPES, "trainer.strategy=fsdp"], "trainer.strategy must not be fsdp in stage=vqgan"),
    "fsdp with validation streams": (
        [
            *TRANSFORMER,
            "data=webdataset",
            "data.train_urls='https://example.org/a.tar'",
            "data.val_urls='https://example.org/b.tar'",
            "vqgan={vqgan}",
            "trainer.strategy=fsdp",
            "trainer.devices=2",
        ],
        "trainer.limit_val_batches must be a number that every process has .*, got None",
    ),
    "fsdp on any number": (
        [*TRANSFORMER, *SHAPES, "vqgan={vqgan}", "trainer.strategy=fsdp", "trainer.devices=auto"],
        "trainer.devices must be a number of devices with trainer.strategy=fsdp, got auto",
    ),
    "missing resume": ([*VQGAN, *SHAPES, "resume=x"], r"resume must name a .ckpt or a run folder .*, got x"),
    "resume a model": ([*VQGAN, *SHAPES, "resume={vqgan}/vqgan"], "resume must name a .ckpt or a run folder"),
    "resume the wrong stage": ([*VQGAN, *SHAPES, "resume={transformer}"], "but a VQGAN is needed"),
    "resume nonsense": ([*VQGAN, *SHAPES, "resume={damaged}"], "damaged.ckpt is not a readable checkpoint"),
    "resume another size": (
        [*VQGAN, *SHAPES, "resume={vqgan}", "model.autoencoder.ch=64"],
        "the same model, .* with .*ch=32",
    ),
    "output in a file": ([*VQGAN, *SHAPES, "output={damaged}/run"], "output must be a folder .*, got .*run"),
    "output that cannot be": ([*VQGAN, *SHAPES, "output=/proc/none/run"], "output must be a folder .*, got /proc"),
    "variant of another recipe": (
        [*VQGAN, *SHAPES, "variant=printed"],
        "variant=printed needs experiment=coco or experiment=imagenet, got experiment=shapes",
    ),
    "sweep over stages": (["--multirun", "stage=vqgan,transformer"], "--multirun cannot sweep over stage"),
    "no VGG": (
        [*VQGAN, *SHAPES, "model.loss.perceptual_weight=1", "model.loss.vgg_weights=/none"],
        "or disable the loss",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments_give_one_sentence_and_leave_no_files(call, runs, tmp_path, name):
    """There is no traceback."""
    places = dict(zip(("vqgan", "transformer"), runs))
    places |= {"damaged": tmp_path / "damaged.ckpt", "clip": tmp_path / "clip"}
    places["damaged"].write_bytes(b"PK\x03\x04 no checkpoint")
    places["clip"].mkdir()
    shutil.copy(
        Path(sys.modules["clipgen"].__file__).parent / "bundled/shapes/clip/open_clip_config.json", places["clip"]
    )
    before, (arguments, message) = everything(tmp_path), ERRORS[name]
    result = call(*(re.sub(r"\{(\w+)\}", lambda match: str(places[match[1]]), argument) for argument in arguments))
    assert result.code == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and re.search(f"^clipgen-train: error: .*{message}", lines[0]), result.stderr
    kept = {path for path in everything(tmp_path) if path.startswith("run")} if name == "monitor" else set()
    assert everything(tmp_path) - kept == before


def test_a_sweep_on_two_devices_is_refused(call, tmp_path):
    """Each process would start its own sweep."""
    two = ["trainer.accelerator=cpu", "trainer.devices=2"]
    result = call("--multirun", *VQGAN, *SHAPES, "output=sweep", "seed=1,2", *two)
    assert result.code == 1 and "--multirun needs a single device, got 2" in result.stderr
    assert not list(tmp_path.rglob("*.ckpt"))


def test_unexpected_error_suggests_debug_mode(call, monkeypatch, tmp_path):
    def fail(*_):
        raise KeyError("surprise")

    monkeypatch.setattr(Tokenizer, "training_step", fail)
    assert (
        "error: KeyError: 'surprise' (set CLIPGEN_DEBUG=1 for the traceback)"
        in call(*VQGAN, *SHAPES, "output=run").stderr
    )
    assert everything(tmp_path) == set()


def test_installed_command_prints_errors_to_stderr(tmp_path):
    """Also with the right exit code."""
    done = command("clipgen-train", *VQGAN, "model.chh=1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("clipgen-train: error: there is no key model.chh; --cfg job in its place shows all keys\n")
    assert everything(tmp_path) == set()


# ------------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_files():
    """Limit files to 30 kB, which is enough for the configuration and events, but not for a checkpoint."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_at_the_first_checkpoint_leaves_no_files(call, small_files, tmp_path):
    result = call(*VQGAN, *SHAPES, "output=run", "trainer.limit_val_batches=0")
    assert result.code == 1
    assert re.fullmatch(r"clipgen-train: error: File too large: .*last\.ckpt\n", result.stderr), result.stderr
    assert everything(tmp_path) == set()


@pytest.mark.parametrize("hidden", [False, True], ids=["plain", "inside torch"])
def test_full_disk_keeps_the_previous_checkpoint(monkeypatch, tmp_path, hidden):
    """The temporary file is removed."""
    path, files = tmp_path / "checkpoints" / "last.ckpt", AtomicCheckpointIO()
    files.save_checkpoint({"step": 1}, path)

    def full(checkpoint, file):
        file.write(b"half")
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            if not hidden:
                raise
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904, as torch does it

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        files.save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert only(path.parent) == path


# --------------------------------------------------------------------------------------------------------------- help


def test_help_lists_choices_and_common_keys(call):
    shown = call("--help")
    assert shown.code == 0 and shown.stderr == ""
    for word in ("stage=vqgan", "stage=transformer vqgan=", "resume=", "--cfg job", "--info", "hydra/sweeper=optuna"):
        assert word in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100


def test_help_lists_every_choice_of_the_files(call):
    """The order is chosen by hand, so a new file must be added to it."""
    folder = Path(config_dir())
    files = {group: {file.stem for file in (folder / group).glob("*.yaml")} for group in CHOICES}
    assert {group: set(options) for group, options in CHOICES.items()} == files
    shown_elsewhere = {"stage", "recipe", "trainer", "variant_recipe", "variant_data"}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(CHOICES) | shown_elsewhere
    text = call("--help").stdout
    assert text.index("experiment=shapes|cifar10") < text.index("data=folder|") < text.index("logger=tensorboard|")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("stage=vqgan experiment=", {"experiment=cifar10", "experiment=shapes"}),
        ("stage=vqgan trainer.max_", {"trainer.max_steps=", "trainer.max_epochs="}),
    ],
)
def test_shell_completion_knows_keys_and_choices(call, monkeypatch, typed, expected):
    line = f"clipgen-train {typed}"
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    assert expected <= set(call("--shell-completion", "query=bash").stdout.split())


def test_cfg_job_shows_all_keys(call, tmp_path):
    shown = call("stage=vqgan", "--cfg", "job")
    assert shown.code == 0 and {"model", "data", "trainer", "image_logger"} <= yaml.safe_load(shown.stdout).keys()
    assert everything(tmp_path) == set()


def test_image_grids_use_guidance_if_the_model_supports_it(call, tmp_path):
    """Otherwise training does not start."""
    make_vqgan(**VQGAN_SIZES).save(tmp_path / "vqgan")
    arguments = [*TRANSFORMER, *SHAPES, "vqgan=vqgan", "trainer.max_steps=2", "model.conditioning.drop_prob=0.5"]
    for name, scale in (("plain", 1), ("guided", 8)):
        result = call(*arguments, f"output={name}", f"image_logger.guidance_scale={scale}")
        assert result.code == 0, result.stderr
    plain, guided = (Path(run, "grids", "from_texts_0000002.png").read_bytes() for run in ("plain", "guided"))
    assert plain != guided
    result = call(*arguments[:-1], "output=no", "image_logger.guidance_scale=3")
    assert result.code == 1 and "image_logger.guidance_scale must be 1 for a model without" in result.stderr
