"""Published models of HFAiLab/clip-gen: checkpoints -> arguments and weights of ours.

The weights come out as a model folder holds them; of the tokenizer also ``discriminator.``. The sizes are read off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipgen.checkpoint.model_folder import Model
from clipgen.checkpoint.safe_load import State, read_weights, strip_prefix
from clipgen.models.discriminator import sizes_from_state

PROJECT = "HFAiLab/clip-gen"
MAX_GAP = 8  # modules without weights for each weight of a Sequential
RESNET = {"block.0": "norm1", "block.2": "conv1", "block.3": "norm2", "block.6": "conv2", "shortcut": "nin_shortcut"}


def vqgan(checkpoint: str | Path) -> Model:
    """``vqgan_*.pt`` of HFAiLab/clip-gen; the sizes are read off the weights."""
    state = read_weights(checkpoint, "model", "encoder.conv_in.weight", PROJECT)
    levels = [resolution_level(blocks) for blocks in resolutions(strip_prefix("encoder.down.", state))]
    first = state["encoder.conv_in.weight"].shape[0]
    codes, discriminator = state["quantizer.embedding.weight"], strip_prefix("discriminator.", state)
    gan = sizes_from_state(discriminator)
    arguments: dict[str, Any] = {
        "autoencoder": {
            "z_channels": codes.shape[1],
            "ch": first,
            "ch_mult": [channels // first for channels, _, _ in levels],
            "num_res_blocks": levels[0][1],
            "resolution": 256,
            "attn_resolutions": [256 >> i for i, (_, _, attention) in enumerate(levels) if attention],
            "norm_eps": 1e-5,
        },
        "quantizer": {"codebook_size": codes.shape[0], "codebook_dim": codes.shape[1]},
        "loss": {"codebook_weight": 0.2, "commitment_weight": 1.0},
        "gan": gan,
    }
    weights: State = {"quantize.embedding.weight": codes}
    for half, sequence in (("encoder", "down"), ("decoder", "up")):
        parts = resolutions(strip_prefix(f"{half}.{sequence}.", state))
        for i, blocks in enumerate(parts if half == "encoder" else reversed(parts)):
            weights |= {f"{half}.{sequence}.{i}.{k}": v for k, v in level_names(blocks, sequence).items()}
        middle = numbered(strip_prefix(f"{half}.mid.", state))
        for name, part in zip(("block_1", "attn_1", "block_2"), middle):
            weights |= {f"{half}.mid.{name}.{k}": v for k, v in block_names(part).items()}
        weights |= {f"{half}.conv_in.{k}": v for k, v in strip_prefix(f"{half}.conv_in.", state).items()}
        for number, name in (("0", "norm_out"), ("2", "conv_out")):
            weights |= {f"{half}.{name}.{k}": v for k, v in strip_prefix(f"{half}.final.{number}.", state).items()}
    weights |= {f"quant_conv.{k}": v for k, v in strip_prefix("encoder.final.3.", state).items()}
    weights |= {f"post_quant_conv.{k}": v for k, v in strip_prefix("decoder.quant_conv_in.", state).items()}
    weights |= {f"discriminator.main.{k}": v for k, v in strip_prefix("features.", discriminator).items()}
    last = 2 + 3 * gan.get("num_layers", 0)
    weights |= {f"discriminator.main.{last}.{k}": v for k, v in strip_prefix("head.", discriminator).items()}
    return arguments, weights


def numbered(state: State) -> list[State]:
    """``0.a, 0.b, 1.a, ...`` -> the states of the members of a Sequential."""
    members: dict[int, State] = {}
    for name, tensor in state.items():
        number, _, rest = name.partition(".")
        members.setdefault(int(number), {})[rest] = tensor
    if members and max(members) > len(state) * MAX_GAP:
        raise ValueError(f"its modules must be numbered in a row, got {max(members)}")
    return [members.get(number, {}) for number in range(max(members, default=-1) + 1)]


def resolutions(state: State) -> list[list[State]]:
    """Split the members of a Sequential by resolution; a bare convolution ends a resolution."""
    levels: list[list[State]] = [[]]
    for part in numbered(state):
        levels[-1].append(part)
        if "conv.weight" in part:
            levels.append([])
    return levels


def resolution_level(blocks: list[State]) -> tuple[int, int, bool]:
    """Channels, residual blocks, and whether there is attention, of one resolution."""
    residual = [block for block in blocks if "block.0.weight" in block]
    return residual[-1]["block.6.weight"].shape[0], len(residual), any("attn.in_proj_weight" in b for b in blocks)


def level_names(blocks: list[State], sequence: str) -> State:
    """Rename the blocks of one resolution."""
    named: State = {}
    count = {"block": 0, "attn": 0}
    for block in blocks:
        if "conv.weight" in block:
            named |= {f"{sequence}sample.{name}": tensor for name, tensor in block.items()}
            continue
        kind = "attn" if "attn.in_proj_weight" in block else "block"
        named |= {f"{kind}.{count[kind]}.{name}": tensor for name, tensor in block_names(block).items()}
        count[kind] += 1
    return named


def block_names(block: State) -> State:
    """One residual or attention block, by our names."""
    if "attn.in_proj_weight" not in block:
        return {f"{RESNET[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": v for name, v in block.items()}
    named = {name: tensor for name, tensor in block.items() if name.startswith("norm.")}
    weights = (*block["attn.in_proj_weight"].chunk(3), block["attn.out_proj.weight"])
    biases = (*block["attn.in_proj_bias"].chunk(3), block["attn.out_proj.bias"])
    for name, weight, bias in zip(("q", "k", "v", "proj_out"), weights, biases):
        named |= {f"{name}.weight": weight[:, :, None, None], f"{name}.bias": bias}  # a linear layer is a 1 x 1 kernel
    return named


# -------------------------------------------------------------------------------------------------------- transformer

LAYER = {  # of torch's TransformerEncoderLayer -> of GPT-2
    "norm1": "ln_1",
    "norm2": "ln_2",
    "self_attn.in_proj": "attn.c_attn",
    "self_attn.out_proj": "attn.c_proj",
    "linear1": "mlp.c_fc",
    "linear2": "mlp.c_proj",
}


def transformer(checkpoint: str | Path, n_head: int | None = None) -> Model:
    """``gpt_*.pt``; heads leave no trace in the weights: without ``n_head`` they are 64 wide, as in all its sizes."""
    state = read_weights(checkpoint, "model", "tok_emb.weight", PROJECT)
    codes, width = state["tok_emb.weight"].shape
    clip_dim, blocks = state["cond_proj.weight"].shape[1], numbered(strip_prefix("blocks.", state))
    arguments = dict(
        n_layer=len(blocks),
        n_head=n_head or max(width // 64, 1),
        n_embd=width,
        codebook_size=codes,
        num_tokens=state["pos_emb"].shape[1],
        clip_dim=clip_dim,
        tie_embeddings=False,
        lm_head_bias=True,
        activation="gelu",
    )
    weights = {"wte.weight": state["tok_emb.weight"], "wpe.weight": state["pos_emb"][0]}
    weights |= {f"ln_f.{name}": tensor for name, tensor in strip_prefix("norm.", state).items()}
    for i, block in enumerate(blocks):
        weights |= {f"h.{i}.{name}": tensor for name, tensor in gpt2_names(strip_prefix("encoder.", block)).items()}
    weights = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    weights |= {f"head.{name}": tensor for name, tensor in strip_prefix("head.", state).items()}
    projection = state["cond_proj.weight"]
    # ours scales the embedding first; in the type of the file, so that integers are noticed
    weights["clip_proj.weight"] = (projection / clip_dim**0.5).to(projection.dtype)
    weights["clip_proj.bias"] = state["cond_proj.bias"]
    return arguments, {f"gpt.{name}": tensor for name, tensor in weights.items()}


def gpt2_names(layer: State) -> State:
    """One layer by GPT-2's names, whose matrices are the other way round."""
    named: State = {}
    for name, tensor in layer.items():
        module, _, kind = name.replace("in_proj_", "in_proj.").rpartition(".")
        named[f"{LAYER[module]}.{kind}"] = tensor.T.contiguous() if tensor.ndim == 2 else tensor
    return named
