"""Building a model from a file's arguments and weights: on the meta device first, where sizes cost no memory.

What a file says of itself is not believed: a configuration of a hundred bytes may ask for a billion layers.
"""

from __future__ import annotations

import inspect
import math
import threading
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

import clipgen
from clipgen.checkpoint.safe_load import State
from clipgen.files import one_line

Model = TypeVar("Model")

AT_LEAST_ONE = (
    "ch",
    "codebook_size",
    "codebook_dim",
    "resolution",
    "z_channels",
    "patch_size",
    "ndf",
    "n_layers",
    "n_head",
    "n_embd",
    "num_tokens",
    "clip_dim",
)
DEPTHS = ("n_layer", "n_layers", "num_res_blocks")  # how many blocks are made, each with weights of its own
MAX_NUMBERS = 1000  # in an argument that is a list of numbers
MAX_INTEGER = 2**63
RANDOM = (Tensor.normal_, Tensor.uniform_)
SPARE = 1000  # parameters that a model may have beyond those of its file, as a part that is left out
SPARE_BYTES = 2**26  # of buffers that no file holds


def build(model: type[Model], arguments: Any, state: State, path: str | Path) -> Model:
    """Build a model of ours from the arguments and weights of the file ``path``; nothing is allocated before they fit.

    Raises:
        ValueError: they do not fit; the message names the file.
    """
    with named_load_errors(path, model.__name__):
        check_arguments(model, arguments, len(state))
        rehearse(model, arguments, state)
        made: Model = model.from_state(arguments, state)  # type: ignore[attr-defined]
        return made


@contextmanager
def named_load_errors(path: str | Path, model: str) -> Iterator[None]:
    """Name the file in every error that its arguments or weights lead to."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # other people's values raise anything
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        what = "it lacks " if isinstance(error, KeyError) else ""
        reason = what + (one_line(error) or type(error).__name__)
        raise ValueError(f"{path} does not fit the {model} of clipgen {clipgen.__version__}: {reason}") from error


# ---------------------------------------------------------------------------------------------------------- arguments


def check_arguments(model: type, arguments: Any, tensors: int) -> None:
    """Raise ValueError unless arguments are of the types that a model's constructor names, and of possible sizes.

    Args:
        tensors: number of tensors in the file; each block needs some.
    """
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise ValueError(f"its arguments must be values by name, got a {type(arguments).__name__}")
    hints = constructor_hints(model)
    for name, value in arguments.items():
        if not accepts(hints.get(name, Any), value):
            raise ValueError(f"{name} must be {described(hints[name])}, got {value!r:.60}")
    for name in (*AT_LEAST_ONE, *DEPTHS):
        least = 1 if name in AT_LEAST_ONE else 0
        if isinstance(arguments.get(name), int) and arguments[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {arguments[name]}")
    for name in DEPTHS:
        if isinstance(arguments.get(name), int) and arguments[name] > tensors + SPARE:
            raise ValueError(f"{name} must fit the {tensors} tensors of the file, got {arguments[name]}")


def constructor_hints(model: type) -> dict[str, Any]:
    """Return the types of a constructor's arguments by name; of the parents', too, where it passes them on."""
    hints: dict[str, Any] = {}
    for parent in model.__mro__:
        init = vars(parent).get("__init__")
        if init is None:
            continue
        try:
            found = typing.get_type_hints(init)
        except Exception:  # a subclass may name types that only a type checker imports
            found = {}
        hints = found | hints
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(init).parameters.values()):
            break
    return hints


def accepts(hint: Any, value: Any) -> bool:
    """Return True if a value of a file may be an argument of this type; True for types that are not known here."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(part, value) for part in typing.get_args(hint))
    if origin is Sequence:
        return is_list_of(typing.get_args(hint)[0], value)
    if hint is type(None):
        return value is None
    if hint is bool:
        return value in (False, True) and isinstance(value, (bool, int))
    if hint is str:
        return isinstance(value, str)
    if hint in (int, float):
        return is_number(value, whole=hint is int)
    return True


def is_list_of(hint: Any, value: Any) -> bool:
    """Return True if a value is a list of elements of one type; of numbers only so many."""
    if not isinstance(value, (list, tuple)) or (hint in (int, float) and len(value) > MAX_NUMBERS):
        return False
    return all(accepts(hint, item) for item in value)


def is_number(value: Any, whole: bool) -> bool:
    """Return True if a value is a number that a 64-bit variable holds; 1e4 counts as whole, as YAML writes it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        return False
    if isinstance(value, float):
        return not whole or value.is_integer()
    return abs(value) < MAX_INTEGER


def described(hint: Any) -> str:
    """Return the words for a type in a message."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    if typing.get_origin(hint) is Sequence:
        return f"a list, each element {described(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(described(part) for part in typing.get_args(hint))
    return words.get(hint, str(hint))


# ------------------------------------------------------------------------------------------------------ meta device


def rehearse(model: Any, arguments: Mapping[str, Any], state: State) -> None:
    """Load the weights once on the meta device, which has shapes and no memory.

    Raises:
        Exception: names or shapes do not fit, as ``load_state_dict`` says it; weights have a wrong type.
    """
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    with warnings.catch_warnings(), at_most(2 * len(state) + SPARE), torch.device("meta"), WithoutInitialization():
        warnings.simplefilter("ignore")
        made = model.from_state(arguments, shapes)
    kept = made.state_dict()
    check_types(state, {name for name, tensor in kept.items() if not tensor.is_floating_point()})
    check_buffers(made, set(kept), sum(tensor.nbytes for tensor in state.values()))


class WithoutInitialization(TorchFunctionMode):
    """Leave new weights as they are: those of the meta device have no values, and setting them takes long."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" or func in RANDOM:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def at_most(count: int) -> Iterator[None]:
    """Stop the construction of modules in this thread when they have more than ``count`` parameters."""
    thread, made = threading.get_ident(), 0

    def registered(module: Any, name: str, parameter: Any) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > count:
            raise ValueError("its arguments ask for more layers than it has weights for")

    hook = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()


def check_types(state: State, integers: set[str]) -> None:
    """Raise ValueError if weights are not floating-point numbers where the model's are.

    Args:
        integers: names of the model's tensors that count something.
    """
    for name, tensor in state.items():
        counts = not tensor.is_complex() and any(other == name or other.endswith(f".{name}") for other in integers)
        if not tensor.is_floating_point() and not counts:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"its weights must be floating-point numbers, got {kind} in {name!r:.100}")


def check_buffers(made: torch.nn.Module, kept: set[str], file_bytes: int) -> None:
    """Raise ValueError if what a model needs beside its weights is out of proportion to them."""
    beside = sum(size(buffer) for name, buffer in made.named_buffers() if name not in kept)
    if beside > 2 * file_bytes + SPARE_BYTES:
        raise ValueError(f"its arguments ask for {beside} bytes beside the {file_bytes} of its weights")


def size(tensor: Tensor) -> int:
    """Return the bytes that a tensor of the meta device would need."""
    return tensor.numel() * tensor.itemsize
