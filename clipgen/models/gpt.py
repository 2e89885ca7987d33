"""GPT-2 with the CLIP embedding as its first token (Eq. 6 of CLIP-GEN)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, GPT2Config, GPT2Model

from clipgen.models.config import GPTConfig


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention in transformers' interface: 3 x (B, H, T, D) -> (B, T, H, D).

    SDPA with ``is_causal=True`` instead of an explicit mask, so that FlashAttention can be used. transformers' own
    path builds a mask under torch.compile, and otherwise synchronizes with the GPU to check whether it is needed.
    """
    causal = query.shape[2] > 1
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=causal).transpose(1, 2), None


# transformers has no mask function of this name, so it builds no mask.
AttentionInterface.register("causal", causal_attention)


class ConditionalGPT2(nn.Module):
    """Predict code indices from the previous ones and a CLIP embedding: logits of p(s_t | s_<t, e).

    The network is transformers' GPT-2. Its input is [condition, s_0, ..., s_{T-2}]; the output at position t is the
    distribution of s_t, so T positions suffice.

    Args:
        config: sizes of the network.
        null_condition: learn a null condition, which classifier-free guidance needs.
    """

    def __init__(self, config: GPTConfig, null_condition: bool = False):
        super().__init__()
        self.num_tokens = config.num_tokens
        self.codebook_size = config.codebook_size
        self.transformer = GPT2Model(gpt2_config(config))
        if config.grad_checkpointing:
            enable_grad_checkpointing(self.transformer)
        self.clip_proj = nn.Linear(config.clip_dim, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.codebook_size, bias=config.lm_head_bias)
        if config.tie_embeddings:
            self.head.weight = self.transformer.wte.weight
        else:
            nn.init.normal_(self.head.weight, std=0.02)
        self.null = nn.Parameter(torch.zeros(config.n_embd)) if null_condition else None
        if config.pos_embed_init == "sincos_2d":
            self.transformer.wpe.weight.data.copy_(0.1 * sinusoids_2d(config.num_tokens, config.n_embd))

    def condition(self, clip_embedding: Tensor, drop: Tensor | None = None) -> Tensor:
        """Project CLIP embeddings (B, E) to condition tokens (B, n_embd).

        The embeddings, of unit norm, are first scaled to unit variance; the paper mentions only the projection.

        Args:
            clip_embedding: (B, E), unit norm.
            drop: (B,) bool, True for samples that get the null condition instead.
        """
        unit_variance = clip_embedding * clip_embedding.shape[-1] ** 0.5
        token = self.clip_proj(unit_variance.to(self.clip_proj.weight.dtype))
        if drop is None:
            return token
        if self.null is None:
            raise ValueError("this transformer has no null condition: train it with model.conditioning.drop_prob > 0")
        return torch.where(drop[:, None], self.null, token)

    def forward(
        self,
        indices: Tensor,
        clip_embedding: Tensor,
        drop: Tensor | None = None,
        with_loss: bool = False,
    ) -> Any:
        """Return teacher-forced logits: (B, T) int64, (B, E) -> (B, T, K); ``logits[:, t]`` scores ``indices[:, t]``.

        Args:
            indices: (B, T) int64.
            clip_embedding: (B, E), unit norm.
            drop: (B,) bool, see ``condition``.
            with_loss: return the mean cross-entropy per token (Eq. 8 prints the sum) and the logits. Computing the
                loss inside the compiled graph saves memory traffic on the large logits tensor.
        """
        condition_token = self.condition(clip_embedding, drop)[:, None]  # (B, 1, C)
        inputs = torch.cat([condition_token, self.transformer.wte(indices[:, :-1])], dim=1)  # (B, T, C)
        logits = self.head(self.transformer(inputs_embeds=inputs).last_hidden_state)
        if not with_loss:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), indices.flatten()), logits


def gpt2_config(config: GPTConfig) -> GPT2Config:
    """Return the configuration of transformers' GPT-2."""
    return GPT2Config(  # type: ignore[call-arg]
        vocab_size=config.codebook_size,
        n_positions=config.num_tokens,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        activation_function=config.activation,
        attn_implementation="causal",
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def enable_grad_checkpointing(network: Any) -> None:
    """Enable gradient checkpointing under the name that this version of transformers uses."""
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def sinusoids_2d(num_tokens: int, width: int) -> Tensor:
    """Return sines and cosines of row and column, (T, width), at wavelengths from 2 pi to 2 pi x the grid's side."""
    side = math.isqrt(num_tokens)
    if side**2 != num_tokens or width % 4:
        raise ValueError(
            "pos_embed_init=sincos_2d needs a square num_tokens and n_embd divisible by 4, "
            f"got {num_tokens} and {width}"
        )
    frequency = float(side) ** -torch.linspace(0, 1, width // 4)
    position = torch.arange(num_tokens)
    row = (position // side)[:, None] * frequency  # (T, width / 4)
    column = (position % side)[:, None] * frequency
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)
