"""Make objects from the sections of a configuration: only listed classes and functions, with checked types.

A configuration may come from an untrusted run folder, so a section must not name arbitrary code.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from clipgen.storage.files import read_yaml
from clipgen.type_checks import check_values, parameter_hints

# Everything that a ``_target_`` may name, besides the data sources of configs/data: see ``allowed_targets``.
TARGETS = frozenset(
    {
        "clipgen.baselines.class_conditional.ClassConditionalTransformer",
        "clipgen.clip.FrozenCLIP",
        "clipgen.evaluation.reconstruction.ReconstructionMetrics",
        "clipgen.training.callbacks.ImageLogger",
        "clipgen.training.callbacks.ProjectorBuilder",
        "clipgen.training.callbacks.checkpoint_callbacks",
        "clipgen.training.csv_logger.CSVLogger",
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


def instantiate(section: Mapping[str, Any], place: str = "", **overrides: Any) -> Any:
    """Call the ``_target_`` of a section with the other values of the section.

    Args:
        section: plain values by argument name, and ``_target_``.
        place: the key of the section in the configuration, for error messages.
        overrides: further arguments, which replace values of the section and are not checked.

    Raises:
        TypeError: a value has another type than the signature of the target names.
        ValueError: the section, or a value in it, has a target that is not in ``allowed_targets()``.
    """
    check_targets(section, place)
    target = find_target(section["_target_"])
    arguments = {key: value for key, value in section.items() if key != "_target_" and key not in overrides}
    check_values(arguments, parameter_hints(target), f"{place}." if place else "")
    return target(**{key: instantiate_nested(value) for key, value in arguments.items()}, **overrides)


def instantiate_nested(value: Any) -> Any:
    """Return a value in which every section with a ``_target_`` is replaced by what the target returns."""
    if isinstance(value, list):
        return [instantiate_nested(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "_target_" in value:
        return instantiate(value)
    return {key: instantiate_nested(item) for key, item in value.items()}


def find_target(name: str) -> Any:
    """Import a class or function by its full name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def check_targets(section: Mapping[str, Any], place: str) -> None:
    """Raise ValueError if a section, or a section within it, names something else than the parts of a training run."""
    allowed = allowed_targets()
    for key, target in find_targets(section, place):
        if not (isinstance(target, str) and target in allowed):
            raise ValueError(f"{key} must be one of {', '.join(sorted(allowed))}, got {target!r}")


@cache
def allowed_targets() -> frozenset[str]:
    """Return everything that a ``_target_`` may name: ``TARGETS``, and the data sources of the bundled YAML files."""
    sources = Path(config_dir(), "data").glob("*.yaml")
    return TARGETS | {read_yaml(path)["_target_"] for path in sources}


def config_dir() -> str:
    """Return the folder of the YAML files: inside the package in a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return str(installed if installed.is_dir() else package.parent / "configs")


def find_targets(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield the key and the value of every ``_target_`` in nested dictionaries and lists."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return
    for key, child in value.items():
        name = f"{place}.{key}".strip(".")
        if key == "_target_":
            yield name, child
        yield from find_targets(child, name)
