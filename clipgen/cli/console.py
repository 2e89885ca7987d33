"""Output of the commands: one-line errors and log lines."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from clipgen.errors import EXPECTED, error_line
from clipgen.storage.files import printable

logger = logging.getLogger("clipgen")
# Warnings of libraries that do not apply here, or that clipgen reports in its own words.
IGNORED_WARNINGS = (
    "does not have many workers",
    "LeafSpec",
    "logs directory",
    "pre-optimization",
    "logging interval",
    "worker processes in total",
    "could not find the monitored key",
    "dirpath has changed",
    "dataloader is not resumable",
    "Checkpoint directory",
    "decompression bomb",
    "sync_dist=True",  # the metrics are averaged over all ranks before they are logged
    "all_gather is deprecated",
)


def run_command(command: str, main: Callable[[], None]) -> None:
    """Run ``main`` and exit. An error is printed as ``COMMAND: error: MESSAGE``; CLIPGEN_DEBUG=1 shows tracebacks."""
    set_up_streams()
    set_up_logging()
    try:
        with interruptible():
            main()
            flush_stdout()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("CLIPGEN_DEBUG"):
            raise
        message = error_line(error)
        if not isinstance(error, EXPECTED):
            message = f"{type(error).__name__}: {message} (set CLIPGEN_DEBUG=1 for the traceback)"
        print(f"{command}: error: {message}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP interrupt the work as Ctrl-C does, so that temporary files are removed.

    A signal that is ignored, as by nohup, stays ignored.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        for number in numbers:
            if signal.getsignal(number) == signal.SIG_DFL:
                previous[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise the exception of Ctrl-C."""
    raise KeyboardInterrupt


# -------------------------------------------------------------------------------------------------------------- streams


def print_line(text: object) -> None:
    """Print a line of results. If the pipe is closed or the disk is full, the work continues without output."""
    try:
        print(printable(str(text)), flush=True)
    except OSError as error:
        discard_stdout(error)


def set_up_streams() -> None:
    """Prevent errors from characters that a stream cannot encode, and from closed streams."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # The stream is closed. A file that is opened later must not get its file descriptor.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush_stdout() -> None:
    """Flush stdout; if that fails, warn on stderr."""
    try:
        sys.stdout.flush()
    except OSError as error:
        discard_stdout(error)


def discard_stdout(error: OSError) -> None:
    """Discard further output, and warn unless the reader has closed the pipe (``| head -1``)."""
    if not isinstance(error, BrokenPipeError):
        logger.warning("the output of this command cannot be written: %s", error_line(error))
    # Replace the descriptor rather than ``sys.stdout``, because Python flushes the original stream at exit.
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -------------------------------------------------------------------------------------------------------------- logging


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]  # not generic in Python 3.10
    """Write log lines to the current ``sys.stderr``, which a progress bar replaces to print lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a log line."""
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """Return a log line without control characters."""
        lines = super().format(record).split("\n")
        return "\n".join(printable(line) for line in lines)


def set_up_logging() -> None:
    """Show all log lines of clipgen, and the warnings of libraries that matter to users."""
    # The hub's retries are long, and clipgen reports the failure.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[StderrHandler()])
    # open_clip logs its errors on the root logger, and then raises them.
    logging.getLogger().addFilter(lambda record: False)
    logging.getLogger("clipgen").setLevel(logging.INFO)
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.WARNING)
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=f"(?s).*{message}")
