"""Progress of long work as log lines. In a terminal the commands draw it as a bar: ``clipgen.cli.progress_bar``."""

from __future__ import annotations

import logging
import time
from datetime import timedelta

logger = logging.getLogger(__name__)


class ProgressLog:
    """Count work, and log a line with rates and the time left once per interval.

    Args:
        name: description of the work.
        total: amount of work; None if it is unknown.
        unit: unit of the work: ``"images"``, or ``"steps"`` of training.
        first: amount that an earlier process has done.
        interval: seconds between two lines.
    """

    def __init__(
        self,
        name: str,
        total: float | None = None,
        unit: str = "images",
        first: float = 0,
        interval: float = 60.0,
    ):
        self.name = name
        self.total = total
        self.unit = unit
        self.first = first
        self.done = first
        self.images = 0.0
        self.details = ""
        self.interval = interval
        self.start_time = time.monotonic()
        self.next_line = self.start_time + interval

    def advance(self, count: float, images: float | None = None) -> None:
        """Count work, and show it.

        Args:
            count: work done since the last call.
            images: images processed since the last call, if images are not what is counted.
        """
        self.done += count
        self.images += count if images is None else images
        self.show()

    def show(self) -> None:
        """Log a line, if it is time for one."""
        now = time.monotonic()
        if now >= self.next_line:
            self.next_line = now + self.interval
            logger.info("%s", str(self))

    def rename(self, name: str) -> None:
        """Change the description of the work."""
        self.name = name

    def stop(self) -> None:
        """End the display, if there is one."""

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return max(time.monotonic() - self.start_time, 1e-9)

    @property
    def rates(self) -> str:
        """Steps and images per second since the start."""
        images = f"{self.images / self.seconds:.3g} img/s"
        if self.unit == "images":
            return images
        return f"{(self.done - self.first) / self.seconds:.3g} it/s, {images}"

    def __str__(self) -> str:
        if self.total is None:
            line = f"{self.name}: {self.done:.0f} {self.unit}, {self.rates}"
        else:
            seconds_per_unit = self.seconds / max(self.done - self.first, 1e-9)
            eta = duration((self.total - self.done) * seconds_per_unit)
            line = f"{self.name}: {self.done:.0f} of {self.total:.0f} {self.unit}, {self.rates}, ETA {eta}"
        return f"{line}  {self.details}".rstrip()


def duration(seconds: float) -> str:
    """Return a time as in 1:02:03."""
    return str(timedelta(seconds=round(seconds)))
