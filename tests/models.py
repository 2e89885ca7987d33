"""Tiny models for the tests, configured by flat keyword arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from clipgen.baselines.class_conditional import ClassConditionalTransformer
from clipgen.models.config import (
    AutoencoderConfig,
    ClipLossConfig,
    ConditioningConfig,
    GANConfig,
    GPTConfig,
    LossConfig,
    OptimizerConfig,
    QuantizerConfig,
    TransformerOptimizerConfig,
)
from clipgen.transformer import ConditionalTransformer
from clipgen.vqgan import VQGAN

# Section of the configuration -> (dataclass, prefix of its fields in the flat names)
VQGAN_SECTIONS: dict[str, tuple[Any, str]] = {
    "autoencoder": (AutoencoderConfig, ""),
    "quantizer": (QuantizerConfig, "quantizer_"),
    "loss": (LossConfig, ""),
    "gan": (GANConfig, "gan_"),
    "optimizer": (OptimizerConfig, ""),
}
TRANSFORMER_SECTIONS: dict[str, tuple[Any, str]] = {
    "": (GPTConfig, ""),
    "conditioning": (ConditioningConfig, "cond_"),
    "clip_loss": (ClipLossConfig, "clip_loss_"),
    "optimizer": (TransformerOptimizerConfig, "optimizer_"),
}

VQGAN_SIZES: dict[str, Any] = dict(
    codebook_size=16,
    codebook_dim=8,
    quantizer_type="cosine",
    dead_code_reset_after=5,
    ch=32,
    ch_mult=[1, 1],
    num_res_blocks=1,
    attn_resolutions=[],
    resolution=32,
    z_channels=32,
    patch_size=4,
    perceptual_weight=0.0,
    gan_weight=0.0,
    gan_channels=8,
    gan_num_layers=1,
    learning_rate=1e-3,
)
TRANSFORMER_SIZES: dict[str, Any] = dict(
    n_layer=2,
    n_head=2,
    n_embd=32,
    codebook_size=16,
    num_tokens=16,
    clip_dim=64,
    cond_drop_prob=0.1,
    learning_rate=1e-3,
)


def nested(sections: dict[str, tuple[Any, str]], flat: dict[str, Any]) -> dict[str, Any]:
    """Distribute flat settings to sections, e.g. ``gan_weight`` -> ``{"gan": {"weight": ...}}``."""
    arguments: dict[str, Any] = {}
    for name, value in flat.items():
        section, field = find_field(sections, name)
        target = arguments.setdefault(section, {}) if section else arguments
        target[field] = value
    return arguments


def find_field(sections: dict[str, tuple[Any, str]], name: str) -> tuple[str, str]:
    """Return section and field of a flat name; prefixed names come first, unknown names are top-level arguments."""
    for section, (config_class, prefix) in sections.items():
        names = [f.name for f in fields(config_class)]
        if prefix and name.startswith(prefix) and name.removeprefix(prefix) in names:
            return section, name.removeprefix(prefix)
    for section, (config_class, _) in sections.items():
        if name in [f.name for f in fields(config_class)]:
            return section, name
    return "", name


def make_vqgan(**flat: Any) -> VQGAN:
    """Return a VQGAN from flat settings."""
    return VQGAN(**nested(VQGAN_SECTIONS, flat))


def make_transformer(**flat: Any) -> ConditionalTransformer:
    """Return a transformer from flat settings."""
    return ConditionalTransformer(**nested(TRANSFORMER_SECTIONS, flat))


def make_class_transformer(class_names: Sequence[str], **flat: Any) -> ClassConditionalTransformer:
    """Return a class-conditional transformer from flat settings."""
    return ClassConditionalTransformer(class_names=class_names, **nested(TRANSFORMER_SECTIONS, flat))
