"""Load the models of both stages, also under the names that users of the Hugging Face libraries expect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipgen.checkpoint import model_folder

if TYPE_CHECKING:
    from typing_extensions import Self


class PretrainedMixin:
    """Give a class with ``load`` and ``save`` two more names for them."""

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, token: str | None = None) -> Self:
        """Load a model as ``load`` does; ``OWNER/NAME`` is a model on the Hugging Face hub unless that folder exists.

        Args:
            name: see ``load``.
            revision: branch, tag or commit on the hub.
            token: access token for a private repository; None uses that of ``hf auth login``, or ``HF_TOKEN``.
        """
        model: Any = cls
        loaded: Self = model.load(model_folder.hub_name(name), revision=revision, token=token)
        return loaded

    def save_pretrained(self, path: str | Path, **options: Any) -> Path:
        """Save a model as ``save`` does, whose options it takes, and return its path."""
        model: Any = self
        saved: Path = model.save(path, **options)
        return saved


class PretrainedModule(PretrainedMixin):
    """Give the model of a stage its ``load``; the class itself builds a model in ``from_state``."""

    @classmethod
    def load(cls, path: str | Path, *, revision: str | None = None, token: str | None = None) -> Self:
        """Load a trained model of this class, in evaluation mode.

        Settings for training that name other files or models are ignored, because the file may be untrusted.

        Args:
            path: a model folder, a run folder or a checkpoint of this stage; the name of a bundled model; or
                ``"hf-hub:OWNER/NAME"``, a pipeline on the Hugging Face Hub, whose model of this class is loaded.
            revision: see ``from_pretrained``.
            token: see ``from_pretrained``.
        """
        loaded: Self = model_folder.load_model(cls, path, revision, token)
        return loaded
