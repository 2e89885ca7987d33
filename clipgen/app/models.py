"""The models that a visitor can choose, loaded when they are first used."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from clipgen.app.limits import MAX_MODELS
from clipgen.bundled import BUNDLED, DEFAULT
from clipgen.generation import default_params
from clipgen.hardware.device import default_device
from clipgen.runs import OUTPUTS, Run, find_runs, is_class_conditional
from clipgen.sampling_params import SamplingParams

if TYPE_CHECKING:
    from clipgen.pipeline import TextToImage

HUB_PREFIX = "hf-hub:"
# OWNER/NAME or OWNER/NAME@REVISION, with the characters that the hub allows. A revision may be "refs/pr/1".
HUB_NAME = re.compile(r"hf-hub:[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}(@\w[\w.-]*(/\w[\w.-]*)*)?", re.ASCII)


class ModelStore:
    """Load models by name, and keep the most recently used ones.

    A visitor may only name the bundled models, the runs below ``outputs``, the checkpoint of the server, and models on
    the Hugging Face hub if these are allowed; no other files.

    Args:
        checkpoint: a further model, which is the default; see ``TextToImage.load``.
        outputs: folder of the runs.
        device: device of the models; None chooses one.
        allow_hub: allow ``hf-hub:OWNER/NAME`` and ``hf-hub:OWNER/NAME@REVISION``.
        capacity: number of models kept in memory.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        outputs: Path = OUTPUTS,
        device: str | None = None,
        allow_hub: bool = True,
        capacity: int = MAX_MODELS,
    ):
        self.checkpoint = checkpoint
        self.outputs = outputs
        self.device = device
        self.allow_hub = allow_hub
        self.capacity = capacity
        # Locked while images are generated: requests are served one after the other.
        self.generating = threading.Lock()
        self._models: OrderedDict[tuple[str, float], TextToImage] = OrderedDict()
        self._lock = threading.Lock()
        # Locked while a model is loaded; the lock is kept for as long as a thread uses it.
        self._loading: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def choices(self) -> list[tuple[str, str]]:
        """Return labels and names of the models that need no download, the default first."""
        choices = [] if self.checkpoint is None else [(self.checkpoint, self.checkpoint)]
        runs = sorted(self._runs().values(), key=lambda run: (run.finished, run.time), reverse=True)
        for run in runs:
            state = "" if run.finished else " (unfinished)"
            choices.append((f"{run.path}{state}", str(run.path)))
        for name in BUNDLED:
            choices.append((f"{name} (bundled)", name))
        return list({name: (label, name) for label, name in choices}.values())

    def default(self) -> str:
        """Return the name of the default model: the checkpoint, else the newest finished run, else a bundled model."""
        if self.checkpoint is not None:
            return self.checkpoint
        finished = [run for run in self._runs().values() if run.finished]
        if finished:
            return str(max(finished, key=lambda run: run.time).path)
        return DEFAULT

    def _runs(self) -> dict[str, Run]:
        """Return the runs that take prompts, by name."""
        runs = [run for run in find_runs(self.outputs) if run.stage == "transformer" and not is_class_conditional(run)]
        return {str(run.path): run for run in runs}

    def check(self, name: str) -> None:
        """Raise ValueError if a visitor may not use the name."""
        if isinstance(name, str):
            if name == self.checkpoint or name in BUNDLED or name in self._runs():
                return
            if self.allow_hub and HUB_NAME.fullmatch(name):
                return
        known = "one of the list" + (f", or {HUB_PREFIX}OWNER/NAME" if self.allow_hub else "")
        raise ValueError(f"the model must be {known}, got {name!r:.100}")

    def params(self, name: str) -> SamplingParams | None:
        """Return the default sampling parameters of a model, or None if it must be loaded to know them."""
        self.check(name)
        folder = BUNDLED.get(name, Path(name))
        return default_params.load_params(folder) if (folder / default_params.PARAMS_FILE).is_file() else None

    def load(self, name: str) -> TextToImage:
        """Return a model, loaded at its first use. Different models are loaded at the same time, each only once.

        Raises:
            ValueError: the name is not allowed, or the files are damaged.
            OSError: the files are not there.
        """
        self.check(name)
        run = self._runs().get(name)
        # A run that has changed since is loaded again.
        key = (name, run.time if run else 0.0)
        with self._lock:
            loading = self._loading.setdefault(name, threading.Lock())
        with loading:
            pipe = self._recall(key)
            if pipe is None:
                pipe = self._load(name)
                self._keep(key, pipe)
        return pipe

    def find_loaded(self, name: str) -> TextToImage | None:
        """Return a model that is in memory, or None."""
        with self._lock:
            pipes = [pipe for (loaded, _), pipe in self._models.items() if loaded == name]
        return pipes[-1] if pipes else None

    def _load(self, name: str) -> TextToImage:
        """Load a model from its files."""
        # torch takes seconds to import, and the page must not wait for it.
        from clipgen.pipeline import TextToImage

        return TextToImage.load(name).to(self.device or default_device())

    def _recall(self, key: tuple[str, float]) -> TextToImage | None:
        """Return a model that is in memory, and mark it as the most recently used one."""
        with self._lock:
            if key in self._models:
                self._models.move_to_end(key)
            return self._models.get(key)

    def _keep(self, key: tuple[str, float], pipe: TextToImage) -> None:
        """Keep a model in memory in the place of the one that has not been used for longest."""
        with self._lock:
            self._models[key] = pipe
            while len(self._models) > self.capacity:
                self._models.popitem(last=False)
