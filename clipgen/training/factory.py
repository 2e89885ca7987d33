"""Make objects from the sections of a configuration: only listed classes and functions, with checked types.

A configuration may come from the run folder of somebody else, so a section must not name arbitrary code.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from clipgen.files import read_yaml
from clipgen.models.config import GPTConfig

# Everything that a ``_target_`` may name, besides the data sources of configs/data: see ``allowed_targets``
TARGETS = frozenset(
    {
        "clipgen.baselines.class_conditional.ClassConditionalTransformer",
        "clipgen.clip.FrozenCLIP",
        "clipgen.evaluation.reconstruction.ReconstructionMetrics",
        "clipgen.training.callbacks.ImageLogger",
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


def make(section: Mapping[str, Any], place: str = "", **overrides: Any) -> Any:
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
    check_types(target, arguments, place)
    return target(**{key: make_nested(value) for key, value in arguments.items()}, **overrides)


def make_nested(value: Any) -> Any:
    """Return a value in which every section with a ``_target_`` is replaced by what the target returns."""
    if isinstance(value, list):
        return [make_nested(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "_target_" in value:
        return make(value)
    return {key: make_nested(item) for key, item in value.items()}


def find_target(name: str) -> Any:
    """Import a class or function by its full name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def check_targets(section: Mapping[str, Any], place: str) -> None:
    """Raise ValueError if a section, or a section within it, names something else than the parts of a training."""
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
    """Return the folder of the YAML files: inside the package in a wheel, beside it in a checkout."""
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


# --------------------------------------------------------------------------------------------------------------- types


def check_types(target: Any, arguments: Mapping[str, Any], place: str) -> None:
    """Raise TypeError for the first argument that does not fit the signature of a class or function."""
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:
        # some libraries import the names in their annotations for type checkers only
        return
    if "network" in hints:
        # ``**network`` stands for the fields of GPTConfig
        hints |= get_type_hints(GPTConfig)
    check_values(arguments, hints, f"{place}." if place else "")


def check_values(values: Mapping[str, Any], hints: Mapping[str, Any], prefix: str) -> None:
    """Raise TypeError for the first value that does not fit its type; a dataclass checks nested dictionaries."""
    for key, value in values.items():
        if key not in hints:
            continue
        config_class = dataclass_of(hints[key])
        if config_class is not None and isinstance(value, dict):
            check_values(value, get_type_hints(config_class), f"{prefix}{key}.")
        elif not fits(value, hints[key]):
            raise TypeError(f"{prefix}{key} must be {plain(hints[key])}, got {value!r}")


def dataclass_of(hint: Any) -> Any:
    """Return the dataclass among the alternatives of a type, or None."""
    return next((alternative for alternative in get_args(hint) if is_dataclass(alternative)), None)


def fits(value: Any, hint: Any) -> bool:
    """Return True if a value from YAML is of a type. An integer is a valid float; a boolean is not a number."""
    origin = get_origin(hint)
    arguments = get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def plain(hint: Any) -> str:
    """Return the name of a type for error messages, such as ``int or null`` or ``list of int``."""
    origin = get_origin(hint)
    arguments = get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(plain(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return f"list of {plain(arguments[0])}"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))
