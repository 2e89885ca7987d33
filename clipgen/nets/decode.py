"""GPT-2 one position at a time, over the same weights, with a key-value cache that is allocated once."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from clipgen.nets.gpt import ConditionalGPT2


class CachedDecoder:
    """Scores the next index of each row: call it with positions 0, 1, 2, ... in turn.

    Args:
        gpt: the network; only read.
        condition: first tokens (B, n_embd), what ``gpt.condition`` returns.
    """

    def __init__(self, gpt: ConditionalGPT2, condition: Tensor):
        self.gpt, self.condition = gpt, condition
        config = gpt.transformer.config
        self.n_head = config.n_head
        shape = (config.n_layer, len(condition), config.n_head, gpt.num_tokens, config.n_embd // config.n_head)
        self.keys, self.values = condition.new_empty(shape), condition.new_empty(shape)

    def __call__(self, position: int, previous: Tensor | None) -> Tensor:
        """Logits (B, K) of the index at ``position``, given the one before it (B,), None at position 0."""
        net: Any = self.gpt.transformer
        x = self.condition if previous is None else net.wte(previous)
        x = x + net.wpe.weight[position]  # (B, C)
        for layer, block in enumerate(net.h):
            x = x + self._attend(layer, position, block.attn, block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
        return self.gpt.head(net.ln_f(x))

    def _attend(self, layer: int, position: int, attention: Any, x: Tensor) -> Tensor:
        batch, width = x.shape
        q, k, v = attention.c_attn(x).view(batch, 3, self.n_head, width // self.n_head).unbind(1)  # (B, H, C / H)
        keys, values = self.keys[layer], self.values[layer]  # (B, H, T, C / H)
        keys[:, :, position], values[:, :, position] = k, v
        seen = slice(position + 1)
        y = F.scaled_dot_product_attention(q[:, :, None], keys[:, :, seen], values[:, :, seen])  # (B, H, 1, C / H)
        return attention.c_proj(y.reshape(batch, width))
