"""GPT-2 one position at a time, over the same weights, with a key-value cache that is allocated once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.nets.gpt import ConditionalGPT2

onednn: Any = torch.ops.mkldnn  # what torch.compile uses on a CPU


class CachedDecoder:
    """Scores the next index of each row: call it with positions 0, 1, 2, ... in turn.

    Args:
        gpt: the network; only read.
        condition: first tokens (B, n_embd), what ``gpt.condition`` returns.
    """

    def __init__(self, gpt: ConditionalGPT2, condition: Tensor):
        net: Any = gpt.transformer
        config, rows = net.config, len(condition)
        self.condition, self.wte, self.wpe = condition, net.wte.weight, net.wpe.weight
        self.heads, self.width = config.n_head, config.n_embd
        self.layers = [Layer(block, rows) for block in net.h]
        self.norm, self.head = net.ln_f, product(gpt.head.weight.T, gpt.head.bias, rows)
        shape = (config.n_layer, rows, config.n_head, gpt.num_tokens, config.n_embd // config.n_head)
        self.keys, self.values = condition.new_empty(shape), condition.new_empty(shape)

    def __call__(self, position: int, previous: Tensor | None) -> Tensor:
        """Logits (B, K) of the index at ``position``, given the one before it (B,), None at position 0."""
        x = self.condition if previous is None else F.embedding(previous, self.wte)
        x = x + self.wpe[position]  # (B, C)
        for layer, keys, values in zip(self.layers, self.keys, self.values):
            x = x + layer.proj(self._attend(position, layer.qkv(layer.ln_1(x)), keys, values))
            x = x + layer.mlp_proj(layer.act(layer.mlp_fc(layer.ln_2(x))))
        return self.head(self.norm(x))

    def _attend(self, position: int, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What the rows' heads see in the positions so far: (B, 3 C), 2 x (B, H, T, C / H) -> (B, C)."""
        q, k, v = qkv.view(len(qkv), 3, self.heads, 1, -1).unbind(1)  # (B, H, 1, C / H)
        seen = slice(position + 1)
        keys[:, :, position : position + 1], values[:, :, position : position + 1] = k, v
        y = F.scaled_dot_product_attention(q, keys[:, :, seen], values[:, :, seen])  # (B, H, 1, C / H)
        return y.reshape(len(qkv), self.width)


class Layer:
    """The weights of one block, laid out for ``rows`` rows at a time."""

    def __init__(self, block: Any, rows: int):
        self.ln_1, self.ln_2, self.act = block.ln_1, block.ln_2, block.mlp.act
        self.qkv, self.proj, self.mlp_fc, self.mlp_proj = (
            product(linear.weight, linear.bias, rows)
            for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        )


def product(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """x (B, in) -> x @ weight + bias (B, out), for a weight (in, out) and B = ``rows``.

    So few rows are bound by reading the weight, which a CPU's plain product does at a third of the memory's speed.
    oneDNN's does not, once it has laid out the weight for itself; nor, for one row or two, does a batch of two halves.
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
