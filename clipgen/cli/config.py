"""Compose configurations with Hydra, and translate its errors into plain sentences."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from clipgen.training.instantiate import config_dir as config_dir
from clipgen.training.instantiate import instantiate

SEVERAL_VALUES = r"""\1=\2 has several values: write a list as [a,b], a text as '\1="\2"', or use --multirun"""
# Pattern of an error of Hydra -> our message.
MESSAGES = (
    (r"You must specify '(\w+)'.* Available options:,? (.*)", r"\1 must be one of \2; give \1=..."),
    (r".*Could not find '(\w+)/(.*)' Available options in '\1':,? (.*)", r"\1 must be one of \3, got \2"),
    (r".*Could not find '(\w+)/(.*)'", r"\1 must be an existing group option, got \2"),
    (r"Error parsing override '(.*)' missing EQUAL.*", r"arguments must be KEY=VALUE, got \1"),
    (r"Error parsing override '(.*?)' (.*) See https.*", r"arguments must be KEY=VALUE, got \1: \2"),
    (r".*(mismatched|extraneous|token|LexerNoViableAlt).* See https.*", r"arguments must be KEY=VALUE"),
    (r"Could not override '(.*?)'\..*", r"there is no key \1; --cfg job in its place shows all keys"),
    (r"Ambiguous value for argument '(.*?)=(.*?)'.*", SEVERAL_VALUES),
    (r".*interpolation '\$.(experiment|variant)._\$.stage.'.*", r"--multirun cannot sweep over stage or experiment"),
)
# KEY=VALUE with a key as Hydra accepts it, such as ++data.root or data@package.
ASSIGNMENT = re.compile(r"([+~]{0,2}[\w./@:-]+)=(.*)", re.DOTALL)


def compose_config(*overrides: str, name: str = "train") -> DictConfig:
    """Return the configuration of ``clipgen-train``, or of the command of another ``name``, with overrides."""
    arguments = quote_arguments(list(overrides))
    try:
        with initialize_config_dir(config_dir(), version_base="1.3"):
            return compose(name, overrides=arguments)
    except HydraException as error:
        raise ValueError(explain_hydra_error(error)) from error


def instantiate_node(node: DictConfig, **overrides: Any) -> Any:
    """Make the object that a node of a configuration describes; see ``clipgen.training.instantiate.instantiate``."""
    return instantiate(node_to_dict(node), node._get_full_key(None) or "", **overrides)


def node_to_dict(node: DictConfig) -> dict[str, Any]:
    """Return a node as plain Python dictionaries and lists, with its interpolations resolved."""
    values: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    return values


def as_yaml(config: DictConfig) -> str:
    """Return a configuration as YAML, with its interpolations resolved."""
    return OmegaConf.to_yaml(config, resolve=True)


# ----------------------------------------------------------------------------------------------------------- arguments


def quote_arguments(arguments: list[str]) -> list[str]:
    """Return command-line arguments in a form that Hydra's grammar can parse.

    A value that begins with ``~/`` is put in quotes, because shells leave it alone after ``KEY=`` and Hydra cannot
    parse it. Options such as ``--multirun`` are returned unchanged.

    Raises:
        ValueError: an argument cannot be parsed; the message contains the argument with quotes that help.
    """
    return [quote_argument(argument) for argument in arguments]


def quote_argument(argument: str) -> str:
    """Return an argument that Hydra's grammar can parse, or raise ValueError with one that it could."""
    match = ASSIGNMENT.fullmatch(argument)
    if match is None or can_parse(argument):
        # Options, and arguments that Hydra itself refuses.
        return argument
    quoted = f"{match[1]}={quote(match[2])}"
    if match[2] == "~" or match[2].startswith("~/"):
        return quoted
    raise ValueError(f"{argument} cannot be read: put quotes around the value, {shlex.quote(quoted)}")


def can_parse(argument: str) -> bool:
    """Return whether Hydra's grammar can parse an argument."""
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def quote(value: str) -> str:
    """Return a string in the quotes of Hydra's grammar."""
    for mark in ('"', "'"):
        if mark not in value and not value.endswith("\\"):
            return f"{mark}{value}{mark}"
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def expand_home(config: DictConfig) -> None:
    """Replace ``~`` at the start of every path in a configuration by the home directory."""
    for node, key, value in list(strings(config)):
        if value == "~" or value.startswith("~/"):
            node[key] = str(Path(value).expanduser())


def strings(node: Any) -> Iterator[tuple[Any, Any, str]]:
    """Yield the container, the key and the value of every string in nested dictionaries and lists."""
    keys = range(len(node)) if OmegaConf.is_list(node) else list(node)
    for key in keys:
        if OmegaConf.is_missing(node, key):
            continue
        value = node[key]
        if OmegaConf.is_config(value):
            yield from strings(value)
        elif isinstance(value, str):
            yield node, key, value


def explain_hydra_error(error: BaseException) -> str:
    """Return the message of an error of Hydra in one sentence."""
    text = " ".join(str(error).replace("\n\t", ", ").split()).split(" Config search path")[0]
    for pattern, message in MESSAGES:
        if re.fullmatch(pattern, text):
            return re.sub(pattern, message, text)
    return text
