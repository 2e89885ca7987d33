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

from clipgen.files import atomic_write, one_line


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
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                settings = file.metadata()
            check_embeddings(**tensors)
            neighbours, temperature = int(settings["neighbours"]), float(settings["temperature"])
            return cls(**tensors, neighbours=neighbours, temperature=temperature)
        except (SafetensorError, TypeError, KeyError, ValueError, OverflowError) as error:
            raise ValueError(f"the bridge {path} is damaged: {one_line(error)}") from error


def check_embeddings(shift: Tensor | None = None, memory: Tensor | None = None) -> None:
    """Raise ValueError unless the tensors of a bridge are finite embeddings of one width."""
    for name, tensor, dimensions in (("shift", shift, 1), ("memory", memory, 2)):
        if tensor is None:
            continue
        if tensor.ndim != dimensions or not tensor.numel() or not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point embeddings, got {tuple(tensor.shape)} of {tensor.dtype}")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    if shift is not None and memory is not None and memory.shape[1] != len(shift):
        raise ValueError(f"memory must be (N, {len(shift)}), as wide as shift, got {tuple(memory.shape)}")


def mean_shift(images: Tensor, sentences: Tensor) -> Tensor:
    """The way (E,) from the mean of sentences' embeddings (M, E) to that of images' (N, E)."""
    return images.mean(dim=0) - sentences.mean(dim=0)
