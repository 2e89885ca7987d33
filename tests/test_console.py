"""Console output of the commands: progress, error messages and signals."""

from __future__ import annotations

import logging
import signal
import sys

import pytest

from clipgen.cli import console
from clipgen.cli.console import ProgressLog, error_line, guarded, interruptible, progress_bar, set_up_logging


def test_progress_log_shows_rate_and_eta():
    progress = ProgressLog("Generating", 100, interval=1e9)
    progress.advance(12.5)
    progress.advance(12.5)
    assert progress.line(10.0) == "Generating: 25 of 100 images, 2.5 img/s, ETA 0:00:30"


def test_progress_log_without_a_total():
    progress = ProgressLog("Encoding", None, interval=1e9)
    progress.advance(5)
    assert progress.line(10.0) == "Encoding: 5 images, 0.5 img/s"


def test_progress_is_logged_once_per_interval(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    times = iter([0.0, 30.0, 61.0, 90.0, 122.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    progress = ProgressLog("Generating", 8)
    for _ in range(4):
        progress.advance(1)
    assert [message.partition(" images")[0] for message in caplog.messages] == [
        "Generating: 2 of 8",
        "Generating: 4 of 8",
    ]


def test_progress_bar_on_a_terminal_shows_rate_and_eta(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("Generating", 4) as advance:
        advance(1)
        advance(0.5)
    shown = capsys.readouterr().err
    assert "Generating" in shown and "img/s" in shown and "ETA" in shown


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("x must be 1,\n  got 2"), 1, "test: error: x must be 1, got 2\n"),
        (FileNotFoundError(2, "No such file", "a.png"), 1, "test: error: No such file: a.png\n"),
        (KeyError("x"), 1, "test: error: KeyError: 'x' (CLIPGEN_DEBUG=1 shows where)\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_one_line_and_an_exit_code(monkeypatch, capsys, error, code, message):
    monkeypatch.delenv("CLIPGEN_DEBUG", raising=False)

    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        guarded("test", fail)
    assert end.value.code == code and capsys.readouterr().err == message


def test_debug_variable_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("CLIPGEN_DEBUG", "1")

    def fail() -> None:
        raise ValueError("x must be 1")

    with pytest.raises(ValueError, match="x must be 1"):
        guarded("test", fail)


def test_error_without_a_message_is_named_by_its_type():
    assert error_line(RuntimeError()) == "RuntimeError"


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="there are no such signals")
def test_sigterm_interrupts_as_ctrl_c_does():
    previous = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == previous


def test_info_of_clipgen_is_logged_and_that_of_libraries_is_not():
    set_up_logging()
    assert logging.getLogger("clipgen.x").isEnabledFor(logging.INFO)
    assert not logging.getLogger("lightning_fabric.utilities.rank_zero").isEnabledFor(logging.INFO)
