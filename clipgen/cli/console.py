"""What the commands say: our own log lines, and one sentence instead of a traceback where the user can fix it."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("clipgen")
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError)


def guarded(command: str, main: Callable[[], None]) -> None:
    """Run ``main`` and exit; an error becomes ``command: error: sentence``. CLIPGEN_DEBUG=1 shows tracebacks."""
    set_up_logging()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("CLIPGEN_DEBUG"):
            raise
        bug = "" if isinstance(error, EXPECTED) else f"{type(error).__name__}: "
        hint = " (CLIPGEN_DEBUG=1 shows where)" if bug else ""
        print(f"{command}: error: {bug}{sentence(error)}{hint}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


@contextmanager
def rate_bar(name: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """A bar with images a second and time left; without a terminal a line a minute. Gives what to call when some are
    done."""
    if not sys.stderr.isatty():
        yield rate_lines(name, total)
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeRemainingColumn

    speed = TextColumn("{task.fields[rate]:.2f} images/s")
    with Progress(
        *Progress.get_default_columns()[:-1], speed, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(name, total=total, rate=0.0)

        def advance(done: float) -> None:
            bar.advance(task, done)
            now = bar.tasks[0]
            bar.update(task, rate=now.completed / max(now.elapsed or 0, 1e-6))

        yield advance


def rate_lines(name: str, total: float | None) -> Callable[[float], None]:
    """What to call when some of the images are done; once a minute it logs how far things are."""
    start = last = time.monotonic()
    done = 0.0

    def advance(count: float) -> None:
        nonlocal done, last
        done, now = done + count, time.monotonic()
        if now - last >= 60:
            last = now
            counted = f"{done:.0f} of {total:.0f}" if total else f"{done:.0f}"
            logger.info("%s: %s images, %.3g a second", name, counted, done / (now - start))

    return advance


def sentence(error: BaseException) -> str:
    """An error's message on one line; for the system's own errors, what and which file."""
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}"
    return " ".join(str(error).split()) or type(error).__name__


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]  # which Python 3.10 cannot say
    """Writes to what stderr is now: a bar that is being drawn puts lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def set_up_logging() -> None:
    """Our lines as they are; of the libraries' only what is wrong."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are long to read, and what failed is told by us
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[StderrHandler()])
    logging.getLogger().addFilter(lambda record: False)  # open_clip logs on the root logger what it then raises
    logging.getLogger("clipgen").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
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
    ):
        warnings.filterwarnings("ignore", message=f"(?s).*{message}")
