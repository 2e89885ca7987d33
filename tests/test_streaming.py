"""Work in a thread as a generator: reports arrive, closing it stops the work, partial images have their full size."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from clipgen.generation.partial_images import PartialImages
from clipgen.generation.streaming import THREAD_NAME, Message, Report, Stopped, stream

PROMPT = "a large blue ring on a white background"


class Handshake:
    """Work of three reports, each of which waits until the reader has read the one before."""

    def __init__(self) -> None:
        self.may_report = threading.Semaphore(1)
        self.reported: list[int] = []

    def __call__(self, report: Report) -> str:
        for number in range(3):
            self.may_report.acquire(timeout=10)
            report(number)
            self.reported.append(number)
        self.may_report.acquire(timeout=10)
        return "done"


def test_stream_yields_reports_and_then_the_result():
    work = Handshake()
    messages = []
    for message in stream(work):
        messages.append(message)
        work.may_report.release()
    assert messages == [*(Message("report", number) for number in range(3)), Message("result", "done")]


def test_closing_the_stream_stops_the_work_and_waits_for_its_end():
    work = Handshake()
    reports = stream(work)
    assert next(reports).value == 0
    work.may_report.release()
    reports.close()
    assert len(work.reported) < 3
    assert THREAD_NAME not in {thread.name for thread in threading.enumerate()}


def test_event_stops_the_work_and_the_stream():
    work = Handshake()
    stopped = threading.Event()
    reports = stream(work, stopped)
    assert next(reports).value == 0
    stopped.set()
    work.may_report.release()
    with pytest.raises(Stopped):
        list(reports)
    assert work.reported == [0]


def test_closing_the_stream_does_not_wait_for_the_work_if_it_is_not_joined():
    work = Handshake()
    reports = stream(work, join=False)
    next(reports)
    reports.close()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]
    work.may_report.release()
    thread.join(10)
    assert not thread.is_alive() and work.reported == [0]


@pytest.mark.parametrize("error", [ValueError("wrong"), SystemExit(3)])
def test_stream_raises_the_error_of_the_work(error):
    def work(report: Report) -> None:
        report(1)
        raise error

    with pytest.raises(type(error), match=str(error)):
        list(stream(work))


def test_reports_that_nobody_read_in_time_are_dropped():
    finished = threading.Event()

    def work(report: Report) -> str:
        for number in range(100):
            report(number)
        finished.set()
        return "done"

    reports = stream(work)
    next(reports)
    assert finished.wait(10)
    assert len(list(reports)) <= 2


def test_streamed_images_equal_those_of_a_call(pipe):
    messages = list(stream(lambda report: pipe(PROMPT, num_images=2, seed=3, preview=report)))
    images = messages[-1].value
    expected = pipe(PROMPT, num_images=2, seed=3)
    assert [np.asarray(image).tolist() for image in images] == [np.asarray(image).tolist() for image in expected]
    assert images[1].info == expected[1].info


def previews(*shapes: tuple[int, int]) -> list[Any]:
    """Return previews of a number of images and of rows of eight pixels, each of another brightness."""
    return [torch.full((count, 3, 8 * rows, 32), 0.1 * number) for number, (count, rows) in enumerate(shapes)]


def test_partial_images_are_squares_with_transparent_rest():
    partial = PartialImages(image_size=32, num_rows=4, total=3)
    state = partial.update(previews((2, 1))[0])
    assert (state.rows, state.num_rows) == (1, 4)
    assert [image.size for image in state.images] == [(32, 32)] * 3
    alpha = np.asarray(state.images[0])[..., 3]
    assert (alpha[:8] == 255).all() and not alpha[8:].any()
    assert not np.asarray(state.images[2]).any()


def test_partial_images_keep_those_of_earlier_batches():
    partial = PartialImages(image_size=32, num_rows=4, total=3)
    for preview in previews((2, 3), (2, 4), (1, 1)):
        state = partial.update(preview)
    alphas = [np.asarray(image)[..., 3].mean() for image in state.images]
    assert alphas == [255, 255, 255 / 4]


def test_partial_images_of_a_repeated_batch_are_replaced():
    """A batch that did not fit into the memory of the GPU begins again, with fewer images."""
    partial = PartialImages(image_size=32, num_rows=4, total=2)
    for preview in previews((2, 2), (1, 1)):
        state = partial.update(preview)
    assert len(state.images) == 2 and not np.asarray(state.images[1]).any()
