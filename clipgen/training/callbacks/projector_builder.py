"""Build the projector of a model from embeddings of its training images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from clipgen.generation.modality_gap import PROJECTOR_FILE, EmbeddingProjector, check_embeddings
from clipgen.transformer import ConditionalTransformer


class ProjectorBuilder(pl.Callback):
    """Write an ``EmbeddingProjector`` that remembers the conditions of the first training images.

    It needs neither texts nor labels. ``TextToImage.load`` reads the file with the rest of the run folder, and the
    grids of ``ImageLogger`` use it for prompts. Checkpoints contain the embeddings, so a resumed run writes the same
    projector, also to another folder.

    Args:
        folder: the run folder.
        memory_size: number of embeddings to remember, fewer if the training sees fewer images.
        neighbors: see ``EmbeddingProjector``.
        temperature: see ``EmbeddingProjector``.
    """

    def __init__(self, folder: str | Path, memory_size: int = 2000, neighbors: int = 100, temperature: float = 0.05):
        if memory_size < 1:
            raise ValueError(f"memory_size must be at least 1, got {memory_size}")
        EmbeddingProjector(neighbors=neighbors, temperature=temperature)  # raises an error for wrong values
        self.path = Path(folder) / PROJECTOR_FILE
        self.memory_size = memory_size
        self.neighbors = neighbors
        self.temperature = temperature
        self.embeddings: list[Tensor] = []

    @property
    def missing(self) -> int:
        """The number of embeddings that the memory has room for."""
        return self.memory_size - sum(map(len, self.embeddings))

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not isinstance(module, ConditionalTransformer) or "class_names" in module.hparams:
            raise ValueError(
                "projector.memory_size must be 0, except for a transformer that is conditioned on CLIP embeddings"
            )

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # A resumed run may have another folder, or other settings.
        if trainer.is_global_zero and self.missing <= 0:
            self.write()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.is_global_zero or self.missing <= 0:
            return
        with torch.no_grad():
            _, conditions = module.prepare_batch(batch)
        conditions = conditions.float().cpu()
        is_finite = conditions.isfinite().all(dim=1)  # the training skips steps with other conditions
        self.embeddings.append(conditions[is_finite][: self.missing])
        if self.missing <= 0:
            self.write()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero and any(map(len, self.embeddings)):
            self.write()

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Lightning calls only this hook if a run is resumed at its last step.
        self.on_train_end(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        """Return the embeddings."""
        return {"embeddings": self.embeddings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the embeddings of an interrupted training.

        Raises:
            ValueError: they are not finite embeddings.
        """
        embeddings = state_dict["embeddings"]
        if embeddings:
            check_embeddings(memory=torch.cat(embeddings))
        self.embeddings = embeddings

    def write(self) -> None:
        """Write the projector to the run folder."""
        memory = torch.cat(self.embeddings)[: self.memory_size]
        EmbeddingProjector(None, memory, self.neighbors, self.temperature).save(self.path)
