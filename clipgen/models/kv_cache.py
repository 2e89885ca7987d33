"""Incremental decoding with GPT-2's weights: one position per step, with a key-value cache that is allocated once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from clipgen.models.gpt import ConditionalGPT2
from clipgen.processor import instruction_set

Linear = Callable[[Tensor], Tensor]  # (B, in) -> (B, out)
LogitsFn = Callable[[int, "Tensor | None"], Tensor]  # as in sampling.py, which may import this package, not vice versa

# torch.compile uses these operators on a CPU.
onednn: Any = torch.ops.mkldnn

# A compiled graph reads the cache up to a multiple of so many positions.
BUCKET_SIZE = 64
# Smaller batches read the whole cache, which is small compared with the weights.
MIN_BATCH_SIZE_FOR_BUCKETS = 64
# A weight of at most so many elements stays in a processor's cache, where torch's own product is fastest.
MAX_CACHED_ELEMENTS = 2**17


class IncrementalDecoder:
    """Compute the logits of the next index for a batch, one position after the other.

    Call ``start`` once, then the function that it returns at positions 0, 1, 2, ... in turn. The decoder uses the
    blocks' weights directly, so forward hooks on the blocks do not fire.

    Args:
        gpt: the network, which is not modified.
        batch_size: number of samples.
    """

    def __init__(self, gpt: ConditionalGPT2, batch_size: int):
        net: Any = gpt.transformer
        config = net.config
        self.wte = net.wte.weight
        self.wpe = net.wpe.weight
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.blocks = [DecoderBlock(block, batch_size, self.make_linear) for block in net.h]
        self.norm = net.ln_f
        self.head = self.make_linear(gpt.head.weight.T, gpt.head.bias, batch_size)
        self.cache_shape = (batch_size, config.n_head, gpt.num_tokens, config.n_embd // config.n_head)

    def start(self, condition: Tensor) -> LogitsFn:
        """Begin a batch, given its condition tokens (B, n_embd) from ``gpt.condition``.

        Returns:
            The function from a position and the previous index (B,), None at position 0, to the logits (B, K).
        """
        self.keys = self.allocate_cache(condition)
        self.values = self.allocate_cache(condition)

        def logits_fn(position: int, previous: Tensor | None) -> Tensor:
            return self.logits(self._token(condition, previous), position)

        return logits_fn

    def allocate_cache(self, like: Tensor) -> list[Tensor]:
        """Allocate one tensor per block: torch.compile would copy a shared one at every write to a part of it."""
        return [like.new_zeros(self.cache_shape) for _ in self.blocks]

    def _token(self, condition: Tensor, previous: Tensor | None) -> Tensor:
        return condition if previous is None else F.embedding(previous, self.wte)

    def logits(self, token: Tensor, position: Any) -> Tensor:
        """Compute the logits (B, K) that follow tokens (B, C) at a position."""
        x = token + self.wpe[position]
        for block, keys, values in zip(self.blocks, self.keys, self.values):
            x = x + block.proj(self.attend(position, block.qkv(block.ln_1(x)), keys, values))
            x = x + block.mlp_proj(block.act(block.mlp_fc(block.ln_2(x))))
        return self.head(self.norm(x))

    def attend(self, position: Any, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Compute causal attention over the cached positions: (B, 3 C), 2 x (B, H, T, C / H) -> (B, C)."""
        q, k, v = qkv.view(len(qkv), 3, self.n_head, 1, -1).unbind(1)  # (B, H, 1, C / H)
        keys[:, :, position : position + 1] = k
        values[:, :, position : position + 1] = v
        length = position + 1
        y = F.scaled_dot_product_attention(q, keys[:, :, :length], values[:, :, :length])  # (B, H, 1, C / H)
        return y.reshape(len(qkv), self.n_embd)

    @staticmethod
    def make_linear(weight: Tensor, bias: Tensor | None, batch_size: int) -> Linear:
        """Return the function x (B, in) -> x @ weight + bias (B, out) for a weight (in, out).

        Small batches are memory-bound, and torch's CPU product reaches only a third of the memory bandwidth.
        ``choose_cpu_kernel`` selects a faster one.
        """
        bias = weight.new_zeros(weight.shape[1]) if bias is None else bias
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            return choose_cpu_kernel(batch_size, *weight.shape)(weight, bias, batch_size)
        return addmm_linear(weight, bias, batch_size)


# ------------------------------------------------------------------------------------- linear layers of small batches


def addmm_linear(weight: Tensor, bias: Tensor, batch_size: int) -> Linear:
    """Return a linear layer that uses torch's own product."""
    return lambda x: torch.addmm(bias, x, weight)


def split_linear(weight: Tensor, bias: Tensor, batch_size: int) -> Linear:
    """Return a linear layer that reads the two halves of the transposed weight in parallel, as a batch of products."""
    inputs = weight.shape[0]
    halves = weight.T.contiguous().view(2, -1, inputs)
    column = bias.view(2, -1, 1)
    return lambda x: torch.baddbmm(column, halves, x.T.expand(2, -1, -1)).flatten(0, 1).T


def prepacked_linear(weight: Tensor, bias: Tensor, batch_size: int) -> Linear:
    """Return a linear layer that uses oneDNN's product, with the weight in oneDNN's own memory layout."""
    packed = onednn._reorder_linear_weight(weight.T.contiguous(), batch_size)
    return lambda x: onednn._linear_pointwise(x, packed, bias, "none", [], "")


