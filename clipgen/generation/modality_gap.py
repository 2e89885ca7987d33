"""Closing CLIP's modality gap: the transformer is trained on image embeddings but sampled with text embeddings.

``EmbeddingProjector`` moves text embeddings towards image embeddings when sampling. Noise augmentation in training is
in models/conditioning.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from clipgen.checkpoint import model_folder
from clipgen.checkpoint.safe_load import check_safetensors_header
from clipgen.storage.files import atomic_write, one_line

PROJECTOR_FILE = "projector.safetensors"  # in a run folder or the folder of a pipeline
MIN_TEMPERATURE = 1e-6  # below, the softmax overflows


class EmbeddingProjector(nn.Module):
    """Move text embeddings towards image embeddings. It is built from images and texts that need not be paired.

    Args:
        shift: (E,), added to text embeddings: mean image embedding minus mean text embedding (C3, arXiv:2401.08567),
            see ``mean_shift``. None disables it.
        memory: (N, E), unit-norm embeddings of training images. After the shift, a text embedding is replaced by the
            mean of its nearest image embeddings, weighted by ``softmax(cosine / temperature)`` (DeCap,
            arXiv:2303.03032). None disables it.
        neighbors: number of nearest image embeddings.
        temperature: temperature of the softmax; low values select the nearest embedding alone.

    Raises:
        ValueError: a setting is out of range, or the embeddings are not finite or have other shapes.
    """

    shift: Tensor | None
    memory: Tensor | None

    def __init__(
        self,
        shift: Tensor | None = None,
        memory: Tensor | None = None,
        neighbors: int = 8,
        temperature: float = 0.01,
    ):
        super().__init__()
        if neighbors < 1:
            raise ValueError(f"neighbors must be at least 1, got {neighbors}")
        if not MIN_TEMPERATURE <= temperature < math.inf:
            raise ValueError(f"temperature must be at least {MIN_TEMPERATURE} and finite, got {temperature}")
        check_embeddings(shift, memory)
        self.neighbors = neighbors
        self.temperature = temperature
        self.register_buffer("shift", shift)
        self.register_buffer("memory", memory)

    @torch.no_grad()
    def forward(self, clip_embedding: Tensor) -> Tensor:
        """Move text embeddings (B, E) to image embeddings (B, E), unit norm."""
        if self.shift is not None:
            clip_embedding = F.normalize(clip_embedding + self.shift, dim=-1)
        if self.memory is not None:
            clip_embedding = self._project(clip_embedding, self.memory)
        return clip_embedding

    def _project(self, clip_embedding: Tensor, memory: Tensor) -> Tensor:
        """Return the weighted mean of the nearest embeddings in memory."""
        cosine, nearest = (clip_embedding @ memory.T).topk(min(self.neighbors, len(memory)), dim=-1)  # (B, N)
        weights = (cosine / self.temperature).softmax(dim=-1)
        return F.normalize((weights[..., None] * memory[nearest]).sum(dim=1), dim=-1)

    @property
    def fingerprint(self) -> str:
        """A short hash of the embeddings and the settings."""
        settings = torch.tensor([self.neighbors, self.temperature], dtype=torch.float64)
        return model_folder.fingerprint(self.state_dict() | {"settings": settings})

    def check_width(self, width: int) -> None:
        """Raise ValueError if the embeddings have another width than those of a CLIP."""
        for name, tensor in self.state_dict().items():
            if tensor.shape[-1] != width:
                raise ValueError(
                    f"{name} of the projector must be {width} wide, as the embeddings of the CLIP, "
                    f"got {tensor.shape[-1]}"
                )

    def save(self, path: str | Path, half: bool = False) -> Path:
        """Write a safetensors file.

        Args:
            path: the file.
            half: save the embeddings in 16 bits.
        """
        settings = {"neighbors": str(self.neighbors), "temperature": str(self.temperature)}
        dtype = torch.float16 if half else None
        tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}
        with atomic_write(path) as partial:
            # save_file would let nobody but the owner read the file.
            partial.write_bytes(save(tensors, settings))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> EmbeddingProjector:
        """Read a file written by ``save``.

        Raises:
            ValueError: the file is damaged, or not such a file.
        """
        check_safetensors_header(Path(path))
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                settings = file.metadata()
            check_embeddings(**tensors)
            tensors = {name: tensor.float() for name, tensor in tensors.items()}
            return cls(
                **tensors,
                neighbors=int(settings["neighbors"]),
                temperature=float(settings["temperature"]),
            )
        except (SafetensorError, TypeError, KeyError, ValueError, OverflowError) as error:
            raise ValueError(f"the projector {path} is damaged: {one_line(error)}") from error


def load_projector(root: Path) -> EmbeddingProjector | None:
    """Load the projector of a run folder or of the folder of a pipeline; return None if it has none."""
    path = root / PROJECTOR_FILE
    return EmbeddingProjector.load(path) if path.is_file() else None


def check_embeddings(shift: Tensor | None = None, memory: Tensor | None = None) -> None:
    """Check the tensors of a projector.

    Args:
        shift: (E,), or None.
        memory: (N, E), or None.

    Raises:
        ValueError: a tensor has another shape, is not floating-point, or is not finite.
    """
    for name, tensor, dimensions in (("shift", shift, 1), ("memory", memory, 2)):
        if tensor is None:
            continue
        if tensor.ndim != dimensions or not tensor.numel() or not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point embeddings, got {tuple(tensor.shape)} of {tensor.dtype}")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    if shift is not None and memory is not None and memory.shape[1] != len(shift):
        raise ValueError(f"memory must be (N, {len(shift)}), as wide as shift, got {tuple(memory.shape)}")


def mean_shift(image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
    """Return the mean image embedding minus the mean text embedding: (N, E), (M, E) -> (E,)."""
    return image_embeddings.mean(dim=0) - text_embeddings.mean(dim=0)
