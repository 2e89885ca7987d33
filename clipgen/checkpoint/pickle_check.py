"""Check the calls in the pickle of a checkpoint before torch makes them.

torch's reader for weights calls a few functions with any arguments that a file gives: thirty bytes can ask for an array
of many gigabytes. Here the same pickle is read with placeholders for everything that it names, so nothing is called.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import IO, Any, ClassVar

# Functions of torch._utils that make tensors of the stored numbers, or of none.
REBUILD = {
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_tensor_v3",
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
    "_rebuild_sparse_tensor",
    "_rebuild_meta_tensor_no_storage",
}
# Arguments may be longer than the pickle by this factor: a pickle stores a value once and can use it often.
MAX_REPETITION = 4
# The instructions that torch's reader knows.
INSTRUCTIONS = (
    "PROTO STOP GLOBAL REDUCE NEWOBJ BUILD MARK APPEND APPENDS SETITEM SETITEMS NONE NEWTRUE NEWFALSE "
    "EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET TUPLE TUPLE1 TUPLE2 TUPLE3 BININT BININT1 BININT2 BINFLOAT LONG1 "
    "BINUNICODE SHORT_BINSTRING BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT"
)
OPCODES = {getattr(pickle, name)[0] for name in INSTRUCTIONS.split()}


class Placeholder:
    """Placeholder of a class or function that a pickle names, or of what a call returns.

    Args:
        name: full name of the class or function; empty for a result.
    """

    def __init__(self, name: str = ""):
        self.name = name

    def __setitem__(self, key: Any, value: Any) -> None:
        """Accept an item, as dictionaries do."""


class Storage(Placeholder):
    """Placeholder of the memory of a tensor.

    Args:
        length: number of its elements.
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length


class BoundedFile:
    """Read no more than the rest of a file: ``BufferedReader.read`` allocates as much as a pickle claims.

    Args:
        file: the file.
        size: its bytes.
    """

    def __init__(self, file: IO[bytes], size: int):
        self.file = file
        self.size = size
        self.readline = file.readline

    def read(self, size: int) -> bytes:
        """Return at most ``size`` bytes."""
        return self.file.read(min(size, self.size))


class PickleChecker(pickle._Unpickler):
    """Read pickles without calling anything.

    Args:
        file: the pickles.
        size: bytes of the file.

    Raises:
        ValueError: a call would take much more memory than the file is large.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code in OPCODES
    }

    def __init__(self, file: IO[bytes], size: int):
        super().__init__(BoundedFile(file, size), encoding="utf-8")
        self.size = size
        # Elements of the arguments of all calls, and of all storages, by their keys.
        self.num_copied = 0
        self.num_stored = 0
        self.storages: dict[Any, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the placeholder of a class or function."""
        return Placeholder(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """Return the placeholder of a storage; ``pid`` is ("storage", type, key, device, length, ...)."""
        length = pid[4] if isinstance(pid, tuple) and len(pid) > 4 else None
        if type(length) is not int or not length >= 0:
            raise ValueError("it names a storage without its length")
        # The reader of torch keeps the first length of a key.
        if pid[2] not in self.storages:
            self.storages[pid[2]] = length
            self.num_stored += length
        if self.num_stored > self.size:
            raise ValueError(f"its tensors claim {self.num_stored} elements in {self.size} bytes")
        return Storage(self.storages[pid[2]])

    def call(self, function: Any, arguments: Any) -> Any:
        """Check a call, and return the placeholder of its result."""
        if not isinstance(function, Placeholder) or not isinstance(arguments, tuple):
            raise ValueError("it calls a value that is not a function")
        self.count(arguments)
        name = function.name.rpartition(".")[2]
        if name == "_rebuild_from_type_v2" and len(arguments) > 2:
            # It calls its first argument with its third.
            return self.call(arguments[0], arguments[2])
        if not is_safe_call(name, arguments):
            raise ValueError(f"it calls {function.name} as no weights need: refused")
        # A text represents its bytes, and a tuple a size.
        return arguments[0] if name in ("encode", "Size") and arguments else Placeholder()

    def count(self, values: Iterable[Any]) -> None:
        """Count the elements of values that are copied."""
        for value in values:
            if isinstance(value, (str, bytes, list, tuple, dict, set)):
                self.num_copied += len(value)
        if self.num_copied > MAX_REPETITION * self.size:
            raise ValueError(f"its calls copy {self.num_copied} elements of {self.size} bytes")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        self.load_reduce()

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(state, tuple) and not fits_storage(state):
            raise ValueError("it has a tensor that is larger than its storage")
        # A pair stores the state in two parts.
        self.count(state if isinstance(state, tuple) and len(state) == 2 else [state])

    dispatch |= {pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_newobj, pickle.BUILD[0]: load_build}


def is_safe_call(name: str, arguments: tuple[Any, ...]) -> bool:
    """Return whether a call takes no more memory than its arguments.

    Args:
        name: name of the function, without its module.
        arguments: arguments of the call.
    """
    if name == "bytearray":
        return bool(arguments) and isinstance(arguments[0], (str, bytes))
    if name == "encode":
        # Pickles of Python 2 store bytes in this way. Other codecs can double their input again and again.
        return len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1"
    if name.endswith(("Tensor", "Storage")):
        # Without a size, as in very old files.
        return not arguments
    if name.startswith("_rebuild_"):
        return name in REBUILD and fits_storage(arguments)
    return True


def fits_storage(arguments: tuple[Any, ...]) -> bool:
    """Return whether a tensor lies within its storage, which torch would enlarge otherwise.

    Args:
        arguments: storage, offset, size and stride; or others, if the function takes no storage.
    """
    if not arguments or not isinstance(arguments[0], Storage):
        return not any(isinstance(value, Storage) for value in arguments)
    if len(arguments) < 4:
        return False
    storage, offset, size, stride = arguments[:4]
    numbers = [offset, *size, *stride]
    if len(size) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
        return False
    if 0 in size:
        return True
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    return bool(last < storage.length)


def check_pickles(file: IO[bytes], size: int, num_pickles: int = 1) -> None:
    """Check the calls of the next pickles in a file.

    Args:
        file: the pickles.
        size: bytes of the file.
        num_pickles: number of pickles.

    Raises:
        ValueError: a pickle is damaged, or a call would take much more memory than the file is large.
    """
    for _ in range(num_pickles):
        place = file.tell()
        if not file.read(1):
            # A file that ends here is refused by torch.
            return
        file.seek(place)
        try:
            PickleChecker(file, size).load()
        except ValueError:
            raise
        except Exception as error:  # damaged bytes raise anything from KeyError to EOFError
            raise ValueError(f"its pickle is damaged ({type(error).__name__})") from error
