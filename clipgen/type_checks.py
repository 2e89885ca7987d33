"""Check values from YAML, JSON and checkpoints against the types of the function or class that they are passed to.

Hydra's structured configurations check dataclasses only; pydantic would have to wrap every constructor.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from clipgen.models.config import GPTConfig

MAX_NUMBERS = 1000  # in an argument that is a list of numbers
MAX_INTEGER = 2**63


def check_values(values: Mapping[str, Any], hints: Mapping[str, Any], section: str = "") -> None:
    """Raise TypeError for the first value that does not fit its type.

    Args:
        values: values by name; a mapping whose type is a dataclass is checked field by field.
        hints: types by name; other names are not checked.
        section: prefix of the names in the message, as in "model.".
    """
    for name, value in values.items():
        config_class = dataclass_in(hints.get(name))
        if config_class and isinstance(value, Mapping):
            check_values(value, get_type_hints(config_class), f"{section}{name}.")
        elif name in hints and not fits(value, hints[name]):
            raise TypeError(f"{section}{name} must be {type_in_words(hints[name])}, got {value!r:.80}")


def dataclass_in(hint: Any) -> Any:
    """Return the dataclass of a type such as ``GANConfig | Mapping | None``; None if there is none."""
    return next((choice for choice in get_args(hint) if is_dataclass(choice)), None)


def parameter_hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of the parameters of a function or class by name.

    The parameters of parent classes are included if the constructor passes keyword arguments on.
    """
    hints: dict[str, Any] = {}
    for function in constructors(target):
        try:
            own = get_type_hints(function)
        except Exception:  # a name that is imported for type checkers only
            own = {}
        if "network" in own:  # `**network` takes the fields of GPTConfig
            own |= get_type_hints(GPTConfig)
        hints = own | hints
        parameters = inspect.signature(function).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return hints


def constructors(target: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Return the constructors of a class and of its parents, or the function itself."""
    if not inspect.isclass(target):
        return [target]
    return [vars(parent)["__init__"] for parent in target.__mro__[:-1] if "__init__" in vars(parent)]


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of a type. An integer is also a float; a Boolean is not a number."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, choice) for choice in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if is_sequence(origin):
        return is_list_of(value, get_args(hint)[0])
    if hint in (int, float):
        return is_number(value, hint)
    return is_instance(value, origin or hint)


def is_sequence(origin: Any) -> bool:
    """Return whether the origin of a generic type is a list, tuple or ``Sequence``."""
    return inspect.isclass(origin) and issubclass(origin, Sequence)


def is_list_of(value: Any, hint: Any) -> bool:
    """Return whether a value is a list whose elements are of one type; lists of numbers are limited in length."""
    if not isinstance(value, (list, tuple)):
        return False
    if hint in (int, float) and len(value) > MAX_NUMBERS:
        return False
    return all(fits(item, hint) for item in value)


def is_number(value: Any, hint: type) -> bool:
    """Return whether a value is a number of the given type, not NaN, and within 64 bits."""
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return abs(value) < MAX_INTEGER
    return hint is float and isinstance(value, float) and not math.isnan(value)


def is_instance(value: Any, hint: Any) -> bool:
    """Return whether a value is an instance of a class; True for types that cannot be checked at run time."""
    if hint is Path:  # JSON and YAML store paths as strings
        return isinstance(value, (str, Path))
    try:
        return isinstance(value, hint)
    except TypeError:
        return True


def type_in_words(hint: Any) -> str:
    """Return a type in words: ``int or null``, ``list of int``."""
    origin = get_origin(hint)
    arguments = get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(type_in_words(choice) for choice in arguments)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if is_sequence(origin):
        return f"list of {type_in_words(arguments[0])}"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))
