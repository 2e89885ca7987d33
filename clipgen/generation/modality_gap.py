"""Closing CLIP's modality gap: the transformer is trained on image embeddings but sampled with text embeddings.

``EmbeddingProjector`` moves text embeddings towards image embeddings when sampling; noise augmentation in training is in
models/conditioning.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clipgen.files import atomic_write


class EmbeddingProjector(nn.Module):
    """Moves the embeddings of sentences towards those of images; needs images and sentences, but no pairs.

    Args:
        shift: (E,), added to a sentence's embedding: the mean of images' embeddings less that of sentences' (C3,
            arXiv:2401.08567); see ``mean_shift``. None: none.
        memory: (N, E), embeddings of training images, unit norm, onto which a sentence's embedding is projected after
            the shift: their mean, weighted by ``softmax(cosine / temperature)`` (DeCap, arXiv:2303.03032), over the
            nearest ``neighbours``. None: no projection.
    """

    shift: Tensor | None
    memory: Tensor | None

    def __init__(
        self, shift: Tensor | None = None, memory: Tensor | None = None, neighbours: int = 8, temperature: float = 0.01
    ):
        super().__init__()
        if neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {neighbours}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.neighbours, self.temperature = neighbours, temperature
        self.register_buffer("shift", shift)
        self.register_buffer("memory", memory)

    @torch.no_grad()
    def forward(self, clip_embedding: Tensor) -> Tensor:
        """Embeddings of sentences (B, E) -> where images' lie, (B, E), unit norm."""
        moved = clip_embedding if self.shift is None else F.normalize(clip_embedding + self.shift, dim=-1)
        return moved if self.memory is None else self._project(moved, self.memory)

    def _project(self, clip_embedding: Tensor, memory: Tensor) -> Tensor:
        cosine, nearest = (clip_embedding @ memory.T).topk(min(self.neighbours, len(memory)), dim=-1)  # (B, N)
        weights = (cosine / self.temperature).softmax(dim=-1)
        return F.normalize((weights[..., None] * memory[nearest]).sum(dim=1), dim=-1)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file."""
        settings = {"neighbours": str(self.neighbours), "temperature": str(self.temperature)}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        with atomic_write(path) as partial:
            save_file(tensors, partial, settings)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> EmbeddingProjector:
        """Read what ``save`` wrote.

        Raises:
            ValueError: the file is damaged, or something else.
        """
        try:
            with safe_open(path, "pt") as file:
                tensors, settings = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
            return cls(**tensors, neighbours=int(settings["neighbours"]), temperature=float(settings["temperature"]))
        except (SafetensorError, TypeError, KeyError) as error:
            raise ValueError(f"the bridge {path} is damaged: {error}") from error


def mean_shift(images: Tensor, sentences: Tensor) -> Tensor:
    """The way (E,) from the mean of sentences' embeddings (M, E) to that of images' (N, E)."""
    return images.mean(dim=0) - sentences.mean(dim=0)
