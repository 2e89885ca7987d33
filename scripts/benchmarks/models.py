"""Sizes and variants of the models that are measured."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch

from clipgen import VQGAN, FrozenCLIP
from clipgen.storage.files import write_json

Settings = dict[str, Any]  # arguments of a model, nested as in the configuration

CIFAR_VQGAN: Settings = {
    "autoencoder": {
        "ch": 96,
        "ch_mult": [1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "resolution": 32,
        "z_channels": 96,
        "patch_size": 4,
        "mid_attention": False,
    },
    "quantizer": {"type": "cosine", "codebook_size": 1024, "codebook_dim": 32},
    "loss": {"perceptual_weight": 0.0},
    "gan": {"channels": 32, "num_layers": 2},
}
VQGAN_SIZES: dict[str, Settings] = {"cifar": CIFAR_VQGAN, "paper": {}}  # the defaults are the published sizes
SMALL_IMAGES: Settings = {"codebook_size": 1024, "num_tokens": 64, "clip_dim": 64}  # 32 x 32 pixels
TRANSFORMER_SIZES: dict[str, Settings] = {
    "demo": {"n_layer": 4, "n_head": 4, "n_embd": 128, **SMALL_IMAGES},
    "cifar": {"n_layer": 4, "n_head": 6, "n_embd": 192, **SMALL_IMAGES},
    "medium": {},  # the paper's for COCO
}

# Variants of both stages; ``precision`` is the trainer's, everything else an argument of the model.
COMMON_VARIANTS: dict[str, Settings] = {
    "plain": {},
    "bf16": {"precision": "bf16-mixed"},
    "compile": {"compile": True},
    "ema": {"optimizer": {"ema_decay": 0.999}},
}
VARIANTS: dict[str, dict[str, Settings]] = {
    "vqgan": {
        **COMMON_VARIANTS,
        "channels_last": {"channels_last": True},
        "checkpointing": {"autoencoder": {"grad_checkpointing": True}},
        "lecam": {"gan": {"lecam_weight": 0.1}},
        "without_discriminator": {"gan": {"weight": 0.0}},
    },
    "transformer": {
        **COMMON_VARIANTS,
        "checkpointing": {"grad_checkpointing": True},
        "muon": {"optimizer": {"name": "muon"}},
        "clip_loss": {"clip_loss": {"weight": 0.2}},
        "every_4": {"clip_loss": {"interval": 4}},
        "quarter": {"clip_loss": {"batch_fraction": 0.25}},
    },
}


def merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> Settings:
    """Return nested settings with those of ``update`` replaced or added."""
    merged = dict(base)
    for key, value in update.items():
        merged[key] = merge(merged.get(key, {}), value) if isinstance(value, Mapping) else value
    return merged


def settings_of(part: str, size: Settings, variant: str) -> tuple[Settings, str]:
    """Return the model's arguments and the trainer's precision for a variant such as ``bf16+compile``."""
    settings = dict(size)
    for name in variant.split("+"):
        settings = merge(settings, VARIANTS[part][name])
    precision = settings.pop("precision", "32-true")
    return settings, precision


def paper_tokenizer(codebook_size: int = 16384) -> VQGAN:
    """Return a tokenizer of the paper's size with random weights."""
    return VQGAN(quantizer={"codebook_size": codebook_size}, loss={"perceptual_weight": 0.0}).eval()


def make_clip(name: str) -> FrozenCLIP:
    """Return the bundled CLIP, or a published architecture with random weights, which are equally fast."""
    if name == "shapes":
        return FrozenCLIP(name)
    model = open_clip.create_model(name)
    config = {
        "model_cfg": open_clip.get_model_config(name),
        "preprocess_cfg": open_clip.get_model_preprocess_cfg(model),
    }
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "open_clip_config.json", config)
        torch.save(model.state_dict(), Path(folder) / "open_clip_pytorch_model.bin")
        return FrozenCLIP(folder)
