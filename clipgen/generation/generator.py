"""From conditions to images: indices drawn in batches, as many as memory holds, and decoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from clipgen.checkpoint import model_folder
from clipgen.images import from_pil
from clipgen.sampling import Watch, per_sample_seeds, per_sample_uniforms
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

if TYPE_CHECKING:
    from typing_extensions import Self

BATCH = 64  # images drawn at a time on a CPU, and decoded at a time anywhere
MOST = 1024  # images drawn at a time on a GPU, where its memory allows
CPU_MEMORY = 2**31  # bytes that keys and values may take on a CPU
Preview = Callable[[Tensor], None]
Progress = Callable[[float], None]


class ImageGenerator:
    """A tokenizer and the transformer that writes its indices: conditions -> images."""

    def __init__(self, vqgan: VQGAN, transformer: ConditionalTransformer):
        self.vqgan, self.transformer = vqgan.eval(), transformer.eval()
        self.side, self.dtype = math.isqrt(transformer.num_tokens), transformer.network.head.weight.dtype
        if self.side**2 != transformer.num_tokens:
            raise ValueError(f"num_tokens must be a square, for square pictures, got {transformer.num_tokens}")

    @property
    def parts(self) -> list[nn.Module]:
        """What a device holds."""
        return [self.vqgan, self.transformer]

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.transformer.device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move all parts to a device. ``torch.bfloat16`` is for what takes the time, transformer and decoder: the
        other parts stay as they are.

        Raises:
            ValueError: a dtype that pictures could not be drawn in again.
        """
        if isinstance(device, torch.dtype):
            raise ValueError(f"a device must be named first; for a type alone: to(dtype={device})")
        if dtype and dtype not in (self.dtype, torch.bfloat16):
            raise ValueError(f"dtype must be torch.bfloat16, or as loaded, got {dtype} after {self.dtype}")
        torch.empty(0, device=device)  # where there is none, no part has been moved
        for part in self.parts:
            part.to(device)
        if dtype:
            _ = self._fingerprint  # cached before the cast changes the weights
            self.dtype = dtype
            self.transformer.to(dtype)
        return self

    def compile(self) -> Self:
        """Draw by torch.compile, on a GPU as CUDA graphs; see ``ConditionalTransformer.compile_decoder``. Then one
        call at a time: threads need pipelines of their own. Indices become pictures by torch.compile too."""
        self.transformer.compile_decoder()
        self.vqgan.tokenizer.decoder.compile(dynamic=False)
        return self

    @property
    def image_size(self) -> int:
        """Height and width of the pictures in pixels."""
        return self.side * self.vqgan.downsampling

    @cached_property
    def _fingerprint(self) -> str:
        parts = {"gpt": self.transformer.network, "vqgan": self.vqgan.tokenizer}
        return model_folder.fingerprint(
            {f"{part}.{k}": v for part, net in parts.items() for k, v in net.state_dict().items()}
        )

    def uniforms(self, seed: int | Sequence[int] | None, rows: int) -> Tensor:
        """What ``paint`` draws by (B, T), from ``seed``, ``seed + 1``, ...; from a seed for each row; or at random."""
        return per_sample_uniforms(per_sample_seeds(seed, rows), self.transformer.num_tokens, self.device)

    @torch.no_grad()
    def paint(
        self,
        conditions: Tensor,
        uniforms: Tensor,
        *,
        given: Tensor | None = None,
        preview: Preview | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Tensor:
        """Conditions (B, E) of the transformer -> images (B, 3, H, W) in [-1, 1], one a row.

        Args:
            uniforms: (B, T) in [0, 1), what the indices are drawn by.
            given: (1, P), the indices that every image begins with.
            preview: called with the images so far, (B, 3, h, W) in [-1, 1], after each row of indices.
            progress: called after each row with how many images it adds, a part of each; nothing is decoded for it.
            settings: of drawing, as of ``ConditionalTransformer.sample``.
        """
        batch = self.batch_size(guided=settings.get("guidance_scale", 1) != 1)
        settings["watch"] = self._watch(preview, progress) if preview or progress else None
        images: list[Tensor] = []
        done = 0
        while done < len(conditions):
            rows = slice(done, done + batch)
            try:
                images.append(self._paint(conditions[rows], uniforms[rows], given, settings))
                done += len(images[-1])
                continue
            except torch.OutOfMemoryError:  # of a GPU: what is finished stays, the rest goes on in halves
                if batch == 1:
                    raise
            # outside of ``except``, which keeps what did not fit alive (torch's FAQ on out-of-memory)
            batch = (min(batch, len(conditions) - done) + 1) // 2
            self.transformer.clear_decoder_cache()
            torch.cuda.empty_cache()
        return torch.cat(images)

    def _paint(self, conditions: Tensor, uniforms: Tensor, given: Tensor | None, settings: dict[str, Any]) -> Tensor:
        """One batch of ``paint``."""
        given = None if given is None else given.expand(len(conditions), -1)
        return self.decode(self.transformer.sample(conditions, uniforms=uniforms, given=given, **settings))

    def batch_size(self, guided: bool = False) -> int:
        """How many images are drawn at a time: a power of two, whose keys and values fit into half of what a GPU has
        free, or into ``CPU_MEMORY``."""
        device, sizes, most, memory = self.device, self.transformer.h, BATCH, CPU_MEMORY
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0] + self.transformer.decoder_cache_nbytes()
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            most, memory = MOST, free // 2
        row = 2 * sizes.n_layer * sizes.num_tokens * sizes.n_embd * self.dtype.itemsize * (2 if guided else 1)
        return 1 << (max(1, min(most, memory // row)).bit_length() - 1)

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Indices of whole rows (B, t) -> images (B, 3, h, W) in [-1, 1]."""
        # CPU kernels round otherwise at other batch sizes
        alone = self.vqgan.device.type == "cpu" and not self.transformer.compiled
        batch = 1 if alone else BATCH
        grids = rearrange(indices, "b (h w) -> b h w", w=self.side).split(batch)
        with torch.autocast(self.vqgan.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            images = [self._decode(some) for some in grids]
        return torch.cat(images).float().clamp(-1, 1)

    def _decode(self, grid: Tensor) -> Tensor:
        """Of at most ``BATCH`` grids. Compiled, batches are padded to a power of two, so that few programs are made,
        and previews run eagerly."""
        if not self.transformer.compiled:
            return self.vqgan.decode(grid)
        missing, whole = 2 ** (len(grid) - 1).bit_length() - len(grid), grid.shape[1] == self.side
        with torch.compiler.set_stance("default" if whole else "force_eager"):
            return self.vqgan.decode(F.pad(grid, (0, 0, 0, 0, 0, missing)))[: len(grid)]

    def _watch(self, preview: Preview | None, progress: Progress | None) -> Watch:
        def watch(indices: Tensor) -> None:
            if indices.shape[1] % self.side == 0:
                if preview:
                    preview(self.decode(indices))
                if progress:
                    progress(len(indices) / self.side)

        return watch

    @torch.no_grad()
    def upper_indices(self, picture: Image.Image, keep: float) -> Tensor:
        """The indices (1, P) of the upper part of a picture, in whole rows."""
        if not 0 < keep < 1:
            raise ValueError(f"keep must be in (0, 1), got {keep}")
        images = from_pil(picture, self.image_size).to(self.vqgan.device)
        rows = max(round(keep * self.side), 1)
        return self.vqgan.encode(images)[:, :rows].flatten(1)
