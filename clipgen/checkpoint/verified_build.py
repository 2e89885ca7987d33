"""Build a model from a file's arguments and weights, first on the meta device, where sizes cost no memory.

A file is not trusted: a configuration of a hundred bytes may ask for a billion layers.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

import clipgen
from clipgen.checkpoint.safe_load import State
from clipgen.storage.files import one_line
from clipgen.type_checks import check_values, fits, parameter_hints

ModelType = TypeVar("ModelType")

DEPTHS = ("n_layer", "num_layers", "num_res_blocks")  # numbers of blocks, each with weights of its own
RANDOM = (Tensor.normal_, Tensor.uniform_)
SPARE = 1000  # parameters that a model may have beyond those of its file, as a part that is left out
SPARE_BYTES = 2**26  # allowance for buffers that no file contains


def build_verified(model: type[ModelType], arguments: Any, state: State, path: str | Path) -> ModelType:
    """Build a model from the arguments and weights of the file ``path``, after checking that they fit together.

    Raises:
        ValueError: they do not fit; the message names the file.
    """
    with named_load_errors(path, model.__name__):
        check_arguments(model, arguments, len(state))
        build_on_meta(model, arguments, state)
        made: ModelType = model.from_state(arguments, state)  # type: ignore[attr-defined]
        return made


@contextmanager
def named_load_errors(path: str | Path, model: str) -> Iterator[None]:
    """Raise every error that arguments or weights of a file cause as a ValueError that names the file."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # values of unknown origin can raise anything
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        what = "it lacks " if isinstance(error, KeyError) else ""
        reason = what + (one_line(error) or type(error).__name__)
        raise ValueError(f"{path} does not fit the {model} of clipgen {clipgen.__version__}: {reason}") from error


# ---------------------------------------------------------------------------------------------------------- arguments


def check_arguments(model: type, arguments: Any, num_tensors: int) -> None:
    """Check the arguments of a file before anything is built from them.

    Raises:
        TypeError: an argument is not of the type that the model's constructor names.
        ValueError: there are more blocks than the tensors of the file can be the weights of.
    """
    if not isinstance(arguments, Mapping) or not fits(list(arguments), list[str]):
        raise TypeError(f"its arguments must be values by name, got a {type(arguments).__name__}")
    check_values(arguments, parameter_hints(model))
    for section in (arguments, *arguments.values()):
        if isinstance(section, Mapping):
            check_depth(section, num_tensors)


def check_depth(section: Mapping[str, Any], num_tensors: int) -> None:
    """Raise ValueError if the number of blocks cannot fit the number of tensors in a file: each block has some."""
    for name in DEPTHS:
        depth = section.get(name)
        if isinstance(depth, int) and depth > num_tensors + SPARE:
            raise ValueError(f"{name} must fit the {num_tensors} tensors of the file, got {depth}")


# ------------------------------------------------------------------------------------------------------ meta device


def build_on_meta(model: Any, arguments: Mapping[str, Any], state: State) -> None:
    """Build the model and load its weights on the meta device, which has shapes and no memory.

    Raises:
        Exception: names or shapes do not fit, as ``load_state_dict`` says it; weights have a wrong type.
    """
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    with (
        warnings.catch_warnings(),
        limit_parameters(2 * len(state) + SPARE),
        torch.device("meta"),
        WithoutInitialization(),
    ):
        warnings.simplefilter("ignore")
        built = model.from_state(arguments, shapes)
    stored = built.state_dict()
    check_types(state, {name for name, tensor in stored.items() if not tensor.is_floating_point()})
    check_buffers(built, set(stored), sum(tensor.nbytes for tensor in state.values()))


class WithoutInitialization(TorchFunctionMode):
    """Leave new weights as they are: those of the meta device have no values, and setting them takes long."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" or func in RANDOM:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def limit_parameters(count: int) -> Iterator[None]:
    """Stop the construction of modules in this thread when they have more than ``count`` parameters."""
    thread = threading.get_ident()
    num_parameters = 0

    def registered(module: Any, name: str, parameter: Any) -> None:
        nonlocal num_parameters
        if threading.get_ident() == thread:
            num_parameters += 1
        if num_parameters > count:
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
        is_counter = not tensor.is_complex() and any(other == name or other.endswith(f".{name}") for other in integers)
        if not tensor.is_floating_point() and not is_counter:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"its weights must be floating-point numbers, got {dtype} in {name!r:.100}")


def check_buffers(module: torch.nn.Module, stored: set[str], file_bytes: int) -> None:
    """Raise ValueError if the buffers that a model creates itself are out of proportion to the weights of its file."""
    buffer_bytes = sum(tensor_bytes(buffer) for name, buffer in module.named_buffers() if name not in stored)
    if buffer_bytes > 2 * file_bytes + SPARE_BYTES:
        raise ValueError(f"its arguments ask for {buffer_bytes} bytes in addition to the {file_bytes} of its weights")


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor of the meta device would need."""
    return tensor.numel() * tensor.itemsize
