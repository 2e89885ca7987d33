"""Inert stubs of classes that checkpoints name in addition to their weights, so that no code of a file runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

# Configurations, paths and numbers that trainers store next to the weights. A file that names anything else, such as
# os.system, is refused.
STUBBED_NAMES = {
    "argparse.Namespace",
    "types.SimpleNamespace",
    "typing.Any",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "datetime.datetime",
    "datetime.timedelta",
    "datetime.date",
    "datetime.timezone",
    "decimal.Decimal",
    "fractions.Fraction",
    "uuid.UUID",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "builtins.dict",
    "builtins.list",
    "builtins.tuple",
    "builtins.int",
    "builtins.float",
    "builtins.str",
    "builtins.bool",
    "builtins.bytes",
    "builtins.object",
    "builtins.range",
    "builtins.slice",
    "builtins.frozenset",
}
PACKAGES = ("omegaconf.", "pytorch_lightning.", "lightning.", "lightning_fabric.", "numpy.dtypes.")
DICTIONARIES = ("defaultdict", "AttributeDict", "AttrDict", "EasyDict", "CfgNode", "ConfigDict", "Munch")
NUMBERS = "biuf"  # kinds of NumPy types whose scalars are converted


class PickleStub:
    """Inert stub of a class or function; it stores the arguments and state of the object."""

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> PickleStub:
        made = super().__new__(cls)
        made.arguments = arguments
        made.state = None
        return made

    def __init__(self, *arguments: Any):
        """Accept the arguments, which ``__new__`` has stored."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class DictStub:
    """Stub of a subclass of dict, whose items are kept in an ``OrderedDict``."""

    def __new__(cls, *arguments: Any) -> Any:
        return OrderedDict()


def stub_for(name: str) -> type | None:
    """Return the stub of a class or function by its full name; None refuses it."""
    if name.rpartition(".")[2] in DICTIONARIES:
        return DictStub
    return PickleStub if name in STUBBED_NAMES or name.startswith(PACKAGES) else None


def stubs_to_plain(value: Any) -> Any:
    """Convert stubs (Namespace, DictConfig, NumPy scalars) to plain dictionaries, lists and numbers."""
    if isinstance(value, PickleStub):
        return stub_to_plain(value)
    if isinstance(value, Mapping):
        return {key: stubs_to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [stubs_to_plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def stub_to_plain(value: PickleStub) -> Any:
    """Return the content of a stub; the stub itself if its content is unknown."""
    content = content_of(value)
    if isinstance(value.state, dict):
        return stubs_to_plain(content)
    return numpy_number(value)


def content_of(value: PickleStub) -> Any:
    """Return the part of the state of a stub that contains its values."""
    # OmegaConf stores containers in ``_content`` and nodes in ``_val``, next to references to their parents.
    for key in ("_content", "_val"):
        if isinstance(value.state, dict) and key in value.state:
            return value.state[key]
    return value.state


def numpy_number(value: PickleStub) -> Any:
    """Return the number of a NumPy scalar, which is stored as its type and bytes."""
    arguments = value.arguments
    if len(arguments) != 2 or not isinstance(arguments[0], PickleStub) or not isinstance(arguments[1], bytes):
        return value
    code = arguments[0].arguments[0] if arguments[0].arguments else ""
    if not isinstance(code, str) or code[:1] not in NUMBERS:
        return value
    numbers = np.frombuffer(arguments[1], np.dtype(code))
    return numbers[0].item() if len(numbers) == 1 else value
