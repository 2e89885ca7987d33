"""A run that is stopped anywhere and resumed is bit-identical to an uninterrupted one, with every data source."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import TINY_VQGAN, command, interrupt_at, torchrun
from image_data import encoded, make_tar
from models import VQGAN_SIZES, make_vqgan
from torch.distributed import TCPStore

from clipgen.cli.config import compose_config
from clipgen.cli.train import to_training_config
from clipgen.data.shapes import ShapesDataset
from clipgen.images import to_pil
from clipgen.tokenizer_identity import saved_identity
from clipgen.training.callbacks import checkpointing
from clipgen.training.callbacks.checkpointing import renumber
from clipgen.training.cluster import use_own_store
from clipgen.training.resume import check_strategy
from clipgen.training.run import make_strategy
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

UNUSED = "ddp_find_unused_parameters_true"
FEW_SHAPES = ["data=shapes", "data.train_size=14", "data.val_size=4"]
SMALL = [
    "data.batch_size=4",
    "trainer.max_steps=7",
    "trainer.val_check_interval=5",
    "trainer.check_val_every_n_epoch=null",
    "image_logger.num_images=2",
    "logger=none",
    "checkpoint.every_n_steps=1",
]
STAGES = {
    "vqgan": [
        *TINY_VQGAN,
        "model.optimizer.ema_decay=0.9",
        "model.gan.weight=0.5",
        "model.gan.start_step=2",
        "model.autoencoder.dropout=0.1",
        "model.gan.channels=8",
        "model.gan.num_layers=1",
        "model.gan.lecam_weight=0.1",
        "model.quantizer.dead_code_reset_after=2",
        "model.quantizer.kmeans_iters=2",
        *SMALL,
    ],
    "transformer": [
        "stage=transformer",
        "model.n_layer=1",
        "model.n_head=2",
        "model.n_embd=32",
        "model.optimizer.warmup_steps=1",
        "model.dropout=0.1",
        "model.conditioning.drop_prob=0.3",
        "model.conditioning.noise_cosine=0.9",
        "model.optimizer.name=muon",
        "model.optimizer.ema_decay=0.9",
        "model.clip_loss.weight=0.2",
        "model.clip_loss.estimator=gumbel",
        "model.clip_loss.interval=2",
        *SMALL,
    ],
}


@pytest.fixture
def sources(tmp_path, call) -> dict[str, list[str]]:
    """Return the arguments of each data source, with few images, so that seven steps take several epochs."""
    pictures = to_pil(ShapesDataset(14, image_size=40, seed=2).render(range(14)))
    (tmp_path / "images").mkdir()
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / "images" / f"{i}.png")
    for name, part in (("a", pictures[:6]), ("b", pictures[6:])):
        make_tar(tmp_path / f"{name}.tar", {f"{i}.png": encoded(picture, "PNG") for i, picture in enumerate(part)})
    make_vqgan(**VQGAN_SIZES).save(tmp_path / "vqgan")
    cache = call("clipgen-encode", *FEW_SHAPES, "vqgan=vqgan", "output=cache", "device=cpu", "shard_size=5")
    assert cache.code == 0, cache.stderr
    streams = [
        "data=webdataset",
        "data.train_urls=[a.tar,b.tar]",
        "data.val_urls=a.tar",
        "data.num_workers=0",
        "data.shuffle=5",
        "data.image_size=32",
    ]
    return {
        "shapes": FEW_SHAPES,
        "folder": [
            "data=folder",
            "data.root=images",
            "data.image_size=32",
            "data.num_workers=0",
            "data.val_fraction=0.2",
        ],
        "webdataset": streams,
        "workers": [*streams[:-3], "data.num_workers=2", *streams[-2:]],
        "encoded": ["data=cached", "data.root=cache"],
    }


def slow(*arguments: Any) -> Any:
    return pytest.param(*arguments, marks=pytest.mark.slow)


def state(run: str) -> dict[str, torch.Tensor]:
    """Return everything in the last checkpoint that the next step depends on."""
    checkpoint = torch.load(Path(run) / "checkpoints" / "last.ckpt", weights_only=True)
    tensors = dict(checkpoint["state_dict"])
    for half, optimizer in enumerate(checkpoint["optimizer_states"]):
        for number, moments in optimizer["state"].items():
            tensors |= {f"{half}.{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    return tensors | {"step": torch.tensor(checkpoint["global_step"])}


@pytest.mark.parametrize(
    ("stage", "kind", "stop"),
    [
        ("vqgan", "shapes", 4),
        ("vqgan", "folder", 2),
        ("transformer", "encoded", 1),
        ("transformer", "shapes", 3),
        slow("vqgan", "webdataset", 5),
        slow("transformer", "encoded", 5),
        slow("transformer", "folder", 5),
        slow("vqgan", "workers", 3),
    ],
)
def test_resume_is_bit_identical(call, sources, stage, kind, stop):
    arguments = [*STAGES[stage], *sources[kind], *(["vqgan=vqgan"] if stage == "transformer" else [])]
    stopped_and_resumed(call, arguments, stop)


def test_resume_is_bit_identical_with_gradient_accumulation(call, sources):
    more = ["vqgan=vqgan", "model.optimizer.grad_accum_steps=2", "model.optimizer.grad_clip=0.5"]
    stopped_and_resumed(call, [*STAGES["transformer"], *sources["encoded"], *more], 3)


EPOCHS = [
    "trainer.max_steps=-1",
    "trainer.max_epochs=3",
    "trainer.val_check_interval=null",
    "trainer.check_val_every_n_epoch=1",
]


@pytest.mark.parametrize(
    ("stage", "kind", "stop", "more"),
    [
        ("vqgan", "folder", 3, []),
        ("transformer", "encoded", 6, []),
        ("transformer", "encoded", 5, EPOCHS),
        slow("vqgan", "shapes", 2, []),
        slow("vqgan", "webdataset", 4, []),
        slow("transformer", "encoded", 3, EPOCHS),
        slow("vqgan", "shapes", 3, ["model.optimizer.grad_accum_steps=2"]),
        slow("vqgan", "folder", 5, EPOCHS),
        slow("vqgan", "webdataset", 4, [*EPOCHS, "trainer.limit_train_batches=3"]),
    ],
)
def test_resume_after_ctrl_c_is_bit_identical(call, sources, monkeypatch, stage, kind, stop, more):
    """In the middle and at the end of an epoch, with a limit on steps or on epochs, and a cosine schedule."""
    tokenizer = ["vqgan=vqgan"] if stage == "transformer" else []
    arguments = ["clipgen-train", *STAGES[stage], *sources[kind], *tokenizer, "model.optimizer.warmup_steps=4", *more]
    assert call(*arguments, "output=straight").code == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, {"vqgan": VQGAN, "transformer": ConditionalTransformer}[stage], "training_step", stop)
        assert call(*arguments, "output=half").code == 130
    assert call(*arguments, "output=half", "resume=half").code == 0
    straight, resumed = state("straight"), state("half")
    assert not [name for name in straight if not torch.equal(straight[name], resumed[name])]


@pytest.mark.parametrize(
    ("stage", "kind", "accumulated"),
    [
        ("vqgan", "shapes", 1),
        slow("vqgan", "shapes", 2),
        ("transformer", "encoded", 1),
        slow("transformer", "encoded", 2),
    ],
)
def test_logged_losses_are_identical_after_ctrl_c(call, sources, monkeypatch, stage, kind, accumulated):
    """Each step is logged once, including the last step before the interruption."""
    more = ["vqgan=vqgan", "model.clip_loss.interval=1"] if stage == "transformer" else []
    arguments = [
        "clipgen-train",
        *STAGES[stage],
        *sources[kind],
        *more,
        "model.optimizer.schedule=cosine",
        "logger=csv",
        "trainer.log_every_n_steps=1",
        f"model.optimizer.grad_accum_steps={accumulated}",
    ]
    assert call(*arguments, "output=straight").code == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, {"vqgan": VQGAN, "transformer": ConditionalTransformer}[stage], "training_step", 4)
        assert call(*arguments, "output=half").code == 130
    assert call(*arguments, "output=half", "resume=half").code == 0
    straight, resumed = (Path(run, "metrics.csv").read_text() for run in ("straight", "half"))
    assert straight == resumed
    rows = list(csv.DictReader(straight.splitlines()))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(7))
    assert len([row for row in rows if not row["train/loss"]]) >= 2  # validations
    weights = state("straight"), state("half")
    assert not [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]


@pytest.mark.parametrize(
    ("stop", "more"),
    [(2, []), slow(3, []), slow(2, EPOCHS), slow(8, []), (6, ["trainer.max_steps=6"])],
    ids=["first batch", "second batch", "epochs", "after the last step", "due at the last step"],
)
def test_interrupted_validation_reruns_on_resume(call, sources, monkeypatch, stop, more):
    """Otherwise another checkpoint would be considered the best, and the log would have gaps."""
    arguments = [
        "clipgen-train",
        *STAGES["vqgan"],
        *sources["shapes"],
        "model.optimizer.schedule=constant",
        "data.val_size=8",
        "trainer.val_check_interval=2",
        "logger=csv",
        "trainer.log_every_n_steps=1",
        *more,
    ]
    validated = []
    original = VQGAN.on_validation_epoch_end
    monkeypatch.setattr(
        VQGAN,
        "on_validation_epoch_end",
        lambda self: (validated.append((self.global_step, self.counts.sum().item())), original(self))[1],
    )
    assert call(*arguments, "output=straight").code == 0
    validations = validated[1:]  # the first is the sanity check's
    validated.clear()
    with monkeypatch.context() as patch:  # 2 and 3: its first and its second batch
        interrupt_at(patch, VQGAN, "validation_step", stop)
        assert call(*arguments, "output=half").code == 130
    assert call(*arguments, "output=half", "resume=half").code == 0
    assert [entry for entry in validated if entry[0]] == validations
    best = [torch.load(Path(run) / "checkpoints" / "best.ckpt", weights_only=True) for run in ("straight", "half")]
    assert best[0]["global_step"] == best[1]["global_step"]
    assert logged("straight") == logged("half")
    assert all(torch.equal(best[1]["state_dict"][name], value) for name, value in best[0]["state_dict"].items())


@pytest.mark.parametrize("interval", ["null", "1.0"])
def test_steps_after_the_last_complete_epoch_can_be_the_best(call, sources, interval):
    once_per_epoch = [f"trainer.val_check_interval={interval}", "trainer.check_val_every_n_epoch=1"]
    arguments = [
        "clipgen-train",
        *STAGES["transformer"],
        *sources["encoded"],
        "vqgan=vqgan",
        "logger=csv",
        *once_per_epoch,
    ]
    result = call(*arguments, "output=run")
    assert result.code == 0, result.stderr
    rows = list(csv.DictReader(Path("run/metrics.csv").read_text().splitlines()))
    losses = {int(row["step"]): float(row["val/cross_entropy"]) for row in rows if row["val/cross_entropy"]}
    best = torch.load("run/checkpoints/best.ckpt", weights_only=True)["global_step"]
    assert max(losses) == 6 and len(losses) > 1 and best == min(losses, key=losses.__getitem__) + 1


def logged(run: str) -> list[dict[str, str]]:
    """Return the rows of the log of a run, without the epochs: a validation that is repeated may count the next one."""
    rows = list(csv.DictReader(Path(run, "metrics.csv").read_text().splitlines()))
    return [{name: value for name, value in row.items() if name != "epoch"} for row in rows]


def stopped_and_resumed(call, arguments: list[str], stop: int) -> None:
    """Check that a run that was stopped and resumed equals an uninterrupted one."""
    schedule = ["model.optimizer.schedule=constant"]  # a cosine would end where the shorter run does
    for options in (["output=straight"], ["output=half", f"trainer.max_steps={stop}"], ["output=half", "resume=half"]):
        result = call("clipgen-train", *arguments, *schedule, *options)
        assert result.code == 0, result.stderr
    straight, resumed = state("straight"), state("half")
    assert straight.keys() == resumed.keys()
    assert not [name for name in straight if not torch.equal(straight[name], resumed[name])]


@pytest.mark.parametrize(
    ("stage", "kind", "more"),
    [("vqgan", "shapes", []), ("transformer", "encoded", ["vqgan=vqgan", "model.optimizer.weight_decay=0.5"])],
)
def test_optimizer_settings_can_be_changed_on_resume(call, sources, stage, kind, more):
    """The learning rate, betas and weight decay of the command line replace those of the checkpoint."""
    run = [*STAGES[stage], *sources[kind], *more[:1]]
    extra = [
        "model.optimizer.learning_rate=1e-5",
        "model.optimizer.betas=[0.1,0.2]",
        "trainer.max_steps=5",
        *more[1:],
    ]
    for options in (
        [*run, *extra, "output=new"],
        [*run, "trainer.max_steps=3", "output=old"],
        ["resume=old", *extra],
    ):
        result = call("clipgen-train", *options)
        assert result.code == 0, result.stderr
    assert settings("old") == settings("new")


def settings(run: str) -> list[dict[str, Any]]:
    """Return the optimizer settings of each parameter group."""
    checkpoint = torch.load(Path(run) / "checkpoints" / "last.ckpt", weights_only=True)
    groups = [group for optimizer in checkpoint["optimizer_states"] for group in optimizer["param_groups"]]
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def on_two_processes(sources: dict[str, list[str]]) -> list[str]:
    """Return the arguments that train stage 2 on a token cache in two processes."""
    return [
        *STAGES["transformer"],
        *sources["encoded"],
        "data.batch_size=2",
        "model.optimizer.schedule=constant",
        "trainer.devices=2",
        "trainer.accelerator=cpu",
    ]


@pytest.mark.slow
def test_ddp_resume_is_bit_identical(sources, tmp_path):
    """From a token cache."""
    arguments = on_two_processes(sources)
    for options in (["output=straight"], ["output=half", "trainer.max_steps=4"], ["output=half", "resume=half"]):
        done = command("clipgen-train", *arguments, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    straight, resumed = state(tmp_path / "straight"), state(tmp_path / "half")
    assert not [name for name in straight if not torch.equal(straight[name], resumed[name])]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for other processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_processes_stop_at_the_same_step(sources, tmp_path, number):
    """Even if they receive Ctrl-C or SIGTERM at different steps."""
    arguments = [
        *STAGES["vqgan"],
        *sources["folder"],
        "data.batch_size=2",
        "model.optimizer.schedule=constant",
        "logger=csv",
        "trainer.max_steps=80",
        "trainer.val_check_interval=100",
        "trainer.devices=2",
        "trainer.accelerator=cpu",
        "checkpoint.every_n_steps=20",
    ]
    assert command("clipgen-train", *arguments, "output=straight", cwd=tmp_path).returncode == 0
    program = Path(sys.executable).parent / "clipgen-train"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [program, *arguments, "output=half"],
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (tmp_path / "half/checkpoints/last.ckpt").is_file():
        time.sleep(0.02)
    os.killpg(process.pid, number)
    assert process.wait(timeout=120) == 130
    assert 0 < state(tmp_path / "half")["step"] < 80
    assert command("clipgen-train", *arguments, "output=half", "resume=half", cwd=tmp_path).returncode == 0
    straight, resumed = state(tmp_path / "straight"), state(tmp_path / "half")
    assert not [name for name in straight if not torch.equal(straight[name], resumed[name])]


def test_processes_agree_to_stop_every_ten_steps(tmp_path, monkeypatch):
    """And before a checkpoint or a validation, for which they wait for each other anyway. One process stops at once."""
    monkeypatch.setattr(checkpointing, "validation_due", lambda trainer: trainer.global_step == 27)
    assert steps_of_agreements(2, tmp_path) == [10, 15, 20, 27, 30]
    assert steps_of_agreements(1, tmp_path) == list(range(1, 31))


def steps_of_agreements(world_size: int, tmp_path: Path) -> list[int]:
    """Return the steps at which the processes ask each other whether to stop."""
    steps = []

    def decide(value: bool, all: bool) -> bool:
        steps.append(trainer.global_step)
        return value

    trainer = SimpleNamespace(world_size=world_size, global_step=0, save_checkpoint=lambda *_, **__: None)
    trainer.strategy = SimpleNamespace(reduce_boolean_decision=decide)
    last = checkpointing.LastCheckpoint(tmp_path / "last.ckpt", every_n_steps=15)
    for step in range(1, 31):
        last.on_train_batch_start(trainer)
        trainer.global_step = step
        last.on_train_batch_end(trainer)
    return steps


# ------------------------------------------------------------------------------------- one command, signals, strategies


def test_resume_auto_starts_a_run_and_then_resumes_it(call, tmp_path):
    arguments = [
        "clipgen-train",
        *STAGES["vqgan"],
        *FEW_SHAPES,
        "model.optimizer.schedule=constant",
    ]
    assert call(*arguments, "output=straight").code == 0
    for more in (["trainer.max_steps=3"], [], []):  # starts, continues, and has nothing left to do
        result = call(*arguments, *more, "output=run", "resume=auto")
        assert result.code == 0, result.stderr
    straight, resumed = state("straight"), state("run")
    assert not [name for name in straight if not torch.equal(straight[name], resumed[name])]


def test_resume_auto_resumes_every_run_of_a_sweep(call, tmp_path):
    arguments = [
        "clipgen-train",
        "--multirun",
        *STAGES["vqgan"],
        *FEW_SHAPES,
        "output=sweep",
        "seed=1,2",
        "resume=auto",
    ]
    for steps in (2, 3):
        assert call(*arguments, f"trainer.max_steps={steps}").code == 0
        assert [int(state(f"sweep/{i}")["step"]) for i in range(2)] == [steps, steps]


@pytest.mark.parametrize("trained_again", [False, True])
def test_stage_2_is_resumed_with_the_tokenizer_in_its_folder(call, trained_again):
    """The one that the first command named may have been moved, or trained again."""
    make_vqgan(**VQGAN_SIZES).save("tokenizer")
    arguments = [*STAGES["transformer"], *FEW_SHAPES, "vqgan=tokenizer", "output=run", "trainer.max_steps=1"]
    assert call("clipgen-train", *arguments).code == 0
    identity = saved_identity("run/vqgan")
    Path("tokenizer").rename("moved")
    if trained_again:
        make_vqgan(**VQGAN_SIZES).save("tokenizer")
        assert saved_identity("tokenizer") != identity
    result = call("clipgen-train", "resume=run", "trainer.max_steps=2")
    assert result.code == 0, result.stderr
    assert saved_identity("run/vqgan") == identity


def test_resume_auto_needs_an_output(call):
    result = call("clipgen-train", *STAGES["vqgan"], "resume=auto")
    assert result.code == 1 and "resume=auto needs a folder that stays the same: give output=..." in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
@pytest.mark.parametrize("times", [1, 2])
def test_sighup_saves_and_stops(call, sources, monkeypatch, times):
    """A closed terminal sends it, sometimes twice."""
    interrupt_by(monkeypatch, signal.SIGHUP, 3, times)
    assert (
        call(
            "clipgen-train",
            *STAGES["vqgan"],
            *sources["shapes"],
            "output=run",
            "checkpoint.every_n_steps=100",
            "trainer.val_check_interval=100",
        ).code
        == 130
    )
    assert state("run")["step"] == 3


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_sighup_is_ignored_under_nohup(call, sources, monkeypatch):
    interrupt_by(monkeypatch, signal.SIGHUP, 3)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert call("clipgen-train", *STAGES["vqgan"], *sources["shapes"], "output=run").code == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert state("run")["step"] == 7


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGUSR1")
def test_sigusr1_under_slurm_saves_and_requeues_the_job(call, sources, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f"#!/bin/sh\necho $* > {tmp_path}/asked\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    arguments = ["clipgen-train", *STAGES["vqgan"], *sources["shapes"], "output=run", "resume=auto"]
    with monkeypatch.context() as patch:
        interrupt_by(patch, signal.SIGUSR1, 3)
        assert call(*arguments).code == 130
    assert state("run")["step"] == 3 and (tmp_path / "asked").read_text() == "requeue 77\n"
    assert call(*arguments).code == 0 and state("run")["step"] == 7


def interrupt_by(monkeypatch: pytest.MonkeyPatch, number: int, step: int, times: int = 1) -> None:
    """Send a signal in the middle of a training step of stage 1."""
    original = VQGAN.training_step
    calls = iter(range(1, 1000))

    def interrupted(self, *arguments):
        if next(calls) == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(self, *arguments)

    monkeypatch.setattr(VQGAN, "training_step", interrupted)


KILLER = """
import os, signal, sys
from pathlib import Path
from clipgen.cli import train
from clipgen.transformer import ConditionalTransformer
original, mark = ConditionalTransformer.training_step, Path("killed")
def step(self, *arguments):
    if self.global_step == 4 and os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments)