def choose_cpu_kernel(batch_size: int, inputs: int, outputs: int) -> Callable[[Tensor, Tensor, int], Linear]:
    """Choose the linear layer for a float32 weight (inputs, outputs) on a CPU.

    The choice follows from shape and instruction set. Measuring at first use could choose another kernel in the next
    process, and kernels differ by floating-point rounding: the same seed would not always sample the same indices.
    """
    if batch_size <= 2:
        if inputs * outputs <= MAX_CACHED_ELEMENTS:
            return addmm_linear
        tall_on_avx2 = inputs > outputs and instruction_set() == "AVX2"
        if outputs % 2 == 0 and not (tall_on_avx2 and has_prepacked_kernels()):
            return split_linear
    return prepacked_linear if has_prepacked_kernels() else addmm_linear


@cache
def has_prepacked_kernels() -> bool:
    """Return True if this build of torch has oneDNN's private operators and they compute the correct product."""
    if not torch.backends.mkldnn.is_available():
        return False
    weight = torch.linspace(-1, 1, 32, device="cpu").view(8, 4)
    bias = torch.ones(4, device="cpu")
    x = torch.linspace(-1, 2, 24, device="cpu").view(3, 8)
    try:
        y = prepacked_linear(weight, bias, 3)(x)
    # The operators may be missing, not support this processor, or take other arguments.
    except (AttributeError, RuntimeError, TypeError):
        return False
    return y.shape == (3, 4) and torch.allclose(y, torch.addmm(bias, x, weight), atol=1e-4)


# ------------------------------------------------------------------------------------------------- compiled decoding


class CompiledDecoder(IncrementalDecoder):
    """Incremental decoder compiled by torch.compile, and captured as CUDA graphs on a GPU.

    One graph serves many positions, so attention covers a prefix of the cache with a mask. Large batches have a graph
    per ``BUCKET_SIZE`` positions, which reads the cache up to there; small batches have one graph for the whole cache.
    Each graph is compiled at its first step. The decoder can be started again once a batch is complete. On a GPU each
    step overwrites the previous logits.

    Args:
        gpt: the network, on its device.
        batch_size: maximum number of samples; smaller batches are padded.
    """

    # Tensors created in inference mode could not be written to outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, gpt: ConditionalGPT2, batch_size: int):
        super().__init__(gpt, batch_size)
        self.keys = self.allocate_cache(self.wte)
        self.values = self.allocate_cache(self.wte)
        self.bucket_size = BUCKET_SIZE if batch_size >= MIN_BATCH_SIZE_FOR_BUCKETS else gpt.num_tokens
        self.length = 0  # positions of the cache that attention reads
        self.positions = torch.arange(gpt.num_tokens, device=self.wte.device)
        self.token = self.wte.new_zeros(batch_size, self.n_embd)
        self.position = self.positions[:1].clone()
        # Graph and its output by ``length``. Those of torch.compile's own CUDA graphs cost the host 250 us per step,
        # these 12 us.
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        # Dynamo counts the graphs of all batch sizes together.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 64)
        self.compiled_logits = torch.compile(self.logits, fullgraph=True, dynamic=False)

    def start(self, condition: Tensor) -> LogitsFn:
        """Begin a batch, see ``IncrementalDecoder.start``."""
        size = len(condition)

        def logits_fn(position: int, previous: Tensor | None) -> Tensor:
            self.token[:size] = self._token(condition, previous)
            self.position.fill_(position)
            self.length = min((position // self.bucket_size + 1) * self.bucket_size, len(self.positions))
            return self.run()[:size]

        return logits_fn

    def run(self) -> Tensor:
        """Compute the logits that follow ``token`` at ``position``."""
        if not self.token.is_cuda:
            return self.compiled_logits(self.token, self.position)
        if self.length not in self.graphs:
            self.graphs[self.length] = self._capture()
        graph, logits = self.graphs[self.length]
        graph.replay()
        return logits

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Return the CUDA graph of a step, and the logits that it writes."""
        # The first call compiles. Replaying the graph repeats what it writes to the cache.
        self.compiled_logits(self.token, self.position)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.compiled_logits(self.token, self.position)
        return graph, logits

    def attend(self, position: Tensor, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Compute causal attention, see ``IncrementalDecoder.attend``, for a position (1,) on the device."""
        q, k, v = qkv.view(len(qkv), 3, self.n_head, 1, -1).unbind(1)
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        mask = (self.positions[: self.length] <= position)[None]
        y = F.scaled_dot_product_attention(
            q,
            keys[:, :, : self.length],
            values[:, :, : self.length],
            attn_mask=mask,
        )
        return y.reshape(len(qkv), self.n_embd)

    @staticmethod
    def make_linear(weight: Tensor, bias: Tensor | None, batch_size: int) -> Linear:
        """Return a linear layer that uses torch's own product, whose layout torch.compile chooses."""
        if bias is None:
            return lambda x: x @ weight
        return lambda x: torch.addmm(bias, x, weight)


class DecoderBlock:
    """The norms and linear layers of one block of GPT-2.

    Args:
        block: transformers' block.
        batch_size: number of samples.
        make_linear: returns the linear layer of a weight, a bias and a batch size.
    """

    def __init__(self, block: Any, batch_size: int, make_linear: Callable[[Tensor, Tensor | None, int], Linear]):
        def linear(module: Any) -> Linear:
            # A layer that is not GPT-2's own, e.g. one with an adapter, is called as it is.
            return make_linear(module.weight, module.bias, batch_size) if type(module) is Conv1D else module

        self.ln_1 = block.ln_1
        self.ln_2 = block.ln_2
        self.act = block.mlp.act
        self.qkv = linear(block.attn.c_attn)
        self.proj = linear(block.attn.c_proj)
        self.mlp_fc = linear(block.mlp.c_fc)
        self.mlp_proj = linear(block.mlp.c_proj)
