"""A run continues its table of metrics when it is resumed."""

from __future__ import annotations

import csv
import shutil
from functools import partial

import pytest
from commands import SHAPES, VQGAN


@pytest.fixture
def call(call):
    return partial(call, "clipgen-train")


def test_metrics_csv_outlives_a_resume_that_logs_nothing(call, tmp_path):
    arguments = [*VQGAN, *SHAPES, "logger=csv", "output=run", "trainer.max_steps=2", "trainer.log_every_n_steps=1"]
    assert call(*arguments).code == 0
    before = (tmp_path / "run/metrics.csv").read_bytes()
    assert call("resume=run").code == 0 and (tmp_path / "run/metrics.csv").read_bytes() == before


def test_metrics_csv_has_each_step_once_after_resuming(call, tmp_path):
    """Steps after the checkpoint are written again, not twice."""
    arguments = [*VQGAN, *SHAPES, "logger=csv", "output=run"]
    assert call(*arguments, "trainer.max_steps=3").code == 0
    shutil.copy(tmp_path / "run/checkpoints/last.ckpt", tmp_path / "third.ckpt")
    assert call(*arguments, "resume=run").code == 0
    shutil.copy(tmp_path / "third.ckpt", tmp_path / "run/checkpoints/last.ckpt")
    assert call(*arguments, "resume=run", "trainer.max_steps=5").code == 0
    with (tmp_path / "run/metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == [0, 1, 2, 3, 4]