ConditionalTransformer.training_step = step
train.main()
"""


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_bit_identically(sources, tmp_path):
    """With --max-restarts and resume=auto."""
    arguments = on_two_processes(sources)
    assert command("clipgen-train", *arguments, "output=straight", cwd=tmp_path).returncode == 0
    (tmp_path / "killer.py").write_text(KILLER)
    done = torchrun(
        tmp_path, ["--nproc-per-node=2", "--max-restarts=2"], "killer.py", *arguments, "output=run", "resume=auto"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists()
    straight, resumed = state(tmp_path / "straight"), state(tmp_path / "run")
    assert not [name for name in straight if not torch.equal(straight[name], resumed[name])]


def test_restarted_processes_do_not_share_the_store_of_the_last_attempt(monkeypatch):
    """A stale address in torchrun's store made restarted processes wait for dead ones."""
    agent = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    ports = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("MASTER_PORT", str(agent.port))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        use_own_store()
        ports.append(os.environ["MASTER_PORT"])
        assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "False"
    assert ports[0] == ports[1] != str(agent.port)


def test_a_first_attempt_keeps_the_store_of_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    use_own_store()
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"


def test_a_restart_on_several_machines_needs_a_new_store_from_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE must be 1"):
        use_own_store()


def test_torchrun_with_another_number_of_processes_is_refused(call, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = call("clipgen-train", *STAGES["vqgan"], *FEW_SHAPES)
    assert result.code == 1 and "must be 2, the processes that torchrun started, got 1" in result.stderr


@pytest.mark.parametrize(
    ("settings", "stage", "gan", "strategy"),
    [
        ({}, "vqgan", True, "auto"),
        ({"devices": 2}, "vqgan", True, UNUSED),
        ({"num_nodes": 2}, "vqgan", True, UNUSED),
        ({"strategy": "ddp"}, "vqgan", True, UNUSED),
        ({"strategy": "ddp", "devices": 2}, "vqgan", True, UNUSED),
        ({"strategy": "ddp"}, "vqgan", False, "ddp"),
        ({"devices": 2}, "vqgan", False, "auto"),
        ({"devices": 2}, "transformer", False, "auto"),
        ({"strategy": "ddp"}, "transformer", False, "ddp"),
        ({"num_nodes": 2}, "transformer", False, "auto"),
    ],
)
def test_only_stage_1_with_a_gan_finds_unused_parameters_under_ddp(settings, stage, gan, strategy):
    """Before its start step the discriminator has no gradients. The experiment shapes has none."""
    arguments = [f"trainer.{key}={value}" for key, value in settings.items()]
    if gan:
        arguments.append("model.gan.weight=0.5")
    config = compose_config(f"stage={stage}", *arguments)
    if stage == "transformer":
        config.vqgan = "shapes"
    assert make_strategy(to_training_config(config)) == strategy


@pytest.mark.slow
@pytest.mark.parametrize("gan", [True, False], ids=["with GAN", "without GAN"])
@pytest.mark.parametrize(
    "options", [["--nproc-per-node=1"], ["--nproc-per-node=2"]], ids=["one process", "two processes"]
)
def test_stage_1_trains_under_ddp(sources, tmp_path, options, gan):
    (tmp_path / "main.py").write_text("from clipgen.cli import train; train.main()")
    more = [
        "data.batch_size=2",
        "trainer.strategy=ddp",
        f"trainer.devices={options[0][-1]}",
        "trainer.accelerator=cpu",
        "output=run",
    ]
    if not gan:
        more.append("model.gan.weight=0")
    done = torchrun(tmp_path, options, "main.py", *STAGES["vqgan"], *sources["folder"], *more)
    assert done.returncode == 0, done.stderr
    # DDP's advice for models that have no unused parameters
    assert gan or "find_unused_parameters" not in done.stderr
    assert state(tmp_path / "run")["step"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_checkpoints_can_be_resumed_with_fsdp_and_without(call, sources, tmp_path, optimizer):
    """Each moment of the optimizer stays with its parameter: the result equals that of one device."""
    arguments = [
        "clipgen-train",
        *STAGES["transformer"],
        *sources["encoded"],
        "model.optimizer.schedule=constant",
        f"model.optimizer.name={optimizer}",
        "model.optimizer.ema_decay=0",
        "model.dropout=0",
        "model.conditioning.drop_prob=0",
        "model.conditioning.noise_cosine=1",
        "model.clip_loss.weight=0",
        "model.optimizer.learning_rate=1e-2",
        "trainer.accelerator=cpu",
    ]
    assert call(*arguments, "output=straight").code == 0
    assert call(*arguments, "output=run", "trainer.max_steps=3").code == 0
    # a process of its own, which joins a process group
    sharded = command("clipgen-train", "resume=run", "trainer.max_steps=5", "trainer.strategy=fsdp", cwd=tmp_path)
    assert sharded.returncode == 0 and "No image grids are made" in sharded.stderr, sharded.stderr
    result = call("clipgen-train", "resume=run", "trainer.max_steps=7", "trainer.strategy=auto")
    assert result.code == 0, result.stderr
    straight, resumed = state(tmp_path / "straight"), state(tmp_path / "run")
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_fsdp_refuses_checkpoints_with_moments_in_another_order(call, sources):
    """Older versions wrote such checkpoints."""
    arguments = ["clipgen-train", *STAGES["transformer"], *sources["encoded"], "trainer.max_steps=2", "output=run"]
    assert call(*arguments).code == 0
    model = ConditionalTransformer.load("run")
    path = Path("run/checkpoints/last.ckpt")
    check_strategy(str(path), model, "fsdp")  # as written today
    checkpoint = torch.load(path, weights_only=True)
    (optimizer,) = checkpoint["optimizer_states"]
    order = [number for group in optimizer["param_groups"] for number in group["params"]]
    renumber(optimizer, {number: place for place, number in enumerate(order)})
    torch.save(checkpoint, path)
    check_strategy(str(path), model, "auto")
    with pytest.raises(ValueError, match=r"trainer\.strategy must not be fsdp for run/checkpoints/last\.ckpt"):
        check_strategy(str(path), model, "fsdp")
