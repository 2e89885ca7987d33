"""The model that a configuration asks for, with the weights that it starts from and the frozen pair that it needs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig

from clipgen.cli.config import check_types, make, make_plain
from clipgen.cli.early_checks import is_encoded
from clipgen.data.token_cache import class_names, read_manifest
from clipgen.files import read_json
from clipgen.models.config import model_settings
from clipgen.precompute import clip_identity, saved_identity
from clipgen.run_folder import load_clip
from clipgen.vqgan import VQGAN

logger = logging.getLogger(__name__)


def build(config: DictConfig) -> pl.LightningModule:
    """The model to train, with the weights that it starts from."""
    if config.stage_name == "vqgan":
        return make(config.model) if config.init_from is None else build_from(config)
    model = build_encoded(config) if is_encoded(config) else build_online(config)
    if config.init_from_gpt2 is not None and config.resume is None:
        model.init_from_gpt2(config.init_from_gpt2)
    return model


def build_from(config: DictConfig) -> pl.LightningModule:
    """Return a VQGAN with the network and weights of ``init_from``, to be trained as configured."""
    source = VQGAN.load(config.init_from)
    model = make_plain(config.model)
    quantizer = model_settings(source.quantizer_config) | {"kmeans_iters": 0}
    gan = {name: source.hparams["gan"][name] for name in ("channels", "num_layers")}
    return make(
        config.model,
        autoencoder=model["autoencoder"] | model_settings(source.autoencoder_config),
        quantizer=model["quantizer"] | quantizer,
        gan=model["gan"] | gan,
    ).init_from(source)


def build_online(config: DictConfig) -> Any:
    """The transformer with its frozen pair, whose sizes fill what the configuration leaves open."""
    vqgan = VQGAN.load(config.vqgan)
    warn_of_size(vqgan, config.data.image_size)
    clip = make(config.clip)
    sizes = {
        "codebook_size": vqgan.codebook_size,
        "num_tokens": (config.data.image_size // vqgan.downsampling) ** 2,
        "clip_dim": clip.embed_dim,
    }
    return make(config.model, **left_open(config, sizes)).attach_encoders(vqgan, clip)


def warn_of_size(vqgan: VQGAN, image_size: int) -> None:
    """Any size divisible by f works; another than in stage 1 is more often forgotten than wanted."""
    trained = vqgan.autoencoder_config.resolution
    if image_size != trained:
        sizes = [f"{size} ({(size // vqgan.downsampling) ** 2} indices an image)" for size in (trained, image_size)]
        logger.warning("The tokenizer was trained at data.image_size=%s, and is used at %s.", *sizes)


def left_open(config: DictConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that the configuration of the model does not name itself."""
    return {name: size for name, size in sizes.items() if config.model[name] is None}


def build_encoded(config: DictConfig) -> Any:
    """The transformer for a cache, whose tokenizer and CLIP must be the run's; only the CLIP loss needs them loaded."""
    root = Path(config.data.root).expanduser()
    manifest = read_manifest(root)
    if saved_identity(config.vqgan) != manifest["vqgan"]:
        raise ValueError(f"the encoded cache {root} was made with another tokenizer than {config.vqgan}")
    if clip_identity(config.clip.model_name, config.clip.pretrained) != manifest["clip"]:
        used = f"{config.clip.model_name} {config.clip.pretrained or ''}".strip()
        made = " ".join(filter(None, read_json(root / "clip.json").values()))
        raise ValueError(
            f"the encoded cache {root} was made with the CLIP {made}, not with {used}: name it by clip.model_name and "
            "clip.pretrained"
        )
    sizes = {name: manifest[name] for name in ("codebook_size", "num_tokens", "clip_dim")}
    if config.data.conditioning == "class":
        return build_labels(config, sizes, class_names(manifest, root))
    model = make(config.model, **left_open(config, sizes))
    if config.model.clip_loss.weight > 0:
        model.attach_encoders(VQGAN.load(root), load_clip(root))
    return model


def build_labels(config: DictConfig, sizes: dict[str, Any], names: list[str]) -> pl.LightningModule:
    """The transformer that is given an image's class instead of its CLIP embedding."""
    given = left_open(config, sizes | {"clip_dim": len(names)}) | {"class_names": names}
    check_types(config.model, given)  # as of the transformer, whose arguments it takes
    config.model._target_ = "clipgen.baselines.class_conditional.ClassConditionalTransformer"
    return make(config.model, **given)
