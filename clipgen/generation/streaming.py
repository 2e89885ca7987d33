"""Run work in a thread as a generator of its reports, which stops the work when it is closed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# The name of the thread, for logs and tests.
THREAD_NAME = "clipgen-stream"

# Called by the work with intermediate results; raises ``Stopped`` if they are no longer wanted.
Report = Callable[[Any], None]


class Stopped(Exception):
    """The result of the work is no longer wanted."""


@dataclass(frozen=True)
class Message:
    """A report, the result or the error of the work.

    Args:
        kind: ``"report"``, ``"result"`` or ``"error"``.
        value: what was reported or returned, or the exception.
    """

    kind: str
    value: Any


def stream(
    work: Callable[[Report], Any],
    stopped: threading.Event | None = None,
    join: bool = True,
) -> Iterator[Message]:
    """Yield the reports of the work as they arrive, then its result.

    ``stream(lambda report: pipe(prompt, preview=report))`` yields the images so far after each row of indices. Reports
    that arrive faster than they are read are dropped, except for the newest. Closing the generator stops the work at
    its next report, and waits for that: a pipeline must not serve two threads at once.

    Args:
        work: runs in a thread of its own.
        stopped: also stops the work at its next report, when it is set.
        join: wait for the end of the work when the generator is closed. Without this, the caller must ensure that no
            other work uses the pipeline until then.

    Raises:
        Stopped: ``stopped`` was set.
        BaseException: the error of the work.
    """
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    stopped = stopped or threading.Event()

    def report(value: Any) -> None:
        if stopped.is_set():
            raise Stopped
        messages.put(Message("report", value))

    thread = threading.Thread(target=run, args=(work, report, messages), name=THREAD_NAME, daemon=True)
    thread.start()
    try:
        while True:
            message = newest(messages)
            if message.kind == "error":
                raise message.value
            yield message
            if message.kind == "result":
                return
    finally:
        stopped.set()
        if join:
            thread.join()


def run(work: Callable[[Report], Any], report: Report, messages: queue.SimpleQueue[Message]) -> None:
    """Run the work and send its result or error."""
    try:
        messages.put(Message("result", work(report)))
    except BaseException as error:  # also SystemExit, or the reader would wait forever
        messages.put(Message("error", error))


def newest(messages: queue.SimpleQueue[Message]) -> Message:
    """Wait for a message, and skip reports that newer messages have replaced."""
    message = messages.get()
    while message.kind == "report" and not messages.empty():
        message = messages.get()
    return message
