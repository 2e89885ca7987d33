"""Other projects' published tokenizers: their checkpoints -> arguments and weights of ours.

The weights come out as a model folder holds them: the tokenizer's by its own names, ``discriminator.``, ``lpips.``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from clipgen.weights.checkpoint import State, read_checkpoint

Model = tuple[dict[str, Any], State]


def section(checkpoint: dict[str, Any], key: str, path: str | Path, project: str) -> State:
    """The weights under ``key``, or of a file that holds nothing else."""
    state = checkpoint.get(key, checkpoint)
    if not isinstance(state, dict) or not any(name.startswith("encoder.conv_in.") for name in state):
        raise ValueError(f"{path} is no checkpoint of {project}: there is no encoder.conv_in in it")
    return state


def below(prefix: str, state: State) -> State:
    """Tensors whose names begin with ``prefix``, which is taken off."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


# ------------------------------------------------------------------------------------------- taming-transformers

TOKENIZER = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
ADVERSARIAL = {"hinge": "hinge", "vanilla": "log"}


def taming(checkpoint: str | Path, config: str | Path | Mapping[str, Any]) -> Model:
    """VQModel and GumbelVQ of CompVis/taming-transformers: ``last.ckpt`` and its ``model.yaml``."""
    if not isinstance(config, Mapping):
        config = read_yaml(Path(config).expanduser())
    state = section(read_checkpoint(checkpoint), "state_dict", checkpoint, "taming-transformers")
    weights = {k: v for k, v in state.items() if k.startswith(TOKENIZER)}
    discriminator = below("loss.discriminator.main.", state)
    if any(name.endswith(".loc") for name in discriminator):  # ActNorm in the place of batch norm: not ours
        discriminator = {}
    weights |= {f"discriminator.main.{k}": v for k, v in discriminator.items()}
    weights |= {f"lpips.{k}": v for k, v in below("loss.perceptual_loss.", state).items() if "scaling" not in k}
    return taming_arguments(config) | discriminator_sizes(discriminator), weights


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no configuration of taming-transformers: there is no model.params in it")
    return found


def taming_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor's arguments of ``VQGAN`` from taming's configuration.

    Raises:
        ValueError: it is incomplete, or of a model that is not a VQModel or GumbelVQ of RGB images.
    """
    try:
        model, params = config["model"], config["model"]["params"]
        kind, net = model["target"].split(".")[-1], dict(params["ddconfig"])
        sizes = dict(codebook_size=params["n_embed"], codebook_dim=params["embed_dim"])
        sizes |= {
            k: net[k] for k in ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution", "z_channels")
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the configuration is none of taming-transformers' tokenizers: {error!r}") from error
    kinds = {"VQModel": "euclidean", "GumbelVQ": "gumbel"}
    for name, value, possible in (("target", kind, kinds), ("double_z", net.get("double_z", False), (False,)),
                                  ("in_channels", net.get("in_channels", 3), (3,)),
                                  ("out_ch", net.get("out_ch", 3), (3,))):  # fmt: skip
        if value not in possible:
            raise ValueError(f"{name} must be {' or '.join(map(str, possible))} in taming's configuration, got {value}")
    loss = (params.get("lossconfig") or {}).get("params") or {}
    return sizes | dict(
        quantizer=kinds[kind], dropout=net.get("dropout", 0.0), kl_weight=params.get("kl_weight", 1e-8),
        codebook_weight=0.25 * loss.get("codebook_weight", 1.0), commitment_weight=loss.get("codebook_weight", 1.0),
        perceptual_weight=loss.get("perceptual_weight", 1.0), discriminator_weight=loss.get("disc_weight", 1.0),
        discriminator_start=loss.get("disc_start", 0), adversarial=ADVERSARIAL[loss.get("disc_loss", "hinge")],
    )  # fmt: skip


def discriminator_sizes(state: State) -> dict[str, int]:
    """``ndf`` and ``n_layers`` of a PatchGAN, read off its convolutions; nothing where there is none."""
    kernels = [tensor for tensor in state.values() if tensor.ndim == 4]
    return {"ndf": kernels[0].shape[0], "n_layers": len(kernels) - 2} if kernels else {}


# ---------------------------------------------------------------------------------------------- HFAiLab/clip-gen

RESNET = {"block.0": "norm1", "block.2": "conv1", "block.3": "norm2", "block.6": "conv2", "shortcut": "nin_shortcut"}


def hfailab_vqgan(checkpoint: str | Path) -> Model:
    """``vqgan_*.pt`` of HFAiLab/clip-gen; the sizes are read off the weights."""
    state = section(read_checkpoint(checkpoint), "model", checkpoint, "HFAiLab/clip-gen")
    levels = [resolution_level(blocks) for blocks in resolutions(below("encoder.down.", state))]
    first = state["encoder.conv_in.weight"].shape[0]
    codes, discriminator = state["quantizer.embedding.weight"], below("discriminator.", state)
    patches = discriminator_sizes(discriminator)
    arguments = dict(
        codebook_size=codes.shape[0], codebook_dim=codes.shape[1], z_channels=codes.shape[1], ch=first,
        ch_mult=[channels // first for channels, _, _ in levels], num_res_blocks=levels[0][1], resolution=256,
        attn_resolutions=[256 >> i for i, (_, _, attention) in enumerate(levels) if attention], norm_eps=1e-5,
        codebook_weight=0.2, commitment_weight=1.0, **patches,
    )  # fmt: skip
    weights: State = {"quantize.embedding.weight": codes}
    for half, sequence in (("encoder", "down"), ("decoder", "up")):
        parts = resolutions(below(f"{half}.{sequence}.", state))
        for i, blocks in enumerate(parts if half == "encoder" else reversed(parts)):
            weights |= {f"{half}.{sequence}.{i}.{k}": v for k, v in level_names(blocks, sequence).items()}
        middle = numbered(below(f"{half}.mid.", state))
        for name, part in zip(("block_1", "attn_1", "block_2"), middle):
            weights |= {f"{half}.mid.{name}.{k}": v for k, v in block_names(part).items()}
        weights |= {f"{half}.conv_in.{k}": v for k, v in below(f"{half}.conv_in.", state).items()}
        for number, name in (("0", "norm_out"), ("2", "conv_out")):
            weights |= {f"{half}.{name}.{k}": v for k, v in below(f"{half}.final.{number}.", state).items()}
    weights |= {f"quant_conv.{k}": v for k, v in below("encoder.final.3.", state).items()}
    weights |= {f"post_quant_conv.{k}": v for k, v in below("decoder.quant_conv_in.", state).items()}
    weights |= {f"discriminator.main.{k}": v for k, v in below("features.", discriminator).items()}
    last = 2 + 3 * patches.get("n_layers", 0)
    weights |= {f"discriminator.main.{last}.{k}": v for k, v in below("head.", discriminator).items()}
    return arguments, weights


def numbered(state: State) -> list[State]:
    """``0.a, 0.b, 1.a, ...`` -> the states of the members of a Sequential."""
    count = 1 + max(int(name.split(".")[0]) for name in state)
    return [below(f"{i}.", state) for i in range(count)]


def resolutions(state: State) -> list[list[State]]:
    """The members of a Sequential over all resolutions -> those of each; a bare convolution ends one."""
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
    """The blocks of one resolution, by our names."""
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
