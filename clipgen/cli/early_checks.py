"""Fill in and check a configuration as far as possible without torch, so that errors appear within a second or two."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from clipgen.cli.config import expand_home
from clipgen.cli.model_path import check_model_path
from clipgen.cli.resume_args import find_run, parse_by_key
from clipgen.data.folder_listing import check_holds_images
from clipgen.data.urls import expand_urls
from clipgen.runs import OUTPUTS, checkpoint_path, newest_run
from clipgen.training.config import reads_token_cache

logger = logging.getLogger(__name__)
PATH_KEYS = ("output", "resume", "vqgan", "init_from")
# Keys of ``data`` that apply to a token cache; the experiment may have set those of images.
TOKEN_CACHE_KEYS = ("_target_", "root", "batch_size", "num_workers", "seed", "conditioning")


def complete_training_config(config: DictConfig) -> None:
    """Fill in what follows from the rest of the configuration, and refuse what cannot be trained.

    Raises:
        ValueError, TypeError: a value is missing or is not a path.
        FileNotFoundError: a named file or folder does not exist, or there is no tokenizer yet.
    """
    if reads_token_cache(config.data):
        complete_for_cache(config)
    elif config.stage_name == "transformer" and OmegaConf.is_missing(config, "vqgan"):
        config.vqgan = own_tokenizer(config.resume) or newest_tokenizer()
    require_values(config, f"stage={config.stage_name}")
    OmegaConf.resolve(config)
    expand_home(config)
    for key in PATH_KEYS:
        check_path(key, config.get(key))
    if config.resume is None:
        check_model_path(config.get("init_from"), "VQGAN")
    else:
        checkpoint_path(config.resume)
    check_sources(config.data)
    check_model_path(config.get("vqgan"), "VQGAN")


def require_values(config: DictConfig, command: str) -> None:
    """Raise ValueError if keys without a default have no value."""
    missing = OmegaConf.missing_keys(config)
    if missing:
        names = ", ".join(sorted(missing))
        raise ValueError(f"{command} needs a value for {names}: give {min(missing)}=...")


def check_path(key: str, value: Any) -> None:
    """Raise TypeError if YAML has parsed a path as a number, a list or null."""
    if isinstance(value, str) or (value is None and key != "output"):
        return
    raise TypeError(f"{key} must be a path, got {value!r}: put quotes around it, {key}=\\'...\\'")


def own_tokenizer(resume: Any) -> str | None:
    """Return the run to resume if it contains a copy of its tokenizer."""
    run = find_run(Path(resume).expanduser()) if isinstance(resume, str) else None
    return str(run) if run and (run / "vqgan" / "config.json").is_file() else None


def newest_tokenizer() -> str:
    """Return the stage-1 run below ``outputs/`` that finished last, and log which it is."""
    run = newest_run(OUTPUTS, "vqgan")
    if run is None:
        raise FileNotFoundError(
            "stage=transformer needs a tokenizer: give vqgan=RUN, or train one by `clipgen-train stage=vqgan` "
            f"(there is no finished one below {OUTPUTS}/)"
        )
    logger.info("Tokenizer: %s, the newest finished one below %s/; give vqgan=RUN for another", run, OUTPUTS)
    return run


def check_sources(data: DictConfig) -> None:
    """Raise an error if an image folder or a shard does not exist, or if the folder contains no image."""
    if data._target_.endswith("folder_data"):
        for key in ("root", "val_root"):
            folder = data.get(key)
            if isinstance(folder, str):
                check_holds_images(Path(folder).expanduser(), f"data.{key}")
    if data._target_.endswith("TokenCacheDataModule") and not Path(str(data.root)).expanduser().exists():
        raise FileNotFoundError(f"no token cache in {data.root}; make one with `clipgen-encode output={data.root}`")
    for key in ("train_urls", "val_urls"):
        urls: Any = data.get(key)
        if urls:
            expand_urls(urls if isinstance(urls, str) else list(urls), f"data.{key}")


def complete_for_cache(config: DictConfig) -> None:
    """Take the tokenizer and the data settings from the token cache instead of from the experiment."""
    if OmegaConf.is_missing(config, "vqgan"):
        # None if it is missing, so that `require_values` names only data.root.
        config.vqgan = OmegaConf.select(config, "data.root")
    warn_of_image_settings()
    config.data = OmegaConf.masked_copy(config.data, TOKEN_CACHE_KEYS)  # type: ignore[arg-type]
    if config.data.conditioning == "class":
        # Noise and projectors bridge the modality gap between image and text embeddings, which classes do not have.
        config.model.conditioning.noise_cosine = 1.0
        config.projector.memory_size = 0


def warn_of_image_settings() -> None:
    """Log the arguments of the command that have no effect, because the images of a token cache are encoded already."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return
    for key in parse_by_key(list(HydraConfig.get().overrides.task)):
        if key.startswith("data.") and key.removeprefix("data.") not in TOKEN_CACHE_KEYS:
            logger.warning("%s has no effect with data=cached, whose images are encoded already", key)
