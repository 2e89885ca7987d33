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


# The library transformers has no mask function of this name, so it builds no mask.
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
        self.scale_condition = config.scale_condition
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
        if config.mlp_dropout > 0:
            add_mlp_dropout(self.transformer, config.mlp_dropout)
        if config.weight_init == "torch":
            initialize_as_torch(self)
        if config.pos_embed_init == "sincos_2d":
            self.transformer.wpe.weight.data.copy_(0.1 * sinusoids_2d(config.num_tokens, config.n_embd))

    def condition_tokens(self, clip_embedding: Tensor, drop: Tensor | None = None) -> Tensor:
        """Project CLIP embeddings (B, E) to condition tokens (B, n_embd).

        The embeddings, of unit norm, are first scaled to unit variance unless ``scale_condition`` is False; the paper
        mentions only the projection.

        Args:
            clip_embedding: (B, E), unit norm.
            drop: (B,) bool, True for samples that get the null condition instead.

        Raises:
            ValueError: ``drop`` is given, but the network was built without a null condition.
        """
        scale = clip_embedding.shape[-1] ** 0.5 if self.scale_condition else 1.0
        token = self.clip_proj((clip_embedding * scale).to(self.clip_proj.weight.dtype))
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
            drop: (B,) bool, see ``condition_tokens``.
            with_loss: return the mean cross-entropy per token (Eq. 8 prints the sum) and the logits. Computing the
                loss inside the compiled graph saves memory traffic on the large logits tensor.
        """
        condition_token = self.condition_tokens(clip_embedding, drop)[:, None]  # (B, 1, C)
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


def add_mlp_dropout(network: Any, probability: float) -> None:
    """Apply dropout to the input of the second linear layer of each MLP, where GPT-2 has none."""

    def drop(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return F.dropout(inputs[0], probability, module.training)

    for block in network.h:
        block.mlp.c_proj.register_forward_pre_hook(drop)


@torch.no_grad()
def initialize_as_torch(gpt: ConditionalGPT2) -> None:
    """Initialize a network as HFAiLab/clip-gen does: torch.nn's default initializations, and zero positions.

    The blocks there are ``torch.nn.TransformerEncoderLayer``. Tied embeddings keep the initialization of the tokens.
    """
    network: Any = gpt.transformer
    nn.init.normal_(network.wte.weight)
    nn.init.zeros_(network.wpe.weight)
    for block in network.h:
        nn.init.xavier_uniform_(block.attn.c_attn.weight)
        nn.init.zeros_(block.attn.c_attn.bias)
        initialize_linear(block.attn.c_proj)
        nn.init.zeros_(block.attn.c_proj.bias)
        initialize_linear(block.mlp.c_fc)
        initialize_linear(block.mlp.c_proj)
    gpt.clip_proj.reset_parameters()
    if gpt.head.weight is not network.wte.weight:
        gpt.head.reset_parameters()


def initialize_linear(layer: Any) -> None:
    """Initialize a layer of GPT-2, whose weight is (in, out), as ``torch.nn.Linear`` does."""
    bound = layer.weight.shape[0] ** -0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.uniform_(layer.bias, -bound, bound)


def sinusoids_2d(num_tokens: int, width: int) -> Tensor:
    """Return sines and cosines of row and column, (T, width), at wavelengths from 2 pi to 2 pi x the grid's side.

    Raises:
        ValueError: the number of tokens is not a square, or the width is not divisible by 4.
    """
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
