"""The progress bar of all commands: a bar in a terminal, log lines otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from clipgen.progress import ProgressLog


class ProgressBar(ProgressLog):
    """Draw a bar with the work done, the rates, the time left and the losses, instead of logging lines."""

    def __init__(self, name: str, total: float | None = None, unit: str = "images", first: float = 0):
        super().__init__(name, total, unit, first)
        self.bar = Progress(
            "{task.description}",
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            "{task.fields[rates]}  ETA",
            TimeRemainingColumn(),
            "{task.fields[details]}",
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task(name, total=total, completed=int(first), rates="", details="")
        self.bar.start()

    def show(self) -> None:
        self.bar.update(self.task, completed=self.done, rates=self.rates, details=self.details)

    def rename(self, name: str) -> None:
        self.bar.update(self.task, description=name)

    def stop(self) -> None:
        # Older versions of rich print an empty line if a bar is stopped twice.
        if self.bar.live.is_started:
            self.bar.stop()


def make_progress(*args: Any) -> ProgressLog:
    """Return a bar if stderr is a terminal, and log lines otherwise; see ``ProgressLog`` for the arguments."""
    return ProgressBar(*args) if sys.stderr.isatty() else ProgressLog(*args)


@contextmanager
def progress_bar(name: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """Show the progress of work on images.

    Args:
        name: description of the work.
        total: number of images; None if it is unknown.

    Yields:
        A function that is called with the number of images done since the last call.
    """
    progress = make_progress(name, total)
    try:
        yield progress.advance
    finally:
        progress.stop()
