"""Hydra, in one place: where the YAML lives, how it is composed, how objects are made from it, what its errors mean."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from clipgen.files import read_yaml
from clipgen.models.config import GPTConfig

TARGETS = frozenset(
    # All that a configuration may call, with the data sources of configs/data; see ``allowed_targets``.
    {
        "clipgen.baselines.class_conditional.ClassConditionalTransformer",
        "clipgen.training.callbacks.ImageLogger",
        "clipgen.clip.FrozenCLIP",
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
    allowed = allowed_targets()
    for place, target in targets(OmegaConf.to_container(node), node._get_full_key("")):
        if not (isinstance(target, str) and target in allowed):
            raise ValueError(f"{place} must be one of {', '.join(sorted(allowed))}, got {target!r}")


@cache
def allowed_targets() -> frozenset[str]:
    """Return all that a configuration may call: ``TARGETS``, and the data sources that the bundled YAML files name."""
    sources = Path(config_dir(), "data").glob("*.yaml")
    return TARGETS | {read_yaml(path)["_target_"] for path in sources}


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


def check_types(node: DictConfig, given: dict[str, Any]) -> None:
    """Raise TypeError for the first value in YAML that does not fit the signature; ``given`` replaces such values."""
    target = get_object(node["_target_"])
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:  # a library that imports a name for its type checker only
        return
    if "network" in hints:  # ``**network`` stands for the fields of GPTConfig
        hints |= get_type_hints(GPTConfig)
    values: Any = OmegaConf.to_container(node, resolve=True)
    checked = {key: value for key, value in values.items() if key not in given}
    where = node._get_full_key(None)
    check_values(checked, hints, f"{where}." if where else "")


def check_values(values: dict[str, Any], hints: dict[str, Any], where: str) -> None:
    """Raise TypeError for the first value that does not fit its type; a section is checked by its dataclass."""
    for key, value in values.items():
        section = next((kind for kind in get_args(hints.get(key)) if is_dataclass(kind)), None)
        if section and isinstance(value, dict):
            check_values(value, get_type_hints(section), f"{where}{key}.")
        elif key in hints and not fits(value, hints[key]):
            raise TypeError(f"{where}{key} must be {plain(hints[key])}, got {value!r}")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from YAML is of a type; a whole number is a float too, and true is no number."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def plain(kind: Any) -> str:
    """A type for people: ``int or None``, ``list of int``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(plain(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return f"list of {plain(arguments[0])}"
    return "null" if kind is type(None) else getattr(kind, "__name__", str(kind))
