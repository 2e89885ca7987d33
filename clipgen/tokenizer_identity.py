"""The identity of a tokenizer, which binds token caches and transformers to the codes that they were made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipgen.checkpoint import model_folder
from clipgen.checkpoint.safe_load import State, strip_prefix
from clipgen.models.config import AutoencoderConfig, QuantizerConfig, as_config, model_settings
from clipgen.storage.files import read_json, write_json
from clipgen.vqgan import OPTIONAL_PARTS, VQGAN


def record_tokenizer(transformer: Path, vqgan: Path) -> None:
    """Record in the folder of a transformer which tokenizer its indices belong to."""
    config = read_json(transformer / "config.json")
    write_json(transformer / "config.json", config | {"vqgan": saved_identity(vqgan)})


def check_tokenizer(transformer: Path, vqgan: VQGAN) -> None:
    """Raise ValueError if a transformer was trained with another tokenizer."""
    if not (transformer / "config.json").is_file():  # a checkpoint
        return
    bound = read_json(transformer / "config.json").get("vqgan")
    if bound is not None and bound != vqgan_identity(vqgan):
        raise ValueError(
            f"{transformer} was trained with another tokenizer than the one next to it: the folders were mixed up, "
            "or a save was interrupted; save or copy the whole pipeline again"
        )


def vqgan_identity(vqgan: VQGAN) -> str:
    """Return a hash of all that determines a tokenizer's indices, the same for every file that contains it."""
    return identity(vqgan.hparams, vqgan.active_model.state_dict())


def saved_identity(path: str | Path) -> str:
    """Return the ``vqgan_identity`` of a file or folder, without building the network."""
    arguments, state = model_folder.load_arguments_and_state(path, "VQGAN")
    prefix = ""
    for candidate in ("autoencoder.", "ema.module."):  # the EMA weights take precedence
        if any(name.startswith(candidate) for name in state):
            prefix = candidate
    tokenizer = strip_prefix(prefix, state)
    return identity(arguments, {k: v for k, v in tokenizer.items() if not k.startswith(OPTIONAL_PARTS)})


def identity(arguments: Mapping[str, Any], state: State) -> str:
    """Return a hash of a tokenizer's configuration and weights, without its usage counters."""
    kept = {name: tensor for name, tensor in state.items() if name != "quantize.batches_since_use"}
    settings = {
        "autoencoder": model_settings(as_config(AutoencoderConfig, arguments.get("autoencoder"))),
        "quantizer": model_settings(as_config(QuantizerConfig, arguments.get("quantizer"))),
    }
    text = json.dumps(settings) + model_folder.fingerprint(kept)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
