"""Allowed keys and values of an untrusted ``open_clip_config.json``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Rule = tuple[str, Callable[[Any], bool]]  # what a value must be, in words, and as a function


def whole_number(low: int, high: int) -> Rule:
    """Allow an integer."""
    return f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high


def number(low: float, high: float) -> Rule:
    """Allow a finite number."""
    return f"a number from {low} to {high}", lambda value: type(value) in (int, float) and low <= value <= high


def one_of(*choices: str) -> Rule:
    """Allow some words."""
    return f"one of {', '.join(map(repr, choices))}", lambda value: isinstance(value, str) and value in choices


def list_of(length: int, rule: Rule) -> Rule:
    """Allow a list of a fixed length."""

    def is_allowed(value: Any) -> bool:
        return isinstance(value, list) and len(value) == length and all(map(rule[1], value))

    return f"a list of {length}, each {rule[0]}", is_allowed


def either(first: Rule, second: Rule) -> Rule:
    """Allow what one of two rules allows."""
    return f"{first[0]} or {second[0]}", lambda value: first[1](value) or second[1](value)


def object_of(rules: Mapping[str, Rule]) -> Rule:
    """Allow an object with some keys."""

    def is_allowed(value: Any) -> bool:
        return isinstance(value, dict) and all(key in rules and rules[key][1](value[key]) for key in value)

    return f"an object with no other keys than {', '.join(rules)}", is_allowed


def is_timm_model(value: Any) -> bool:
    """Return whether timm has a network of this name; names of folders or of the hub are refused."""
    if not isinstance(value, str) or not re.fullmatch(r"[\w.]{1,80}", value):
        return False
    import timm

    return bool(timm.is_model(value))


BOOLEAN: Rule = ("true or false", lambda value: isinstance(value, bool))
NULL: Rule = ("null", lambda value: value is None)
ANYTHING: Rule = ("anything", lambda value: True)
WIDTH = whole_number(1, 16384)
LAYERS = whole_number(1, 256)
PIXELS = whole_number(1, 2048)
SCALE = either(number(0, 100), NULL)
EPS = either(object_of({"eps": number(0, 1)}), NULL)
ACTIVATION = either(object_of({"approximate": one_of("tanh", "none")}), NULL)
BLOCK: dict[str, Rule] = {
    "block_type": either(one_of("default", "custom"), NULL),
    "qk_norm": BOOLEAN,
    "scaled_cosine_attn": BOOLEAN,
    "scale_heads": BOOLEAN,
    "scale_attn_inner": BOOLEAN,
    "scale_attn": BOOLEAN,
    "scale_fc": BOOLEAN,
    "width": WIDTH,
    "mlp_ratio": number(0.01, 64),
    "ls_init_value": SCALE,
    "final_ln_after_pool": BOOLEAN,
    "output_tokens": BOOLEAN,
    "act_kwargs": ACTIVATION,
    "norm_kwargs": EPS,
}
VISION: dict[str, Rule] = BLOCK | {
    "layers": either(LAYERS, list_of(4, LAYERS)),
    "head_width": whole_number(1, 4096),
    "patch_size": either(PIXELS, NULL),
    "image_size": either(PIXELS, list_of(2, PIXELS)),
    "patch_dropout": number(0, 1),
    "attentional_pool": BOOLEAN,
    "attn_pooler_queries": whole_number(1, 4096),
    "attn_pooler_heads": whole_number(1, 256),
    "no_ln_pre": BOOLEAN,
    "pos_embed_type": one_of("learnable"),
    "pool_type": one_of("tok", "avg", "none"),
    "timm_model_name": either(("the name of a network that timm has", is_timm_model), NULL),
    "timm_model_pretrained": ANYTHING,  # never used
    "timm_pool": one_of("", "avg", "avgmax", "max", "token", "map", "abs_attn", "rot_attn"),
    "timm_proj": either(one_of("linear", "mlp", "none", ""), NULL),
    "timm_proj_bias": BOOLEAN,
    "timm_drop": number(0, 1),
    "timm_drop_path": either(number(0, 1), NULL),
}
TOKENIZER_OPTIONS: dict[str, Rule] = {
    "clean": one_of("canonicalize", "lower", "whitespace"),
    "strip_sep_token": BOOLEAN,
    "language": ("a short word", lambda value: isinstance(value, str) and re.fullmatch(r"\w{1,20}", value) is not None),
}
TEXT: dict[str, Rule] = BLOCK | {
    "context_length": whole_number(2, 4096),
    "vocab_size": whole_number(1, 2_000_000),
    # Says only that there is one.
    "hf_tokenizer_name": ("a text", lambda value: value is None or isinstance(value, str)),
    "tokenizer_mode": either(one_of("clips", ""), NULL),
    "tokenizer_kwargs": either(object_of(TOKENIZER_OPTIONS), NULL),
    "heads": whole_number(1, 256),
    "layers": LAYERS,
    "embed_cls": BOOLEAN,
    "pad_id": whole_number(0, 2_000_000),
    "eos_id": whole_number(0, 2_000_000),
    "no_causal_mask": BOOLEAN,
    "pool_type": one_of("first", "last", "argmax", "eos", "none"),
    "proj_bias": BOOLEAN,
    "proj_type": either(one_of("linear", "none"), NULL),
    "hf_model_name": NULL,
    "hf_model_pretrained": ANYTHING,
    "hf_proj_type": ANYTHING,
    "hf_pooler_type": ANYTHING,
}
MULTIMODAL: dict[str, Rule] = TEXT | {
    "dim_head": whole_number(1, 4096),
    "n_queries": whole_number(1, 4096),
    "attn_pooler_heads": whole_number(1, 256),
}
MODEL: dict[str, Rule] = {
    "embed_dim": WIDTH,
    "quick_gelu": BOOLEAN,
    "custom_text": BOOLEAN,
    "init_logit_scale": number(-100, 100),
    "init_logit_bias": either(number(-100, 100), NULL),
    "nonscalar_logit_scale": BOOLEAN,
}
CHANNELS = list_of(3, number(-10, 10))
PREPROCESSING: dict[str, Rule] = {
    "size": VISION["image_size"],
    "mode": one_of("RGB"),
    "mean": CHANNELS,
    "std": list_of(3, number(1e-3, 10)),
    "interpolation": one_of("bicubic", "bilinear", "random"),
    "resize_mode": one_of("shortest", "longest", "squash"),
    "fill_color": either(whole_number(0, 255), list_of(3, whole_number(0, 255))),
}


def check_rules(path: Path, place: str, values: Any, rules: Mapping[str, Rule]) -> None:
    """Raise ValueError if a settings file contains a key or a value that is not allowed."""
    if not isinstance(values, dict):
        raise ValueError(f"{place} of {path} must be an object, got {abbreviate(values)}")
    for key, value in values.items():
        if key not in rules:
            raise ValueError(
                f"{place} of {path} must not contain {abbreviate(key)}: clipgen does not know it, or it is not safe"
            )
        wanted, allowed = rules[key]
        if not allowed(value):
            raise ValueError(f"{place}.{key} of {path} must be {wanted}, got {abbreviate(value)}")


def abbreviate(value: Any) -> str:
    """Return a value for a message, short and without control characters."""
    return repr(value)[:80]
