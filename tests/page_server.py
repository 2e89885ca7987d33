"""A running web page for tests, with the bundled model and generation that can be slowed down."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from clipgen.app.models import ModelStore
from clipgen.app.server import running_page
from clipgen.generation.partial_images import PartialImages


@contextmanager
def served_page(outputs: Path, allow_hub: bool = False) -> Iterator[Any]:
    """Serve the page with the bundled model loaded; skip the test if Gradio is not installed."""
    pytest.importorskip("gradio", reason="needs Gradio: pip install 'gradio>=6.27,<7'")
    store = ModelStore(outputs=outputs, device="cpu", allow_hub=allow_hub)
    store.load("shapes")
    with running_page(store) as page:
        yield page


class SlowRows:
    """Count the generated rows and the requests that are served at the same time, and wait after each row."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float):
        self.count = 0
        self.active: set[int] = set()
        self.most_active = 0
        update = PartialImages.update

        def slow_update(partial: PartialImages, images: Any) -> Any:
            self.count += 1
            thread = threading.get_ident()
            self.active.add(thread)
            self.most_active = max(self.most_active, len(self.active))
            time.sleep(seconds)
            if images.shape[2] == partial.image_size:
                self.active.discard(thread)
            return update(partial, images)

        monkeypatch.setattr(PartialImages, "update", slow_update)

    def assert_stopped(self) -> None:
        """Check that at most the row in work is generated, and then no further one."""
        count = self.count
        time.sleep(1)
        assert self.count <= count + 1
        count = self.count
        time.sleep(1)
        assert self.count == count < 8
