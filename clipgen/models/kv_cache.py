"""GPT-2 one position at a time, over the same weights, with a key-value cache that is allocated once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from clipgen.models.gpt import ConditionalGPT2
from clipgen.sampling import LogitsFn

Product = Callable[[Tensor], Tensor]  # (B, in) -> (B, out)
onednn: Any = torch.ops.mkldnn  # what torch.compile uses on a CPU


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

        Few rows are bound by reading the weight, which torch's CPU product does at a third of the memory's bandwidth.
        oneDNN over a prepacked weight is faster; for one row or two, a batch of the weight's two halves is.
        """
        inputs, outputs = weight.shape
        bias = weight.new_zeros(outputs) if bias is None else bias
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            transposed = weight.T.contiguous()
            if rows > 2 and torch.backends.mkldnn.is_available():
                packed = onednn._reorder_linear_weight(transposed, rows)
                return lambda x: onednn._linear_pointwise(x, packed, bias, "none", [], "")
            if rows <= 2 and outputs % 2 == 0:
                halves, column = transposed.view(2, -1, inputs), bias.view(2, -1, 1)
                return lambda x: torch.baddbmm(column, halves, x.T.expand(2, -1, -1)).flatten(0, 1).T
        return lambda x: torch.addmm(bias, x, weight)


class CompiledDecoder(IncrementalDecoder):
    """The same by torch.compile, on a GPU as a CUDA graph: one program for all positions, so it attends to the whole
    cache behind a mask. Its first step compiles; keep it, and start it again, but not before the last is done. On a GPU
    each step writes over the logits of the one before.

    Args:
        gpt: the network, on its device. rows: at most; fewer are filled up.
    """

    def __init__(self, gpt: ConditionalGPT2, rows: int):
        super().__init__(gpt, rows)
        self.keys, self.values = self.cache(self.wte), self.cache(self.wte)
        self.positions = torch.arange(gpt.num_tokens, device=self.wte.device)
        self.token, self.position = self.wte.new_zeros(rows, self.width), self.positions[:1].clone()
        self.graph: torch.cuda.CUDAGraph | None = None  # ours: torch.compile's takes the host 250 us a step, not 12
        limit = torch._dynamo.config.recompile_limit  # of programs, for all numbers of rows together
        torch._dynamo.config.recompile_limit = max(limit, 64)
        self.program = torch.compile(self.logits, fullgraph=True, dynamic=False)

    def start(self, condition: Tensor) -> LogitsFn:
        """As of ``IncrementalDecoder``."""
        rows = len(condition)

        def step(position: int, previous: Tensor | None) -> Tensor:
            self.token[:rows] = self._token(condition, previous)
            self.position.fill_(position)
            return self.run()[:rows]

        return step

    def run(self) -> Tensor:
        """The logits that follow the token at the position."""
        if not self.token.is_cuda:
            return self.program(self.token, self.position)
        if self.graph is None:
            self.program(self.token, self.position)  # compiles; what it writes, the graph writes again
            with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
                self.scored = self.program(self.token, self.position)
            self.graph = graph
        self.graph.replay()
        return self.scored

    def attend(self, position: Tensor, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As of ``IncrementalDecoder``, for a position (1,) on the device."""
        q, k, v = qkv.view(len(qkv), 3, self.heads, 1, -1).unbind(1)
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=(self.positions <= position)[None])
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
