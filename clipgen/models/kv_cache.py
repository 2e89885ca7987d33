"""GPT-2 one position at a time, over the same weights, with a key-value cache that is allocated once."""

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
from clipgen.sampling import LogitsFn

Product = Callable[[Tensor], Tensor]  # (B, in) -> (B, out)
onednn: Any = torch.ops.mkldnn  # what torch.compile uses on a CPU
BUCKET = 64  # positions of the cache that a compiled program reads, or a multiple
BUCKETS_FROM_ROWS = 64
CACHED_ELEMENTS = 2**17  # of a weight that stays in a processor's cache, where torch's own product is fastest


class IncrementalDecoder:
    """Scores the next index of each of ``rows`` rows: ``start`` once, then the step at positions 0, 1, 2, ... in turn.

    Its blocks are not called: hooks on them do not run.

    Args:
        gpt: the network; only read.
    """

    def __init__(self, gpt: ConditionalGPT2, rows: int):
        net: Any = gpt.transformer
        config, self.wte, self.wpe = net.config, net.wte.weight, net.wpe.weight
        self.heads, self.width = config.n_head, config.n_embd
        self.layers = [Layer(block, rows, self.product) for block in net.h]
        self.norm, self.head = net.ln_f, self.product(gpt.head.weight.T, gpt.head.bias, rows)
        self.shape = (rows, config.n_head, gpt.num_tokens, config.n_embd // config.n_head)  # of a layer's keys

    def start(self, condition: Tensor) -> LogitsFn:
        """The step for first tokens (B, n_embd), what ``gpt.condition`` returns.

        It gives the logits (B, K) of the index at a position, given the one before it (B,), None at position 0.
        """
        self.keys, self.values = self.cache(condition), self.cache(condition)
        return lambda position, previous: self.logits(self._token(condition, previous), position)

    def cache(self, like: Tensor) -> list[Tensor]:
        """A tensor a layer: torch.compile would copy the whole of a common one at every write to a part of it."""
        return [like.new_zeros(self.shape) for _ in self.layers]

    def _token(self, condition: Tensor, previous: Tensor | None) -> Tensor:
        return condition if previous is None else F.embedding(previous, self.wte)

    def logits(self, token: Tensor, position: Any) -> Tensor:
        """What follows the tokens (B, C) at a position: (B, K)."""
        x = token + self.wpe[position]
        for layer, keys, values in zip(self.layers, self.keys, self.values):
            x = x + layer.proj(self.attend(position, layer.qkv(layer.ln_1(x)), keys, values))
            x = x + layer.mlp_proj(layer.act(layer.mlp_fc(layer.ln_2(x))))
        return self.head(self.norm(x))

    def attend(self, position: Any, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What the rows' heads see in the positions so far: (B, 3 C), 2 x (B, H, T, C / H) -> (B, C)."""
        q, k, v = qkv.view(len(qkv), 3, self.heads, 1, -1).unbind(1)  # (B, H, 1, C / H)
        seen = slice(position + 1)
        keys[:, :, position : position + 1], values[:, :, position : position + 1] = k, v
        y = F.scaled_dot_product_attention(q, keys[:, :, seen], values[:, :, seen])  # (B, H, 1, C / H)
        return y.reshape(len(qkv), self.width)

    @staticmethod
    def product(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
        """x (B, in) -> x @ weight + bias (B, out), for a weight (in, out) and B = ``rows``.

        Few rows are bound by reading the weight, which torch's CPU product does at a third of the memory's bandwidth;
        ``cpu_kernel`` chooses another.
        """
        bias = weight.new_zeros(weight.shape[1]) if bias is None else bias
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            return cpu_kernel(rows, *weight.shape)(weight, bias, rows)
        return plain(weight, bias, rows)


# -------------------------------------------------------------------------------------------- products of few rows


def plain(weight: Tensor, bias: Tensor, rows: int) -> Product:
    """Return torch's own product."""
    return lambda x: torch.addmm(bias, x, weight)


def halves(weight: Tensor, bias: Tensor, rows: int) -> Product:
    """Return the product as a batch of the weight's two halves, transposed: two streams through memory."""
    inputs, _ = weight.shape
    halved, column = weight.T.contiguous().view(2, -1, inputs), bias.view(2, -1, 1)
    return lambda x: torch.baddbmm(column, halved, x.T.expand(2, -1, -1)).flatten(0, 1).T


def prepacked(weight: Tensor, bias: Tensor, rows: int) -> Product:
    """Return oneDNN's product over a weight that is laid out for it once."""
    packed = onednn._reorder_linear_weight(weight.T.contiguous(), rows)
    return lambda x: onednn._linear_pointwise(x, packed, bias, "none", [], "")


def cpu_kernel(rows: int, inputs: int, outputs: int) -> Callable[[Tensor, Tensor, int], Product]:
    """Choose the product of ``rows`` rows with a weight (inputs, outputs) in float32.

    The choice follows from shape and instruction set. Measuring at first use could choose another kernel in the next
    process, and kernels round differently: the same seed would not always draw the same indices.
    """
    if rows <= 2:
        if inputs * outputs <= CACHED_ELEMENTS:
            return plain
        tall = inputs > outputs and instruction_set() == "AVX2"
        if outputs % 2 == 0 and not (tall and has_prepacked_kernels()):
            return halves
    return prepacked if has_prepacked_kernels() else plain


@cache
def has_prepacked_kernels() -> bool:
    """Return True if the private operators of oneDNN exist in this build of torch, and compute the product."""
    if not torch.backends.mkldnn.is_available():
        return False
    weight, bias = torch.linspace(-1, 1, 32, device="cpu").view(8, 4), torch.ones(4, device="cpu")
    x = torch.linspace(-1, 2, 24, device="cpu").view(3, 8)
    try:
        found = prepacked(weight, bias, 3)(x)
    except (AttributeError, RuntimeError, TypeError):  # not there, not for this processor, or with other arguments
        return False
    return found.shape == (3, 4) and torch.allclose(found, torch.addmm(bias, x, weight), atol=1e-4)


class CompiledDecoder(IncrementalDecoder):
    """The same by torch.compile, on a GPU as CUDA graphs: one program for many positions, which attends behind a mask.

    Many rows take a program for each ``BUCKET`` positions, which reads the cache up to there; few take one for the
    whole cache, whose reading is then short beside the weights'. The first step of each compiles; keep the decoder, and
    start it again, but not before the last is done. On a GPU each step writes over the logits of the one before.

    Args:
        gpt: the network, on its device. rows: at most; fewer are filled up.
    """

    # Tensors made in inference mode could not be written to outside of it
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, gpt: ConditionalGPT2, rows: int):
        super().__init__(gpt, rows)
        self.keys, self.values = self.cache(self.wte), self.cache(self.wte)
        self.bucket = BUCKET if rows >= BUCKETS_FROM_ROWS else gpt.num_tokens
        self.seen = 0
        self.positions = torch.arange(gpt.num_tokens, device=self.wte.device)
        self.token, self.position = self.wte.new_zeros(rows, self.width), self.positions[:1].clone()
        # By the length of the cache they read; ours: torch.compile's take the host 250 us per step, not 12
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        limit = torch._dynamo.config.recompile_limit  # of programs, for all numbers of rows together
        torch._dynamo.config.recompile_limit = max(limit, 64)
        self.program = torch.compile(self.logits, fullgraph=True, dynamic=False)

    def start(self, condition: Tensor) -> LogitsFn:
        """As of ``IncrementalDecoder``."""
        rows = len(condition)

        def step(position: int, previous: Tensor | None) -> Tensor:
            self.token[:rows] = self._token(condition, previous)
            self.position.fill_(position)
            self.seen = min((position // self.bucket + 1) * self.bucket, len(self.positions))
            return self.run()[:rows]

        return step

    def run(self) -> Tensor:
        """The logits that follow the token at the position."""
        if not self.token.is_cuda:
            return self.program(self.token, self.position)
        if self.seen not in self.graphs:
            self.graphs[self.seen] = self._capture()
        graph, scored = self.graphs[self.seen]
        graph.replay()
        return scored

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Return the CUDA graph of a step, and the logits that it writes."""
        self.program(self.token, self.position)  # compiles; what it writes, the graph writes again
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            scored = self.program(self.token, self.position)
        return graph, scored

    def attend(self, position: Tensor, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As of ``IncrementalDecoder``, for a position (1,) on the device."""
        q, k, v = qkv.view(len(qkv), 3, self.heads, 1, -1).unbind(1)
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        mask = (self.positions[: self.seen] <= position)[None]
        seen = keys[:, :, : self.seen], values[:, :, : self.seen]
        y = F.scaled_dot_product_attention(q, *seen, attn_mask=mask)
        return y.reshape(len(qkv), self.width)

    @staticmethod
    def product(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
        """The plain product, which torch.compile lays out as it likes."""
        return (lambda x: x @ weight) if bias is None else (lambda x: torch.addmm(bias, x, weight))


class Layer:
    """The weights of one block, each behind its product."""

    def __init__(self, block: Any, rows: int, product: Callable[[Tensor, Tensor | None, int], Product]):
        self.ln_1, self.ln_2, self.act = block.ln_1, block.ln_2, block.mlp.act
        self.qkv, self.proj, self.mlp_fc, self.mlp_proj = (
            product(linear.weight, linear.bias, rows) if type(linear) is Conv1D else linear  # an adapter, say
            for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        )
