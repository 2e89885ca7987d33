"""A resumed run continues its log."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from commands import SHAPES, VQGAN
from pytorch_lightning.loggers import wandb as lightning_wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipgen.training.loggers import WANDB_RUN, remove_log_links, stored_run_id

ARGUMENTS = ["clipgen-train", *VQGAN, *SHAPES, "image_logger.num_images=1", "model.optimizer.schedule=constant"]


class FakeRun:
    """What clipgen and Lightning use of a run of Weights & Biases."""

    def __init__(self, id: str):
        self.id = id
        self.name = "run"
        self.config = SimpleNamespace(update=lambda *args, **kwargs: None)
        self.steps: list[int] = []

    def log(self, metrics: dict[str, Any], **_: Any) -> None:
        self.steps.append(metrics["trainer/global_step"])

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def finish(self) -> None:
        sys.modules["wandb"].run = None  # type: ignore[attr-defined]


@pytest.fixture
def wandb_runs(monkeypatch) -> list[FakeRun]:
    """Replace the package wandb, and return the list of the runs that are started."""
    started: list[FakeRun] = []
    wandb = ModuleType("wandb")

    def init(id: str, resume: str, **_: Any) -> FakeRun:
        assert resume == "allow"
        wandb.run = FakeRun(id)
        started.append(wandb.run)
        return wandb.run

    wandb.init = init
    wandb.run = None
    wandb.Image = lambda *args, **kwargs: None
    monkeypatch.setattr(lightning_wandb, "_WANDB_AVAILABLE", True)
    parts = {"wandb.sdk": {}, "wandb.sdk.lib": {"RunDisabled": FakeRun}, "wandb.wandb_run": {"Run": FakeRun}}
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return started


def test_resumed_run_continues_its_wandb_run(call, wandb_runs):
    arguments = [*ARGUMENTS, "logger=wandb", "output=run"]
    assert call(*arguments, "trainer.max_steps=2").code == 0
    result = call(*arguments, "resume=auto")
    assert result.code == 0, result.stderr
    first, second = wandb_runs
    assert first.id == second.id == json.loads(Path("run", WANDB_RUN).read_text())["id"]
    assert set(first.steps) == {0, 1, 2} and min(second.steps) >= 2


def test_links_that_wandb_leaves_in_a_run_folder_do_not_stop_a_resume(call, wandb_runs, tmp_path):
    """wandb 0.31 links its debug log, which it writes to the user's cache, into the folder of each run."""
    assert call(*ARGUMENTS, "logger=wandb", "output=run", "trainer.max_steps=2").code == 0
    log = tmp_path / "core-debug.log"
    log.write_text("log")
    logs = Path("run", "wandb", "offline-run-20261128_144711-c87f44f0", "logs")
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to(log)
    assert call("clipgen-train", "resume=run", "logger=wandb", "trainer.max_steps=3").code == 0
    assert log.read_text() == "log" and not (logs / "debug-core.log").is_symlink()


def test_links_in_a_linked_wandb_folder_are_not_touched(tmp_path):
    elsewhere = tmp_path / "elsewhere" / "run" / "logs"
    elsewhere.mkdir(parents=True)
    (elsewhere / "debug-core.log").symlink_to("/dev/null")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").symlink_to(tmp_path / "elsewhere")
    remove_log_links(tmp_path / "run")
    assert (elsewhere / "debug-core.log").is_symlink()


def test_moved_run_folder_continues_its_wandb_run(call, wandb_runs):
    assert call(*ARGUMENTS, "logger=wandb", "output=run", "trainer.max_steps=2").code == 0
    Path("run").rename("moved")
    assert call("clipgen-train", "resume=moved", "logger=wandb", "trainer.max_steps=3").code == 0
    assert wandb_runs[0].id == wandb_runs[1].id


def test_other_runs_have_wandb_runs_of_their_own(call, wandb_runs):
    """The runs of a sweep, and a run that is resumed in another folder."""
    more = ["logger=wandb", "trainer.max_steps=1"]
    assert call(*ARGUMENTS[:1], "--multirun", *ARGUMENTS[1:], *more, "seed=1,2", "output=sweep").code == 0
    assert call("clipgen-train", "resume=sweep/0", "logger=wandb", "output=other", "trainer.max_steps=2").code == 0
    assert len({run.id for run in wandb_runs}) == len(wandb_runs) == 3


def test_id_of_a_wandb_run_is_taken_from_the_command_line(call, wandb_runs):
    assert call(*ARGUMENTS, "logger=wandb", "+logger.id=mine", "output=run", "trainer.max_steps=1").code == 0
    assert wandb_runs[0].id == "mine"


@pytest.mark.parametrize("value", ["", "../x", 3, "x" * 200, None])
def test_damaged_wandb_id_is_refused(tmp_path, value):
    assert stored_run_id(tmp_path) is None
    (tmp_path / WANDB_RUN).write_text(json.dumps({"id": value}))
    with pytest.raises(ValueError, match="must contain the id of a run, got"):
        stored_run_id(tmp_path)


def test_resumed_run_continues_in_one_tensorboard_log(call):
    """Steps after the checkpoint that were logged before the run was killed are hidden."""
    arguments = [*ARGUMENTS, "logger=tensorboard", "output=run"]
    assert call(*arguments, "trainer.max_steps=2").code == 0
    checkpoint = Path("run/checkpoints/last.ckpt")
    second = checkpoint.read_bytes()
    assert call(*arguments, "resume=run").code == 0
    checkpoint.write_bytes(second)
    assert call(*arguments, "resume=run", "trainer.max_steps=5").code == 0
    events = EventAccumulator("run").Reload()
    assert [event.step for event in events.Scalars("train/reconstruction_loss")] == [0, 1, 2, 3, 4]
    steps = [event.step for event in events.Scalars("val/reconstruction_loss")]
    assert steps == sorted(set(steps))
    assert not [path for path in Path("run").rglob("events.*") if path.parent != Path("run")]
