"""Progress as log lines, and as the bar that every command draws in a terminal."""

from __future__ import annotations

import logging
import sys

import pytest
import pytorch_lightning as pl
from conftest import QUIET
from torch.utils.data import DataLoader

from clipgen import progress
from clipgen.cli.progress_bar import progress_bar
from clipgen.data.shapes import ShapesDataset
from clipgen.progress import ProgressLog
from clipgen.training.callbacks import ValidationProgress


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
