"""What a configuration leaves open, and what is wrong with it, as far as that can be known without torch: errors are
shown within a second or two."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from clipgen.cli.list_runs import OUTPUTS, newest_run
from clipgen.cli.resume_args import run_of
from clipgen.data.urls import expand_urls

logger = logging.getLogger(__name__)
STAGE_1 = "`clipgen-train stage=vqgan` makes one"


def settle(config: DictConfig) -> None:
    """Fill in what follows from the rest of the configuration, and refuse what cannot be trained.

    Raises:
        ValueError, TypeError: a value is missing or is not a path.
        FileNotFoundError: a file or folder that is named does not exist, or there is no tokenizer yet.
    """
    if is_encoded(config):
        settle_encoded(config)
    elif config.stage_name == "transformer" and OmegaConf.is_missing(config, "vqgan"):
        config.vqgan = own_tokenizer(config.resume) or newest_tokenizer()
    if missing := OmegaConf.missing_keys(config):
        names = ", ".join(sorted(missing))
        raise ValueError(f"stage={config.stage_name} needs a value for {names}: give {min(missing)}=...")
    OmegaConf.resolve(config)
    for key in ("output", "resume", "vqgan"):  # YAML's numbers, null and lists
        value = config.get(key)
        if not isinstance(value, str) and (key == "output" or value is not None):
            raise TypeError(f"{key} must be a path, got {value!r}: put quotes around it, {key}=\\'...\\'")
    check_sources(config.data)
    check_tokenizer(config.get("vqgan"))


def own_tokenizer(resume: Any) -> str | None:
    """Return the run to resume if it holds a copy of the tokenizer that it began with."""
    run = run_of(Path(resume).expanduser()) if isinstance(resume, str) else None
    return str(run) if run and (run / "vqgan" / "config.json").is_file() else None


def newest_tokenizer() -> str:
    """Return the stage-1 run below ``outputs/`` that finished last, and say which it is."""
    run = newest_run(OUTPUTS, "vqgan")
    if run is None:
        raise FileNotFoundError(
            "stage=transformer needs a tokenizer: give vqgan=RUN, or train one by `clipgen-train stage=vqgan` "
            f"(there is no finished one below {OUTPUTS}/)"
        )
    logger.info("Tokenizer: %s, the newest finished one below %s/; vqgan=RUN takes another", run, OUTPUTS)
    return run


def check_sources(data: DictConfig) -> None:
    """Raise FileNotFoundError for a folder or a shard that does not exist."""
    if data._target_.endswith("folder_data"):
        for key in ("root", "val_root"):
            folder = data.get(key)
            if isinstance(folder, str) and not Path(folder).expanduser().exists():
                raise FileNotFoundError(f"{key} must be an existing folder of images, got {folder}")
    if data._target_.endswith("TokenCacheDataModule") and not Path(str(data.root)).expanduser().exists():
        raise FileNotFoundError(f"no token cache in {data.root}; make one with `clipgen-encode output={data.root}`")
    for key in ("train_urls", "val_urls"):
        urls: Any = data.get(key)
        if urls:
            expand_urls(urls if isinstance(urls, str) else list(urls))


def check_tokenizer(vqgan: str | None) -> None:
    """Raise FileNotFoundError if nothing is where the tokenizer should be."""
    if vqgan and vqgan != "shapes" and not vqgan.startswith("hf-hub:") and not Path(vqgan).expanduser().exists():
        raise FileNotFoundError(f"no VQGAN checkpoint: {vqgan} does not exist; {STAGE_1}")


def is_encoded(config: DictConfig) -> bool:
    """Return whether training reads a cache."""
    return bool(config.data._target_.endswith("TokenCacheDataModule"))


def settle_encoded(config: DictConfig) -> None:
    """A cache holds its tokenizer, and knows its source: the experiment's own do not apply."""
    if OmegaConf.is_missing(config, "vqgan"):
        config.vqgan = config.data.root
    keys = ("_target_", "root", "batch_size", "num_workers", "seed", "conditioning")
    config.data = OmegaConf.masked_copy(config.data, keys)  # type: ignore[arg-type]
    if config.data.conditioning == "class":
        config.model.conditioning.noise_cosine = 1.0  # noise closes the modality gap, which classes do not have
