"""GPT-2 with the CLIP embedding as its first token (Eq. 6 of CLIP-GEN)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, GPT2Config, GPT2Model


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, 3 x (B, H, T, D) -> (B, T, H, D), and no mask, which flash attention does
    not take: transformers' own way builds one under torch.compile, and else waits for the GPU to find it needless."""
    causal = query.shape[2] > 1
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=causal).transpose(1, 2), None


AttentionInterface.register("causal", causal_attention)  # no function for masks has this name, so none is made


class ConditionalGPT2(nn.Module):
    """Logits of codebook indices given the ones before and a CLIP embedding: p(s_t | s_<t, e).

    The network is transformers' GPT-2. Position 0 holds the linearly projected embedding, position t the index s_t;
    so position t - 1 scores s_t, and T positions are enough for T indices.

    Args:
        n_layer, n_head, n_embd: GPT-2's own.
        codebook_size: K. num_tokens: T. clip_dim: E.
        dropout: on embeddings, attention and residuals.
        tie_head: share the output matrix with the index embedding, as GPT-2 does. head_bias: add one to the logits.
        activation: transformers' name; GPT-2's is the default, as one kernel ("gelu_new" is eight).
        checkpointing: keep no activations inside blocks, compute them again on the way back: less memory, more time.
        grid_positions: start the learned positions from the row and column that each one scores, instead of GPT-2's
            noise: what lies above an index is then found from the first step on.
        null_condition: own a learned condition that stands for "anything", for classifier-free guidance.
    """

    def __init__(
        self,
        *,
        n_layer: int,
        n_head: int,
        n_embd: int,
        codebook_size: int,
        num_tokens: int,
        clip_dim: int,
        dropout: float = 0.0,
        tie_head: bool = True,
        head_bias: bool = False,
        activation: str = "gelu_pytorch_tanh",
        null_condition: bool = False,
        grid_positions: bool = False,
        checkpointing: bool = False,
    ):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd must be divisible by n_head, got {n_embd} and {n_head}")
        self.num_tokens, self.codebook_size = num_tokens, codebook_size
        self.transformer = GPT2Model(
            GPT2Config(  # type: ignore[call-arg]
                vocab_size=codebook_size,
                n_positions=num_tokens,
                n_embd=n_embd,
                n_layer=n_layer,
                n_head=n_head,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                activation_function=activation,
                attn_implementation="causal",
                use_cache=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        if checkpointing:
            net: Any = self.transformer  # the second name is that of older transformers
            enable = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.clip_proj = nn.Linear(clip_dim, n_embd)
        self.head = nn.Linear(n_embd, codebook_size, bias=head_bias)
        if tie_head:
            self.head.weight = self.transformer.wte.weight
        else:
            nn.init.normal_(self.head.weight, std=0.02)
        self.null = nn.Parameter(torch.zeros(n_embd)) if null_condition else None
        if grid_positions:
            self.transformer.wpe.weight.data.copy_(0.1 * sinusoids_2d(num_tokens, n_embd))

    def condition(self, clip_embedding: Tensor, drop: Tensor | None = None) -> Tensor:
        """Embeddings (B, E) -> first tokens (B, n_embd). A unit vector's elements are scaled to unit variance first.

        ``drop`` (B,) bool marks rows that get the null condition instead.
        """
        unit_variance = clip_embedding * clip_embedding.shape[-1] ** 0.5
        token = self.clip_proj(unit_variance.to(self.clip_proj.weight.dtype))
        if drop is None:
            return token
        if self.null is None:
            raise ValueError("this transformer has no null condition: train it with condition_dropout > 0")
        return torch.where(drop[:, None], self.null, token)

    def forward(
        self, indices: Tensor, clip_embedding: Tensor, drop: Tensor | None = None, with_loss: bool = False
    ) -> Any:
        """Teacher-forced logits: (B, T) int64, (B, E) -> (B, T, K); ``logits[:, t]`` scores ``indices[:, t]``.

        ``with_loss`` gives (cross-entropy of an index, logits), Eq. 8 a token: compiled together, logits of a large
        codebook are read fewer times.
        """
        first = self.condition(clip_embedding, drop)[:, None]  # (B, 1, C)
        tokens = torch.cat([first, self.transformer.wte(indices[:, :-1])], dim=1)  # (B, T, C)
        logits = self.head(self.transformer(inputs_embeds=tokens).last_hidden_state)
        return (F.cross_entropy(logits.flatten(0, 1), indices.flatten()), logits) if with_loss else logits


def sinusoids_2d(num_tokens: int, width: int) -> Tensor:
    """Sines and cosines of row and column, (T, width), at wavelengths from 2 pi up to 2 pi times the grid's side."""
    side = math.isqrt(num_tokens)
    if side**2 != num_tokens or width % 4:
        raise ValueError(
            f"grid_positions needs a square num_tokens and n_embd divisible by 4, got {num_tokens} and {width}"
        )
    frequency = float(side) ** -torch.linspace(0, 1, width // 4)
    place = torch.arange(num_tokens)
    angles = [axis[:, None] * frequency for axis in (place // side, place % side)]  # 2 x (T, width / 4)
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
