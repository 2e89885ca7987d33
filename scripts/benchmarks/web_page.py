"""The web page: from the start of the process to the page, and from a request to its images."""

from __future__ import annotations

import argparse
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.timing import print_table
from clipgen.storage.files import IS_WINDOWS

PROMPT = "a large blue ring on a white background"
# The settings of ``clipgen.app.settings.Settings``: four images of the bundled model.
SETTINGS = ("shapes", 4, "", 0, 1.0, 300, 1.0, 1.0, 0.0)
# Seconds after which the server is given up.
TIMEOUT = 120


def run_app(args: argparse.Namespace) -> dict[str, Any]:
    """Start ``python -m clipgen.app``, wait for its page, and time requests for four images."""
    try:
        from gradio_client import Client
    except ImportError:
        raise SystemExit("benchmark app needs Gradio: pip install 'gradio>=6.27,<7'") from None
    with running_server() as (process, url):
        start = time.perf_counter()
        wait_for_page(process, url)
        rows = {"the page is served": usage(process, start)}
        client = Client(url, verbose=False, download_files=False)
        timed_request(client)  # waits for the model
        rows["the first images are there"] = usage(process, start)
        requests = [timed_request(client) for _ in range(args.steps)]
    print_table("from the start until", rows, "CPU s")
    print()
    print_table("from a request until", {f"median of {args.steps}": median(requests)}, "first row, s")
    return {"start": rows, "requests": requests}


@contextmanager
def running_server() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start the server in an empty folder, on a free port; end it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "PYTHONPATH": paths.strip(os.pathsep)}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([sys.executable, "-m", "clipgen.app"], cwd=folder, env=environment)
        try:
            yield process, f"http://127.0.0.1:{port}/"
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server as Ctrl-C does, except on Windows, where one process cannot interrupt another."""
    if IS_WINDOWS:
        process.terminate()
    else:
        process.send_signal(signal.SIGINT)
    process.wait(TIMEOUT)


def usage(process: subprocess.Popen[bytes], start: float) -> dict[str, float]:
    """Return the seconds since the start of a process, and its processor time."""
    return {"seconds": time.perf_counter() - start, "CPU s": cpu_seconds(process.pid)}


def wait_for_page(process: subprocess.Popen[bytes], url: str) -> None:
    """Wait until the page is served."""
    start = time.perf_counter()
    while time.perf_counter() - start < TIMEOUT and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                answer.read()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    raise SystemExit(f"the page was not served within {TIMEOUT} s; exit status {process.poll()}")


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and its threads; NaN on systems without ``/proc``."""
    file = Path(f"/proc/{pid}/stat")
    if not file.is_file():
        return math.nan
    # The name of the program, in parentheses, may contain spaces.
    fields = file.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def timed_request(client: Any) -> dict[str, float]:
    """Return the seconds from a request to its first row, and to its complete images."""
    start = time.perf_counter()
    first_row = math.nan
    for status, *_ in client.submit(*SETTINGS, PROMPT, api_name="/text"):
        if "Row" in status and math.isnan(first_row):
            first_row = time.perf_counter() - start
    return {"first row, s": first_row, "4 images, s": time.perf_counter() - start}


def median(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each column."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}
