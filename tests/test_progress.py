"""Progress as log lines, and as the bar that every command draws in a terminal."""

from __future__ import annotations

import logging
import re
import sys
from functools import partial

import pytest
import pytorch_lightning as pl
from conftest import QUIET
from torch.utils.data import DataLoader

from clipgen import VQGAN as Tokenizer
from clipgen import progress
from clipgen.cli.progress_bar import ProgressBar, progress_bar
from clipgen.data.shapes import ShapesDataset
from clipgen.progress import ProgressLog
from clipgen.training.callbacks import ProgressReport, ValidationProgress


@pytest.fixture
def clock(monkeypatch):
    """A list whose only entry is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_line_shows_rate_and_eta(clock):
    log = ProgressLog("Generating", 100)
    clock[0] = 10
    log.advance(12.5)
    log.advance(12.5)
    assert str(log) == "Generating: 25 of 100 images, 2.5 img/s, ETA 0:00:30"


def test_line_without_a_total_has_no_eta(clock):
    log = ProgressLog("Encoding")
    clock[0] = 10
    log.advance(5)
    assert str(log) == "Encoding: 5 images, 0.5 img/s"


def test_steps_before_a_resume_do_not_count_in_rates(clock):
    log = ProgressLog("training", 500, "steps", first=400)
    clock[0] = 5
    log.details = "train/loss 1"
    log.advance(50, images=400)
    assert str(log) == "training: 450 of 500 steps, 10 it/s, 80 img/s, ETA 0:00:05  train/loss 1"


def test_line_is_logged_once_per_interval(clock, caplog):
    caplog.set_level(logging.INFO)
    log = ProgressLog("Generating", 8)
    for clock[0] in (30, 61, 90, 122):
        log.advance(1)
    lines = [message.partition(" images")[0] for message in caplog.messages]
    assert lines == ["Generating: 2 of 8", "Generating: 4 of 8"]


def test_bar_in_a_terminal_shows_rate_and_eta(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("Generating", 4) as advance:
        advance(1)
        advance(0.5)
    shown = capsys.readouterr().err
    assert "Generating" in shown and "img/s" in shown and "ETA" in shown


def test_validation_reports_the_images_of_each_batch(tiny_vqgan):
    counts = []
    trainer = pl.Trainer(accelerator="cpu", callbacks=[ValidationProgress(counts.append)], **QUIET)
    trainer.validate(tiny_vqgan, DataLoader(ShapesDataset(20), 8), verbose=False)
    assert counts == [8, 8, 4]


def test_progress_reads_losses_as_often_as_they_are_logged(fit, tiny_vqgan, caplog):
    """Reading a loss waits for the GPU."""
    caplog.set_level(logging.INFO)
    fit(tiny_vqgan, 5, ProgressReport(partial(ProgressLog, interval=0.0)), log_every_n_steps=2)
    lines = [record.getMessage() for record in caplog.records if record.name == "clipgen.progress"]
    assert [line.split(",")[0] for line in lines] == [f"training: {step} of 5 steps" for step in range(1, 6)]
    assert all(re.search(r", \S+ it/s, \S+ img/s, ETA \d+:\d\d:\d\d(  |$)", line) for line in lines)
    losses = [re.search(r"ETA \S+ *(.*)", line)[1] for line in lines]
    assert losses[0] == "" and losses[1] == losses[2] != losses[3] == losses[4] and "train/loss 1." in losses[1]


def test_progress_bar_counts_the_steps_of_all_epochs(fit, tiny_vqgan):
    report = ProgressReport(ProgressBar)
    fit(tiny_vqgan, 5, report, limit_train_batches=2)
    bar = report.progress.bar
    (task,) = bar.tasks
    assert (task.completed, task.total, task.description) == (5, 5, "training") and not bar.live.is_started


def test_progress_bar_stops_when_training_is_interrupted(fit, tiny_vqgan, monkeypatch):
    report = ProgressReport(ProgressBar)

    def interrupted(*_):
        raise KeyboardInterrupt  # no signal: a shell's background jobs ignore it

    monkeypatch.setattr(Tokenizer, "training_step", interrupted)
    with pytest.raises(SystemExit):  # what Lightning makes of it
        fit(tiny_vqgan, 5, report)
    assert report.progress.bar.tasks and not report.progress.bar.live.is_started
