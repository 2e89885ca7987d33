"""Console output of the commands: error messages, log lines and signals."""

from __future__ import annotations

import ast
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ESCAPE

from clipgen.cli import console
from clipgen.cli.console import error_line, interruptible, run_command, set_up_logging
from clipgen.storage.files import printable


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


def test_errors_and_log_lines_are_printable(capsys):
    assert console.error_line(ValueError(f"{ESCAPE} \u202e \ud800 é")) == r"\x1b]0;owned\x07 \u202e \ud800 é"
    assert console.error_line(FileNotFoundError(2, "No such file", ESCAPE)) == r"No such file: \x1b]0;owned\x07"
    record = logging.LogRecord("clipgen", logging.WARNING, "", 0, "key %s\nsecond line", (ESCAPE,), None)
    console.StderrHandler().emit(record)
    assert capsys.readouterr().err == "key \\x1b]0;owned\\x07\nsecond line\n"
    assert printable("日本 ü") == "日本 ü"


def say_in_a_process(code: str, redirect: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = (
        "from clipgen.cli.console import print_line, run_command\nrun_command('test', lambda: [print_line(x) for x in "
        + code
        + "])"
    )
    command = f"'{sys.executable}' -c \"$PROGRAM\" {redirect}"
    variables = {**os.environ, "PROGRAM": program, **environment}
    return subprocess.run(["sh", "-c", command], env=variables, capture_output=True)


def test_letters_that_a_terminal_lacks_are_escaped():
    done = say_in_a_process("['ж', 'b']", "", PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
    assert done.returncode == 0 and done.stdout == b"\\u0436\nb\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full and sh")
@pytest.mark.parametrize(("redirect", "message"), [(">&-", b""), (">/dev/full", b"No space left"), ("| head -1", b"")])
def test_closed_or_full_output_gives_no_traceback(redirect, message):
    done = say_in_a_process("range(100000)", redirect)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    assert message in done.stderr and len(done.stderr.splitlines()) == bool(message)


def test_commands_print_names_without_control_characters():
    """A prompt, a file or a folder may be named by somebody else: lines with variable parts are printed by `say`."""
    for path in sorted(Path(console.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print" and path.name != "console.py":
                assert not any(isinstance(value, (ast.JoinedStr, ast.Starred)) for value in node.args), (
                    path,
                    node.lineno,
                )


def test_say_escapes_what_a_terminal_would_interpret(capsys):
    console.print_line(f"{ESCAPE}\n")
    assert capsys.readouterr().out == r"\x1b]0;owned\x07\n" + "\n"
