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
QUANTIZER_TYPES = {"VQModel": "euclidean", "GumbelVQ": "gumbel"}
PARAMS = ("n_embed", "embed_dim")


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
    kind, params, network = read_model(config)
    check_supported(kind, network)
    loss, gan = convert_losses(params)
    return {
        "autoencoder": convert_network(network),
        "quantizer": {
            "codebook_size": params["n_embed"],
            "codebook_dim": params["embed_dim"],
            "type": QUANTIZER_TYPES[kind],
        },
        "loss": loss,
        "gan": gan,
    }


def read_model(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], dict[str, Any]]:
    """Return the class name of the model, its parameters, and its ``ddconfig``; ValueError if a part is missing."""
    try:
        model = config["model"]
        params = model["params"]
        kind = model["target"].split(".")[-1]
        network = dict(params["ddconfig"])
        missing = [f"params.{name}" for name in PARAMS if name not in params]
        missing += [f"ddconfig.{name}" for name in DDCONFIG_SIZES if name not in network]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"not a configuration of a taming-transformers tokenizer: {error!r}") from error
    if missing:
        raise ValueError(f"not a configuration of a taming-transformers tokenizer: it has no {missing[0]}")
    return kind, params, network


def check_supported(kind: str, network: Mapping[str, Any]) -> None:
    """Raise ValueError if the model is another one than a VQModel or GumbelVQ of RGB images."""
    for name, value, possible in (
        ("target", kind, tuple(QUANTIZER_TYPES)),
        ("double_z", network.get("double_z", False), (False,)),
        ("in_channels", network.get("in_channels", 3), (3,)),
        ("out_ch", network.get("out_ch", 3), (3,)),
    ):
        if value not in possible:
            raise ValueError(f"{name} must be {' or '.join(map(str, possible))} in taming's configuration, got {value}")


def convert_network(network: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``AutoencoderConfig`` for a ``ddconfig``."""
    sizes = {name: network[name] for name in DDCONFIG_SIZES}
    optional = {name: network.get(name, default) for name, default in DDCONFIG_DEFAULTS.items()}
    return sizes | optional


def convert_losses(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of ``LossConfig`` and of ``GANConfig`` for the parameters of a model."""
    try:
        loss = dict((params.get("lossconfig") or {}).get("params") or {})
        gan_loss = GAN_LOSSES[loss.get("disc_loss", "hinge")]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        ways = " or ".join(GAN_LOSSES)
        raise ValueError(f"taming's lossconfig must have params whose disc_loss is {ways}, got {error!r}") from error
    weights = {
        "kl_weight": params.get("kl_weight", 1e-8),
        "codebook_weight": 0.25 * loss.get("codebook_weight", 1.0),
        "commitment_weight": loss.get("codebook_weight", 1.0),
        "perceptual_weight": loss.get("perceptual_weight", 1.0),
    }
    gan = {
        "weight": loss.get("disc_weight", 1.0),
        "start_step": loss.get("disc_start", 0),
        "loss": gan_loss,
    }
    return weights, gan
