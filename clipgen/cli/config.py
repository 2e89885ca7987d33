"""Hydra, in one place: where the YAML lives, how it is composed, how objects are made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf


def config_dir() -> str:
    """The folder of the YAML files: inside the package in a wheel, beside it in a checkout or editable install."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return str(inside if inside.is_dir() else package.parent / "configs")


def composed(*overrides: str) -> DictConfig:
    """What ``clipgen-train`` would run with these overrides."""
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def make(node: DictConfig, **arguments: Any) -> Any:
    """Call a node's ``_target_`` with its values as plain Python ones, which keeps checkpoints free of OmegaConf."""
    return instantiate(node, _convert_="all", **arguments)


def as_yaml(config: DictConfig) -> str:
    """The resolved configuration, for the run folder."""
    return OmegaConf.to_yaml(config, resolve=True)
