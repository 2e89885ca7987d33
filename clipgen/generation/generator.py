"""Generate images from conditions: sample code indices in batches that fit into memory, and decode them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from clipgen.checkpoint import model_folder
from clipgen.generation.options import GenerationOptions
from clipgen.images import from_pil
from clipgen.sampling import StepCallback, per_sample_seeds, per_sample_uniforms
from clipgen.sampling_params import SamplingParams
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

if TYPE_CHECKING:
    from typing_extensions import Self

# Number of images decoded at a time, and the largest sampling batch on a CPU.
DECODE_BATCH_SIZE = 64
# Largest sampling batch on a GPU.
MAX_GPU_BATCH_SIZE = 1024
# Bytes that the KV cache may take on a CPU.
CPU_MEMORY = 2**31


class ImageGenerator:
    """Sample code indices with a transformer and decode them with its VQ-GAN.

    Args:
        vqgan: decodes code indices to images.
        transformer: samples code indices.
    """

    def __init__(self, vqgan: VQGAN, transformer: ConditionalTransformer):
        self.vqgan = vqgan.eval()
        self.transformer = transformer.eval()
        self.side = math.isqrt(transformer.num_tokens)
        self.dtype = transformer.eval_model.head.weight.dtype
        if self.side**2 != transformer.num_tokens:
            raise ValueError(f"num_tokens must be a square, because images are square, got {transformer.num_tokens}")

    @property
    def parts(self) -> list[nn.Module]:
        """The modules that ``to`` moves to a device."""
        return [self.vqgan, self.transformer]

    @property
    def device(self) -> torch.device:
        """The device of the modules."""
        return self.transformer.device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move all modules to a device. ``torch.bfloat16`` applies to the transformer and the decoder only.

        Raises:
            ValueError: a dtype other than the loaded one or bfloat16.
        """
        if isinstance(device, torch.dtype):
            raise ValueError(f"device must be a device, got a dtype: use to(dtype={device})")
        if dtype and dtype not in (self.dtype, torch.bfloat16):
            raise ValueError(f"dtype must be torch.bfloat16, or as loaded, got {dtype} after {self.dtype}")
        # Raise an error before any module is moved if the device does not exist.
        torch.empty(0, device=device)
        for part in self.parts:
            part.to(device)
        if dtype:
            # Cache the fingerprint before the cast changes the weights.
            self.cache_fingerprint()
            self.dtype = dtype
            self.transformer.to(dtype)
        return self

    def compile(self) -> Self:
        """Compile the decoding step and the image decoder, see ``compile_decoder`` (not thread-safe)."""
        self.transformer.compile_decoder()
        self.vqgan.active_model.decoder.compile(dynamic=False)
        return self

    @property
    def image_size(self) -> int:
        """Height and width of the generated images in pixels."""
        return self.side * self.vqgan.downsampling

    def cache_fingerprint(self) -> str:
        """Return the fingerprint of the weights. It is computed once, so a later cast of the weights is ignored."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        """A short hash of the weights."""
        state = {}
        for part, net in (("gpt", self.transformer.eval_model), ("vqgan", self.vqgan.active_model)):
            for name, tensor in net.state_dict().items():
                state[f"{part}.{name}"] = tensor
        return model_folder.fingerprint(state)

    def uniforms(self, seed: int | Sequence[int] | None, batch_size: int) -> Tensor:
        """Return the random numbers (B, T) of ``generate_from_conditions``, see ``per_sample_seeds``."""
        return per_sample_uniforms(per_sample_seeds(seed, batch_size), self.transformer.num_tokens, self.device)

    @torch.no_grad()
    def generate_from_conditions(
        self,
        conditions: Tensor,
        uniforms: Tensor,
        params: SamplingParams,
        options: GenerationOptions | None = None,
    ) -> Tensor:
        """Generate one image per condition: (B, E) -> (B, 3, H, W) in [-1, 1].

        Batches are halved when a GPU runs out of memory; finished images are kept.

        Args:
            conditions: conditions of the transformer, (B, E).
            uniforms: (B, T) uniform random numbers in [0, 1).
            params: sampling parameters.
            options: an image to complete, and functions that are called after each row of indices.
        """
        options = options or GenerationOptions()
        prefix = self.upper_indices(options.outpaint, options.keep_fraction) if options.outpaint else None
        callback = self._step_callback(options) if options.preview or options.progress else None
        batch_size = self.batch_size(guided=params.uses_guidance)
        images: list[Tensor] = []
        done = 0
        while done < len(conditions):
            batch = slice(done, done + batch_size)
            batch_images = self._try_batch(conditions[batch], uniforms[batch], params, prefix, callback)
            if batch_images is not None:
                images.append(batch_images)
                done += len(batch_images)
            elif batch_size == 1:
                raise torch.OutOfMemoryError("a single image does not fit into the GPU's memory")
            else:
                batch_size = (min(batch_size, len(conditions) - done) + 1) // 2
                self.transformer.clear_decoder_cache()
                torch.cuda.empty_cache()
        return torch.cat(images)

    def _try_batch(
        self,
        conditions: Tensor,
        uniforms: Tensor,
        params: SamplingParams,
        prefix: Tensor | None,
        callback: StepCallback | None,
    ) -> Tensor | None:
        """Return the images of one batch, or None if the GPU runs out of memory.

        The caller recovers outside of the ``except`` block, which would keep the failed tensors alive.
        """
        if prefix is not None:
            prefix = prefix.expand(len(conditions), -1)
        try:
            indices = self.transformer.sample(conditions, params, uniforms=uniforms, prefix=prefix, callback=callback)
            return self.decode(indices)
        except torch.OutOfMemoryError:
            return None

    def batch_size(self, guided: bool = False) -> int:
        """Return the sampling batch size: the largest power of two whose KV cache fits into memory.

        The KV cache may take half of the free memory of a GPU, or ``CPU_MEMORY`` on a CPU. Guidance doubles it.
        """
        if self.device.type == "cuda":
            max_batch_size = MAX_GPU_BATCH_SIZE
            memory = self._free_gpu_memory() // 2
        else:
            max_batch_size = DECODE_BATCH_SIZE
            memory = CPU_MEMORY
        config = self.transformer.gpt_config
        kv_bytes = 2 * config.n_layer * config.num_tokens * config.n_embd * self.dtype.itemsize
        if guided:
            kv_bytes *= 2
        largest = max(1, min(max_batch_size, memory // kv_bytes))
        return 1 << (largest.bit_length() - 1)

    def _free_gpu_memory(self) -> int:
        """Return the free bytes of the GPU, with those that torch or the compiled decoders keep for reuse."""
        free = torch.cuda.mem_get_info(self.device)[0]
        reserved = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + reserved + self.transformer.decoder_cache_nbytes()

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Decode complete rows of indices (B, t) to images (B, 3, h, W) in [-1, 1]."""
        # CPU kernels are not bit-identical across batch sizes, so images are decoded one at a time there.
        one_by_one = self.vqgan.device.type == "cpu" and not self.transformer.compiled
        grids = rearrange(indices, "b (h w) -> b h w", w=self.side)
        batches = grids.split(1 if one_by_one else DECODE_BATCH_SIZE)
        with torch.autocast(self.vqgan.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            images = [self._decode_batch(batch) for batch in batches]
        return torch.cat(images).float().clamp(-1, 1)

    def _decode_batch(self, grids: Tensor) -> Tensor:
        """Decode at most ``DECODE_BATCH_SIZE`` grids of indices.

        A compiled decoder gets batches padded to a power of two, so that few graphs are compiled; previews of
        incomplete images run uncompiled.
        """
        if not self.transformer.compiled:
            return self.vqgan.decode(grids)
        padding = 2 ** (len(grids) - 1).bit_length() - len(grids)
        is_complete = grids.shape[1] == self.side
        with torch.compiler.set_stance("default" if is_complete else "force_eager"):
            return self.vqgan.decode(F.pad(grids, (0, 0, 0, 0, 0, padding)))[: len(grids)]

    def _step_callback(self, options: GenerationOptions) -> StepCallback:
        """Return a function that reports the sampled indices after each row."""

        def on_step(indices: Tensor) -> None:
            if indices.shape[1] % self.side:
                return
            if options.preview:
                options.preview(self.decode(indices))
            if options.progress:
                options.progress(len(indices) / self.side)

        return on_step

    @torch.no_grad()
    def upper_indices(self, image: Image.Image, keep_fraction: float) -> Tensor:
        """Return the indices (1, P) of the upper part of an image, in complete rows: at least one, but not all."""
        if not 0 < keep_fraction < 1:
            raise ValueError(f"keep_fraction must be in (0, 1), got {keep_fraction}")
        images = from_pil(image, self.image_size).to(self.vqgan.device)
        num_rows = max(min(round(keep_fraction * self.side), self.side - 1), 1)
        return self.vqgan.encode(images)[:, :num_rows].flatten(1)
