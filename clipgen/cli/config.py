"""Hydra, in one place: where the YAML lives, how it is composed, how objects are made from it, what its errors mean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from clipgen.type_checks import check_values, parameter_hints

TARGETS = frozenset(
    {  # all that a configuration may have called
        "clipgen.baselines.class_conditional.ClassConditionalTransformer",
        "clipgen.training.callbacks.ImageLogger",
        "clipgen.clip.FrozenCLIP",
        "clipgen.data.token_cache.TokenCacheDataModule",
        "clipgen.data.folder.folder_data",
        "clipgen.data.shapes.shapes_data",
        "clipgen.data.webdataset.shard_data",
        "clipgen.evaluation.reconstruction.ReconstructionMetrics",
        "clipgen.training.resume.CSVLogger",
        "clipgen.training.resume.checkpoints",
        "clipgen.transformer.ConditionalTransformer",
        "clipgen.vqgan.VQGAN",
        "pytorch_lightning.Trainer",
        "pytorch_lightning.loggers.CometLogger",
        "pytorch_lightning.loggers.MLFlowLogger",
        "pytorch_lightning.loggers.NeptuneLogger",
        "pytorch_lightning.loggers.TensorBoardLogger",
        "pytorch_lightning.loggers.WandbLogger",
    }
)
MESSAGES = (  # what Hydra says -> what we say
    (r"You must specify '(\w+)'.* Available options:,? (.*)", r"\1 must be one of \2; give \1=..."),
    (r".*Could not find '(\w+)/(.*)' Available options in '\1':,? (.*)", r"\1 must be one of \3, got \2"),
    (r".*Could not find '(\w+)/(.*)'", r"\1 must be an existing group option, got \2"),
    (r"Error parsing override '(.*)' missing EQUAL.*", r"arguments must be KEY=VALUE, got \1"),
    (r"Error parsing override '(.*?)' (.*) See https.*", r"\1 cannot be read: \2; put quotes around the value"),
    (r"Could not override '(.*?)'\..*", r"there is no key \1; clipgen-train stage=vqgan --cfg job shows all keys"),
    (
        r".*(mismatched|extraneous|token|LexerNoViableAlt).* See https.*",
        r"arguments must be KEY=VALUE, with quotes around odd values",
    ),
    (r"Ambiguous value for argument '(.*?)'.*", r"\1 has several values: a list is written [a,b], a sweep --multirun"),
    (r".*interpolation '\$\{experiment\}_\$\{stage\}'.*", r"--multirun cannot sweep over stage or experiment"),
)


def config_dir() -> str:
    """The folder of the YAML files: inside the package in a wheel, beside it in a checkout or editable install."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return str(inside if inside.is_dir() else package.parent / "configs")


def composed(*overrides: str, name: str = "train") -> DictConfig:
    """What ``clipgen-train`` (or the command of another ``name``) would run with these overrides."""
    try:
        with initialize_config_dir(config_dir(), version_base="1.3"):
            return compose(name, overrides=list(overrides))
    except HydraException as error:
        raise ValueError(explain(error)) from error


def make(node: DictConfig, **arguments: Any) -> Any:
    """Call a node's ``_target_`` with its values as plain Python ones, which keeps checkpoints free of OmegaConf.

    Raises:
        TypeError: a value is not of the kind that the signature names.
        ValueError: the node, or a value in it, has a target that is not in ``TARGETS``.
    """
    check_targets(node)
    check_types(node, arguments)
    try:
        return instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        raise root_cause(error) from error


def make_plain(node: DictConfig) -> dict[str, Any]:
    """Return a resolved node as plain Python dicts and lists."""
    values: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    return values


def as_yaml(config: DictConfig) -> str:
    """The resolved configuration, for the run folder."""
    return OmegaConf.to_yaml(config, resolve=True)


# --------------------------------------------------------------------------------------------------------------- errors


def explain(error: BaseException) -> str:
    """Hydra's message in one sentence."""
    text = " ".join(str(error).replace("\n\t", ", ").split()).split(" Config search path")[0]
    for pattern, ours in MESSAGES:
        if re.fullmatch(pattern, text):
            return re.sub(pattern, ours, text)
    return text


def root_cause(error: BaseException) -> BaseException:
    """What a constructor raised, without Hydra's wrapping."""
    return root_cause(error.__cause__) if isinstance(error, InstantiationException) and error.__cause__ else error


def check_targets(node: DictConfig) -> None:
    """Raise ValueError where a configuration would call something else than the parts of a training."""
    for place, target in targets(OmegaConf.to_container(node), node._get_full_key("")):
        if not (isinstance(target, str) and target in TARGETS):
            raise ValueError(f"{place} must be one of {', '.join(sorted(TARGETS))}, got {target!r}")


def targets(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of every ``_target_`` in nested dictionaries and lists."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, child in value.items():
            name = f"{place}.{key}".strip(".")
            if key == "_target_":
                yield name, child
            yield from targets(child, name)


def check_types(node: DictConfig, replaced: dict[str, Any]) -> None:
    """Raise TypeError for the first value in YAML that does not fit the signature of the node's target.

    Args:
        replaced: arguments that are passed instead of the values in YAML.
    """
    values: Any = OmegaConf.to_container(node, resolve=True)
    checked = {key: value for key, value in values.items() if key not in replaced}
    key = node._get_full_key(None)
    check_values(checked, parameter_hints(get_object(node["_target_"])), f"{key}." if key else "")
