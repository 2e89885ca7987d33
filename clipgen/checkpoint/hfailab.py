"""Convert the published models of HFAiLab/clip-gen to constructor arguments and weights of clipgen.

The weights have the names of a model folder; a tokenizer's include ``discriminator.``. Sizes are read from the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from clipgen.checkpoint.model_folder import ModelContent
from clipgen.checkpoint.safe_load import State, add_prefix, read_weights, strip_prefix
from clipgen.models.discriminator import sizes_from_state

PROJECT = "HFAiLab/clip-gen"
RESOLUTION = 256
# Refuse a file whose Sequential has more than this many modules per tensor.
MAX_GAP = 8
RESNET_NAMES = {
    "block.0": "norm1",
    "block.2": "conv1",
    "block.3": "norm2",
    "block.6": "conv2",
    "shortcut": "nin_shortcut",
}


def convert_vqgan(checkpoint: str | Path) -> ModelContent:
    """Convert ``vqgan_*.pt``."""
    state = read_weights(checkpoint, "model", "encoder.conv_in.weight", PROJECT)
    discriminator = strip_prefix("discriminator.", state)
    gan = sizes_from_state(discriminator)
    codes = state["quantizer.embedding.weight"]
    arguments: dict[str, Any] = {
        "autoencoder": autoencoder_sizes(state),
        "quantizer": {"codebook_size": codes.shape[0], "codebook_dim": codes.shape[1]},
        "loss": {"codebook_weight": 0.2, "commitment_weight": 1.0},
        "gan": gan,
    }
    weights: State = {
        "quantize.embedding.weight": codes,
        **rename_prefix("encoder.final.3.", "quant_conv.", state),
        **rename_prefix("decoder.quant_conv_in.", "post_quant_conv.", state),
        **rename_half("encoder", "down", state),
        **rename_half("decoder", "up", state),
        **rename_prefix("features.", "discriminator.main.", discriminator),
        **rename_prefix("head.", f"discriminator.main.{2 + 3 * gan.get('num_layers', 0)}.", discriminator),
    }
    return arguments, weights


def autoencoder_sizes(state: State) -> dict[str, Any]:
    """Return the arguments of ``AutoencoderConfig``, read from the encoder's weights."""
    ch = state["encoder.conv_in.weight"].shape[0]
    ch_mult = []
    attn_resolutions = []
    resolution = RESOLUTION
    num_res_blocks = 0
    for i, blocks in enumerate(split_by_resolution(strip_prefix("encoder.down.", state))):
        channels, number, has_attention = describe_blocks(blocks)
        ch_mult.append(channels // ch)
        num_res_blocks = num_res_blocks or number
        if has_attention:
            attn_resolutions.append(resolution >> i)
    return {
        "z_channels": state["quantizer.embedding.weight"].shape[1],
        "ch": ch,
        "ch_mult": ch_mult,
        "num_res_blocks": num_res_blocks,
        "resolution": resolution,
        "attn_resolutions": attn_resolutions,
        "norm_eps": 1e-5,
    }


def rename_half(half: str, sequence: str, state: State) -> State:
    """Rename the weights of the encoder (``sequence`` is "down") or the decoder ("up")."""
    named = rename_prefix(f"{half}.conv_in.", f"{half}.conv_in.", state)
    named |= rename_prefix(f"{half}.final.0.", f"{half}.norm_out.", state)
    named |= rename_prefix(f"{half}.final.2.", f"{half}.conv_out.", state)
    for name, block in zip(("block_1", "attn_1", "block_2"), split_sequential(strip_prefix(f"{half}.mid.", state))):
        named |= add_prefix(f"{half}.mid.{name}.", rename_block(block))
    levels = split_by_resolution(strip_prefix(f"{half}.{sequence}.", state))
    if half == "decoder":
        levels.reverse()  # ours counts from the highest resolution in both halves
    for i, blocks in enumerate(levels):
        named |= add_prefix(f"{half}.{sequence}.{i}.", rename_level(blocks, sequence))
    return named


def rename_prefix(old: str, new: str, state: State) -> State:
    """Return the weights whose names begin with ``old``, with ``new`` in its place."""
    return add_prefix(new, strip_prefix(old, state))


def split_sequential(state: State) -> list[State]:
    """Split the weights of a Sequential, ``0.a, 0.b, 1.a, ...``, by its members.

    Raises:
        ValueError: the numbers have such gaps that the list would be far longer than the state.
    """
    states: dict[int, State] = {}
    for name, tensor in state.items():
        number, _, rest = name.partition(".")
        states.setdefault(int(number), {})[rest] = tensor
    length = max(states, default=-1) + 1
    if length > len(state) * MAX_GAP + 1:
        raise ValueError(f"its modules must be numbered consecutively, got module {length - 1}")
    return [states.get(number, {}) for number in range(length)]


def split_by_resolution(state: State) -> list[list[State]]:
    """Split the members of a Sequential by resolution; a bare convolution ends a resolution."""
    levels: list[list[State]] = [[]]
    for block in split_sequential(state):
        levels[-1].append(block)
        if "conv.weight" in block:
            levels.append([])
    return levels


def describe_blocks(blocks: list[State]) -> tuple[int, int, bool]:
    """Return the channels and the number of residual blocks of one resolution, and True if it has attention."""
    residual = [block for block in blocks if "block.0.weight" in block]
    has_attention = any("attn.in_proj_weight" in block for block in blocks)
    return residual[-1]["block.6.weight"].shape[0], len(residual), has_attention


def rename_level(blocks: list[State], sequence: str) -> State:
    """Rename the blocks of one resolution."""
    named: State = {}
    counts = {"block": 0, "attn": 0}
    for block in blocks:
        if "conv.weight" in block:
            named |= add_prefix(f"{sequence}sample.", block)
            continue
        kind = "attn" if "attn.in_proj_weight" in block else "block"
        named |= add_prefix(f"{kind}.{counts[kind]}.", rename_block(block))
        counts[kind] += 1
    return named


def rename_block(block: State) -> State:
    """Rename the weights of a residual block, or split those of an attention block."""
    if "attn.in_proj_weight" in block:
        return split_attention(block)
    named: State = {}
    for name, tensor in block.items():
        module, _, kind = name.rpartition(".")
        named[f"{RESNET_NAMES[module]}.{kind}"] = tensor
    return named


def split_attention(block: State) -> State:
    """Split the weights of ``torch.nn.MultiheadAttention`` into four 1 x 1 convolutions."""
    named = add_prefix("norm.", strip_prefix("norm.", block))
    weights = (*block["attn.in_proj_weight"].chunk(3), block["attn.out_proj.weight"])
    biases = (*block["attn.in_proj_bias"].chunk(3), block["attn.out_proj.bias"])
    for name, weight, bias in zip(("q", "k", "v", "proj_out"), weights, biases):
        named[f"{name}.weight"] = weight[:, :, None, None]
        named[f"{name}.bias"] = bias
    return named


# -------------------------------------------------------------------------------------------------------- transformer

# Names in torch.nn.TransformerEncoderLayer, and in GPT-2.
LAYER_NAMES = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "self_attn.in_proj": "attn.c_attn",
    "self_attn.out_proj": "attn.c_proj",
    "linear1": "mlp.c_fc",
    "linear2": "mlp.c_proj",
}


