"""Convert published tokenizers of CompVis/taming-transformers to constructor arguments and weights of ``VQGAN``.

The weights are returned as a model folder stores them: the tokenizer's under taming's names, the others with the
prefixes ``discriminator.`` and ``lpips.``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipgen.checkpoint.model_folder import ModelContent
from clipgen.checkpoint.safe_load import add_prefix, read_weights, strip_prefix
from clipgen.models.discriminator import sizes_from_state
from clipgen.storage.files import read_mapping

TOKENIZER_PREFIXES = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
DDCONFIG_SIZES = ("ch", "num_res_blocks", "attn_resolutions", "resolution", "z_channels")
DDCONFIG_DEFAULTS = {"ch_mult": [1, 2, 4, 8], "resamp_with_conv": True, "dropout": 0.0}  # used if ddconfig omits them
GAN_LOSSES = {"hinge": "hinge", "vanilla": "log"}


def convert_vqgan(checkpoint: str | Path, config: str | Path | Mapping[str, Any]) -> ModelContent:
    """Convert a VQModel or GumbelVQ: ``last.ckpt`` and its ``model.yaml``, or the parsed configuration."""
    if not isinstance(config, Mapping):
        config = read_mapping(Path(config).expanduser())
    state = read_weights(checkpoint, "state_dict", "encoder.conv_in.weight", "taming-transformers")
    weights = {k: v for k, v in state.items() if k.startswith(TOKENIZER_PREFIXES)}
    discriminator = strip_prefix("loss.discriminator.main.", state)
    # A discriminator with ActNorm instead of batch norm is not supported.
    if any(name.endswith(".loc") for name in discriminator):
        discriminator = {}
    weights |= add_prefix("discriminator.main.", discriminator)
    weights |= {f"lpips.{k}": v for k, v in strip_prefix("loss.perceptual_loss.", state).items() if "scaling" not in k}
    arguments = convert_config(config)
    arguments["gan"] |= sizes_from_state(discriminator)
    return arguments, weights


def convert_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments of ``VQGAN`` for a configuration of taming-transformers.

    Raises:
        ValueError: it is incomplete, or describes another model than a VQModel or GumbelVQ of RGB images.
    """
    try:
        model, params = config["model"], config["model"]["params"]
        kind, net = model["target"].split(".")[-1], dict(params["ddconfig"])
        quantizer = dict(codebook_size=params["n_embed"], codebook_dim=params["embed_dim"])
        autoencoder = {name: net[name] for name in DDCONFIG_SIZES}
        autoencoder |= {name: net.get(name, value) for name, value in DDCONFIG_DEFAULTS.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a configuration of a taming-transformers tokenizer: {error!r}") from error
    kinds = {"VQModel": "euclidean", "GumbelVQ": "gumbel"}
    for name, value, possible in (
        ("target", kind, kinds),
        ("double_z", net.get("double_z", False), (False,)),
        ("in_channels", net.get("in_channels", 3), (3,)),
        ("out_ch", net.get("out_ch", 3), (3,)),
    ):
        if value not in possible:
            raise ValueError(f"{name} must be {' or '.join(map(str, possible))} in taming's configuration, got {value}")
    try:
        loss = dict((params.get("lossconfig") or {}).get("params") or {})
        gan_loss = GAN_LOSSES[loss.get("disc_loss", "hinge")]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        ways = " or ".join(GAN_LOSSES)
        raise ValueError(f"taming's lossconfig must have params whose disc_loss is {ways}, got {error!r}") from error
    return {
        "autoencoder": autoencoder,
        "quantizer": quantizer | {"type": kinds[kind]},
        "loss": {
            "kl_weight": params.get("kl_weight", 1e-8),
            "codebook_weight": 0.25 * loss.get("codebook_weight", 1.0),
            "commitment_weight": loss.get("codebook_weight", 1.0),
            "perceptual_weight": loss.get("perceptual_weight", 1.0),
        },
        "gan": {
            "weight": loss.get("disc_weight", 1.0),
            "start_step": loss.get("disc_start", 0),
            "loss": gan_loss,
        },
    }
