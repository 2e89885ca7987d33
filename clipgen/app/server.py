"""Serve the web page."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clipgen.app.limits import MAX_QUEUE_LENGTH, MAX_SESSIONS, MAX_UPLOAD_BYTES
from clipgen.app.models import ModelStore
from clipgen.hardware.environment import environment_variable
from clipgen.runs import OUTPUTS

logger = logging.getLogger(__name__)
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
CSS = Path(__file__).with_name("page.css")
SCRIPT = Path(__file__).with_name("page.js")
CACHE_VARIABLE = "GRADIO_TEMP_DIR"


def serve(
    checkpoint: str | None = None,
    *,
    host: str | None = None,
    port: int | None = None,
    outputs: str | Path = OUTPUTS,
    device: str | None = None,
    allow_hub: bool | None = None,
) -> None:
    """Serve the web page until the process is interrupted.

    Args:
        checkpoint: the default model, see ``TextToImage.load``; None takes the newest finished run, else the bundled
            one.
        host: address to listen on; None takes the environment variable ``GRADIO_SERVER_NAME``, which Hugging Face
            Spaces set, else 127.0.0.1, which only this computer reaches.
        port: port to listen on; None takes ``GRADIO_SERVER_PORT``, else the first free port from 7860.
        outputs: folder of the runs that visitors can choose.
        device: device of the models; None chooses one.
        allow_hub: let visitors name models on the Hugging Face hub; None allows it on this computer only.
    """
    # The threads of torch must not compete with those of the server while they wait. This has no effect if torch
    # is imported already.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    host = host or os.environ.get("GRADIO_SERVER_NAME") or LOCAL_HOSTS[0]
    if allow_hub is None:
        allow_hub = host in LOCAL_HOSTS
    store = ModelStore(checkpoint, Path(outputs), device, allow_hub)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("clipgen").setLevel(logging.INFO)
    with running_page(store, host, port) as page:
        logger.info("Serving the page at %s; Ctrl-C stops it", page.local_url)
        wait_for_interrupt()


def wait_for_interrupt() -> None:
    """Wait for Ctrl-C, which is the usual way to end the server."""
    with suppress(KeyboardInterrupt):
        while True:
            # Windows does not interrupt a longer wait.
            time.sleep(1)


@contextmanager
def running_page(store: ModelStore, host: str = LOCAL_HOSTS[0], port: int | None = None) -> Iterator[Any]:
    """Serve the web page while the context lasts; its files are deleted at the end.

    Args:
        store: the models.
        host: address to listen on.
        port: port to listen on; None takes a free one.
    """
    with gradio_folder() as folder:
        # Gradio takes seconds to import, and reads the name of its folder then.
        from clipgen.app.page import build_page

        page = build_page(store, folder / "generated")
        page.queue(max_size=MAX_QUEUE_LENGTH, default_concurrency_limit=None)
        try:
            page.launch(**launch_options(), server_name=host, server_port=port, quiet=True)
            # The model is loaded while the visitor opens the page.
            threading.Thread(target=preload, args=(store,), daemon=True).start()
            yield page
        finally:
            page.close(verbose=False)


def launch_options() -> dict[str, Any]:
    """Return the launch options of Gradio: nothing is shared, recorded, or fetched from elsewhere."""
    return {
        "prevent_thread_lock": True,
        "share": False,
        "show_error": True,
        "run_history": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "footer_links": ["api", "gradio", "settings"],
        "max_file_size": MAX_UPLOAD_BYTES,
        "state_session_capacity": MAX_SESSIONS,
        "css_paths": [CSS],
        "js": SCRIPT.read_text("utf-8"),
    }


def preload(store: ModelStore) -> None:
    """Load the default model; the page shows the error if that fails."""
    with suppress(Exception):
        store.load(store.default())


@contextmanager
def gradio_folder() -> Iterator[Path]:
    """Let Gradio write its files to a new temporary folder, which is deleted at the end."""
    with (
        tempfile.TemporaryDirectory(prefix="clipgen-app-", ignore_cleanup_errors=True) as folder,
        environment_variable(CACHE_VARIABLE, folder),
    ):
        yield Path(folder)
