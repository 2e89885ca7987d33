"""Console output of the commands: error messages, log lines and signals."""

from __future__ import annotations

import logging
import signal

import pytest

from clipgen.cli.console import error_line, interruptible, run_command, set_up_logging


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("x must be 1,\n  got 2"), 1, "test: error: x must be 1, got 2\n"),
        (FileNotFoundError(2, "No such file", "a.png"), 1, "test: error: No such file: a.png\n"),
        (KeyError("x"), 1, "test: error: KeyError: 'x' (set CLIPGEN_DEBUG=1 for the traceback)\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_one_line_and_an_exit_code(monkeypatch, capsys, error, code, message):
    monkeypatch.delenv("CLIPGEN_DEBUG", raising=False)

    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run_command("test", fail)
    assert end.value.code == code and capsys.readouterr().err == message


def test_debug_variable_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("CLIPGEN_DEBUG", "1")

    def fail() -> None:
        raise ValueError("x must be 1")

    with pytest.raises(ValueError, match="x must be 1"):
        run_command("test", fail)


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
