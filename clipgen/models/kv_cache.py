"""Incremental decoding with GPT-2's weights: one position per step, with a key-value cache that is allocated once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from clipgen.models.cpu_kernels import Activation, Linear, addmm_linear, choose_cpu_kernel, with_activation
from clipgen.models.gpt import ConditionalGPT2
from clipgen.sampling import LogitsFn, SampleFn, guide, make_sample_fn, sample_from_logits, with_cfg
from clipgen.sampling_params import SamplingParams

# A compiled graph reads the cache up to a multiple of this many positions.
BUCKET_SIZE = 64
# Smaller batches read the whole cache, which is small compared with the weights.
MIN_BATCH_SIZE_FOR_BUCKETS = 64


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

    def start(self, condition_tokens: Tensor) -> LogitsFn:
        """Begin a batch, given its condition tokens (B, n_embd) from ``gpt.condition_tokens``.

        Returns:
            The function from a position and the previous index (B,), None at position 0, to the logits (B, K).
        """
        self.keys = self.allocate_cache(condition_tokens)
        self.values = self.allocate_cache(condition_tokens)

        def logits_fn(position: int, previous: Tensor | None) -> Tensor:
            return self.logits(self._token(condition_tokens, previous), position)

        return logits_fn

    def start_sampling(self, condition_tokens: Tensor, uniforms: Tensor, params: SamplingParams) -> SampleFn:
        """Begin a batch whose indices are sampled.

        Args:
            condition_tokens: (B, n_embd); with guidance (2 B, n_embd), the second half of the null condition.
            uniforms: (B, T) in [0, 1), see ``clipgen.sampling.sample_from_logits``.
            params: sampling parameters.

        Returns:
            The function from a position and the previous index (B,), None at position 0, to the index (B,).
        """
        logits_fn = self.start(condition_tokens)
        if params.uses_guidance:
            logits_fn = with_cfg(logits_fn, params.guidance_scales(uniforms.shape[1]))
        return make_sample_fn(logits_fn, uniforms, params)

    def allocate_cache(self, like: Tensor) -> list[Tensor]:
        """Allocate one tensor (B, H, T, C / H) per block, of the dtype and on the device of ``like``.

        torch.compile would copy a shared tensor at every write to a part of it.
        """
        return [like.new_zeros(self.cache_shape) for _ in self.blocks]

    def _token(self, condition_tokens: Tensor, previous: Tensor | None) -> Tensor:
        return condition_tokens if previous is None else F.embedding(previous, self.wte)

    def logits(self, token: Tensor, position: Any) -> Tensor:
        """Compute the logits (B, K) that follow tokens (B, C) at a position in [0, T)."""
        x = token + self.wpe[position]
        for block, keys, values in zip(self.blocks, self.keys, self.values):
            x = x + block.proj(self.attend(position, block.qkv(block.ln_1(x)), keys, values))
            x = x + block.mlp_proj(block.mlp_fc(block.ln_2(x)))
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
    def make_linear(weight: Tensor, bias: Tensor | None, batch_size: int, act: Activation | None = None) -> Linear:
        """Return the function x (B, in) -> act(x @ weight + bias) (B, out) for a weight (in, out).

        Small batches are memory-bound, and torch's CPU product reaches only a third of the memory bandwidth.
        ``choose_cpu_kernel`` selects a faster one.
        """
        bias = weight.new_zeros(weight.shape[1]) if bias is None else bias
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            return choose_cpu_kernel(batch_size, *weight.shape)(weight, bias, act)
        return addmm_linear(weight, bias, act)


# ------------------------------------------------------------------------------------------------- compiled decoding


class CompiledDecoder(IncrementalDecoder):
    """Incremental decoder compiled by torch.compile, and captured as CUDA graphs on a GPU.

    A CUDA graph runs a whole step: the embedding of the previous index, the network, guidance and sampling. One graph
    serves many positions, so attention covers a prefix of the cache with a mask. Large batches have a graph per
    ``BUCKET_SIZE`` positions, which reads the cache up to there; small batches have one graph for the whole cache. Each
    graph is compiled at its first step, and captured again if the sampling parameters change. The decoder can be
    started again once a batch is complete. Each step overwrites the indices that it returned before.

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
        self._allocate_inputs(batch_size, gpt.num_tokens)
        # By ``length``, for these parameters. The graphs of torch.compile itself cost the host 250 us per step, these
        # 12 us.
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.params = SamplingParams()
        # Dynamo counts the graphs of all batch sizes together.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 64)
        self.compiled_logits = torch.compile(self.logits_after, fullgraph=True, dynamic=False)

    def _allocate_inputs(self, batch_size: int, num_tokens: int) -> None:
        """Allocate what a step reads: a CUDA graph always reads the same memory."""
        floats = {"dtype": torch.float32, "device": self.wte.device}
        self.condition_tokens = self.wte.new_zeros(batch_size, self.n_embd)
        self.previous = self.positions.new_zeros(batch_size)
        self.position = self.positions[:1].clone()
        self.uniforms = torch.zeros(batch_size, num_tokens, **floats)
        self.guidance_scales = torch.ones(num_tokens, **floats)

    def start(self, condition_tokens: Tensor) -> LogitsFn:
        """Begin a batch, see ``IncrementalDecoder.start``. No CUDA graph is captured."""
        size = len(condition_tokens)
        self.condition_tokens[:size] = condition_tokens

        def logits_fn(position: int, previous: Tensor | None) -> Tensor:
            if previous is not None:
                self.previous[:size] = previous
            self.move_to(position)
            return self.compiled_logits(self.condition_tokens, self.previous, self.position)[:size]

        return logits_fn

    def start_sampling(self, condition_tokens: Tensor, uniforms: Tensor, params: SamplingParams) -> SampleFn:
        """Begin a batch whose indices are sampled, see ``IncrementalDecoder.start_sampling``."""
        size = len(uniforms)
        # With guidance, the second half of the rows has the null condition.
        halves = 2 if params.uses_guidance else 1
        self.condition_tokens.view(halves, -1, self.n_embd)[:, :size] = condition_tokens.view(halves, size, -1)
        self.uniforms[:size] = uniforms
        self.guidance_scales.copy_(torch.tensor(params.guidance_scales(len(self.positions))))
        if params != self.params:
            # A graph samples with the parameters that it was captured with.
            self.graphs.clear()
            self.params = params
        sampled = self.previous[:size]

        def sample_fn(position: int, previous: Tensor | None) -> Tensor:
            if previous is not None and previous is not sampled:
                self.previous.view(halves, -1)[:, :size] = previous
            self.move_to(position)
            self.run()
            return sampled

        return sample_fn

    def move_to(self, position: int) -> None:
        """Set the position of the next step, in [0, T)."""
        self.position.fill_(position)
        self.length = min((position // self.bucket_size + 1) * self.bucket_size, len(self.positions))

    def logits_after(self, condition_tokens: Tensor, previous: Tensor, position: Tensor) -> Tensor:
        """Compute the logits (B, K) at a position (1,), from the condition token or from the previous index (B,)."""
        token = torch.where(position == 0, condition_tokens, F.embedding(previous, self.wte))
        return self.logits(token, position)

    def sample_next(self) -> None:
        """Compute the logits at ``position``, and replace ``previous`` by the index that is sampled from them."""
        logits = self.compiled_logits(self.condition_tokens, self.previous, self.position)
        if self.params.uses_guidance:
            logits = guide(logits, self.guidance_scales.index_select(0, self.position))
        uniforms = self.uniforms[: len(logits)].index_select(1, self.position)[:, 0]
        index = sample_from_logits(logits, uniforms, self.params)
        self.previous.copy_(index.repeat(2) if self.params.uses_guidance else index)

    def run(self) -> None:
        """Run ``sample_next``, on a GPU by replaying its CUDA graph."""
        if not self.previous.is_cuda:
            self.sample_next()
            return
        if self.length not in self.graphs:
            self.graphs[self.length] = self._capture()
        self.graphs[self.length].replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Return the CUDA graph of ``sample_next``."""
        previous = self.previous.clone()
        # The first call compiles, on the stream of the capture, for which libraries then have their handles. What it
        # writes to the cache, replaying the graph writes again.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.sample_next()
        torch.cuda.current_stream().wait_stream(stream)
        self.previous.copy_(previous)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.sample_next()
        return graph

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
    def make_linear(weight: Tensor, bias: Tensor | None, batch_size: int, act: Activation | None = None) -> Linear:
        """Return a linear layer that uses torch's own product, whose layout torch.compile chooses."""
        if bias is None:
            return with_activation(lambda x: x @ weight, act)
        return addmm_linear(weight, bias, act)


class DecoderBlock:
    """The norms and linear layers of one block of GPT-2.

    Args:
        block: transformers' block.
        batch_size: number of samples.
        make_linear: returns the linear layer of a weight, a bias, a batch size and an activation.
    """

    def __init__(self, block: Any, batch_size: int, make_linear: Callable[..., Linear]):
        def linear(module: Any, activation: Activation | None = None) -> Linear:
            if type(module) is Conv1D:
                return make_linear(module.weight, module.bias, batch_size, activation)
            # A layer that is not GPT-2's own, e.g. one with an adapter, is called as it is.
            return with_activation(module, activation)

        self.ln_1 = block.ln_1
        self.ln_2 = block.ln_2
        self.qkv = linear(block.attn.c_attn)
        self.proj = linear(block.attn.c_proj)
        self.mlp_fc = linear(block.mlp.c_fc, block.mlp.act)
        self.mlp_proj = linear(block.mlp.c_proj)
