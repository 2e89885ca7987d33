"""Build the model of a training run, with its initial weights and, in stage 2, the frozen VQ-GAN and CLIP."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from clipgen.data.token_cache import class_names_of, read_manifest
from clipgen.frozen_models import load_clip
from clipgen.models.config import AutoencoderConfig, QuantizerConfig, as_config, model_settings
from clipgen.precompute import clip_identity
from clipgen.runs import checkpoint_path
from clipgen.storage.files import read_json
from clipgen.tokenizer_identity import saved_identity
from clipgen.training.config import TrainingConfig
from clipgen.training.instantiate import find_target, instantiate
from clipgen.training.resume import read_training_state
from clipgen.type_checks import check_values, parameter_hints
from clipgen.vqgan import VQGAN

logger = logging.getLogger(__name__)
CLASS_CONDITIONAL = "clipgen.baselines.class_conditional.ClassConditionalTransformer"


def build(config: TrainingConfig) -> Any:
    """Return the model to train, with its initial weights."""
    if config.stage_name == "vqgan":
        return build_tokenizer(config)
    model = build_for_cache(config) if config.uses_token_cache else build_for_images(config)
    if config.init_from_gpt2 is not None and config.resume is None:
        model.init_from_gpt2(config.init_from_gpt2)
    return model


def build_tokenizer(config: TrainingConfig) -> pl.LightningModule:
    """Return a VQGAN, with the network and weights of ``config.init_from`` if that is set."""
    if config.init_from is None:
        return instantiate(config.model, "model")
    if config.resume is None:
        source = VQGAN.load(config.init_from)
        return build_like(config, source.hparams).init_from(source)
    path = checkpoint_path(config.resume)
    model = build_like(config, read_training_state(path, "VQGAN")["hyper_parameters"])
    if model.loss_config.perceptual_weight > 0:
        share_lpips(model, config.init_from)
    return model


def build_like(config: TrainingConfig, hyper_parameters: Mapping[str, Any]) -> VQGAN:
    """Return a VQGAN with the network of another one, to be trained as configured."""
    autoencoder = as_config(AutoencoderConfig, hyper_parameters["autoencoder"])
    quantizer = as_config(QuantizerConfig, hyper_parameters["quantizer"])
    gan = hyper_parameters["gan"]
    sections = {
        "autoencoder": model_settings(autoencoder),
        # The codebook is trained: k-means would replace it.
        "quantizer": model_settings(quantizer) | {"kmeans_iters": 0},
        "gan": {name: gan[name] for name in ("channels", "num_layers")},
    }
    merged = {name: config.model.get(name, {}) | values for name, values in sections.items()}
    return instantiate(config.model, "model", **merged)


def share_lpips(model: VQGAN, init_from: str) -> None:
    """Use the LPIPS of the tokenizer that a resumed run began from, whose weights the checkpoint does not contain."""
    try:
        model.share_lpips(VQGAN.load(init_from))
    except FileNotFoundError:
        logger.warning(
            "init_from=%s does not exist any more: the run resumes with the weights of its checkpoint, and with the "
            "LPIPS of model.loss.vgg_weights or, by default, the published one.",
            init_from,
        )


def build_for_images(config: TrainingConfig) -> Any:
    """Return a transformer that encodes images with its frozen VQ-GAN and CLIP while it trains.

    Raises:
        ValueError: no tokenizer is configured, or the model does not fit the tokenizer and the CLIP.
        FileNotFoundError: the tokenizer or the CLIP does not exist.
    """
    if config.vqgan is None:
        raise ValueError("vqgan must name a trained tokenizer for stage 2, got None")
    vqgan = VQGAN.load(config.vqgan)
    image_size = config.data.get("image_size", vqgan.autoencoder_config.resolution)
    warn_of_image_size(vqgan, image_size)
    clip = instantiate(config.clip, "clip")
    sizes = {
        "codebook_size": vqgan.codebook_size,
        "num_tokens": (image_size // vqgan.downsampling) ** 2,
        "clip_dim": clip.embed_dim,
    }
    model = instantiate(config.model, "model", **unset_values(config, sizes))
    return model.attach_encoders(vqgan, clip)


def warn_of_image_size(vqgan: VQGAN, image_size: int) -> None:
    """Warn if the image size differs from stage 1: this is valid, but usually a mistake."""
    trained_size = vqgan.autoencoder_config.resolution
    if image_size == trained_size:
        return
    logger.warning(
        "The tokenizer was trained at data.image_size=%d (%d tokens per image), and is used at %d (%d tokens).",
        trained_size,
        (trained_size // vqgan.downsampling) ** 2,
        image_size,
        (image_size // vqgan.downsampling) ** 2,
    )


def unset_values(config: TrainingConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Return those of the values that the ``model`` section does not set itself."""
    return {name: value for name, value in values.items() if config.model.get(name) is None}


def build_for_cache(config: TrainingConfig) -> Any:
    """Return a transformer for a token cache; VQ-GAN and CLIP are loaded only if the CLIP loss needs them.

    Raises:
        ValueError: the cache was made with another tokenizer or another CLIP.
    """
    root = Path(config.data["root"]).expanduser()
    manifest = read_manifest(root)
    check_cache(config, root, manifest)
    sizes = {name: manifest[name] for name in ("codebook_size", "num_tokens", "clip_dim")}
    if config.data.get("conditioning") == "class":
        return build_class_conditional(config, sizes, class_names_of(manifest, root))
    model = instantiate(config.model, "model", **unset_values(config, sizes))
    if config.model.get("clip_loss", {}).get("weight", 0) > 0:
        model.attach_encoders(VQGAN.load(root), load_clip(root))
    return model


def check_cache(config: TrainingConfig, root: Path, manifest: dict[str, Any]) -> None:
    """Raise ValueError unless a token cache was made with the configured tokenizer and CLIP."""
    if saved_identity(config.vqgan or root) != manifest["vqgan"]:
        raise ValueError(f"the token cache {root} was made with another tokenizer than {config.vqgan}")
    model_name = config.clip["model_name"]
    pretrained = config.clip.get("pretrained")
    if clip_identity(model_name, pretrained) != manifest["clip"]:
        configured = f"{model_name} {pretrained or ''}".strip()
        recorded = " ".join(filter(None, read_json(root / "clip.json").values()))
        raise ValueError(
            f"the token cache {root} was made with the CLIP {recorded}, not with {configured}: set clip.model_name "
            "and clip.pretrained to it"
        )


def build_class_conditional(config: TrainingConfig, sizes: dict[str, Any], names: list[str]) -> pl.LightningModule:
    """Return a transformer that is conditioned on the class of an image instead of its CLIP embedding."""
    overrides = unset_values(config, sizes | {"clip_dim": len(names)}) | {"class_names": names}
    settings = {name: value for name, value in config.model.items() if name != "_target_" and name not in overrides}
    # The class-conditional transformer passes its arguments on, so its own signature does not name their types.
    check_values(settings, parameter_hints(find_target(config.model["_target_"])), "model.")
    return instantiate(config.model | {"_target_": CLASS_CONDITIONAL}, "model", **overrides)