def convert_transformer(checkpoint: str | Path, n_head: int | None = None) -> ModelContent:
    """Convert ``gpt_*.pt``.

    Args:
        checkpoint: the file.
        n_head: number of heads, which the weights do not show; None assumes heads of 64 dimensions, as in all sizes
            of the project.
    """
    state = read_weights(checkpoint, "model", "tok_emb.weight", PROJECT)
    codebook_size, width = state["tok_emb.weight"].shape
    blocks = split_sequential(strip_prefix("blocks.", state))
    arguments = dict(
        n_layer=len(blocks),
        n_head=n_head or max(width // 64, 1),
        n_embd=width,
        codebook_size=codebook_size,
        num_tokens=state["pos_emb"].shape[1],
        clip_dim=state["cond_proj.weight"].shape[1],
        tie_embeddings=False,
        lm_head_bias=True,
        activation="gelu",
    )
    weights = {
        "transformer.wte.weight": state["tok_emb.weight"],
        "transformer.wpe.weight": state["pos_emb"][0],
        "clip_proj.weight": unscaled_projection(state["cond_proj.weight"]),
        "clip_proj.bias": state["cond_proj.bias"],
        **rename_prefix("norm.", "transformer.ln_f.", state),
        **rename_prefix("head.", "head.", state),
    }
    for i, block in enumerate(blocks):
        weights |= add_prefix(f"transformer.h.{i}.", rename_gpt2(strip_prefix("encoder.", block)))
    return arguments, add_prefix("gpt.", weights)


def unscaled_projection(weight: Tensor) -> Tensor:
    """Return the weight of the projection for conditions that clipgen scales by the square root of their width."""
    # The dtype of the file is kept, so that a file of integers is refused.
    return (weight / weight.shape[1] ** 0.5).to(weight.dtype)


def rename_gpt2(layer: State) -> State:
    """Rename the weights of one layer as in GPT-2, whose matrices are transposed."""
    named: State = {}
    for name, tensor in layer.items():
        module, _, kind = name.replace("in_proj_", "in_proj.").rpartition(".")
        named[f"{LAYER_NAMES[module]}.{kind}"] = tensor.T.contiguous() if tensor.ndim == 2 else tensor
    return named
