"""Read files written by torch.save without executing code or trusting sizes in them."""

from __future__ import annotations

import re
import struct
import threading
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from clipgen.checkpoint.pickle_check import check_pickles
from clipgen.checkpoint.pickle_stubs import PickleStub, content_of, stub_for
from clipgen.hardware.environment import environment_variable
from clipgen.storage.files import IS_WINDOWS

State = dict[str, Tensor]
# This environment variable takes precedence over the arguments of torch.load.
FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
MAX_NAMES = 100  # classes that one file may name
MAX_VALUES = 2_000_000  # in all nested dictionaries and lists of a file
MAX_DEPTH = 100
MAX_HEADER = 2**23  # bytes of the header of a safetensors file: about 80 000 tensors
ZIP = b"PK\x03\x04"
# The ends of a zip file, without a comment: of the ordinary format, and of the one for large files.
ZIP_END = struct.Struct("<4s8xLLH")
ZIP64_END = struct.Struct("<4s36xQQ")
ZIP64_LOCATOR = struct.Struct("<4s4xQ4x")
# Number of pickles that torch.save writes before the weights if it writes no archive.
PICKLES = 5
STATE_KEYS = ("state_dict", "model", "model_state_dict", "module", "ema", "generator", "net")
# What torch.compile, FSDP, activation checkpointing and Fabric put between the names of modules.
INSERTED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
WRAPPERS = ("", "module.", "first_stage_model.", "module.first_stage_model.", "model.first_stage_model.")
# Tied weights are stored once and named twice; more than that is a small file that claims much memory.
MAX_SHARING = 4

# The safe globals of torch are those of all threads.
_safe_globals_lock = threading.Lock()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a dictionary written by torch.save; nothing in it is executed.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a checkpoint, wants to run code, or claims more memory than it contains.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        content = unpickle(path)
        check_nesting(content)
    except Exception as error:  # damaged bytes raise anything from KeyError to OSError
        if isinstance(error, OSError) and error.filename:  # the system's, not torch's
            raise
        raise ValueError(f"{path} is not a readable checkpoint: {short_reason(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a readable checkpoint: it contains a {type(content).__name__}")
    return content


def only_weights() -> AbstractContextManager[None]:
    """Let libraries read weights without executing code inside the ``with``, though they ask torch to allow it."""
    return environment_variable(FORCE_WEIGHTS_ONLY, "1")


def unpickle(path: Path) -> Any:
    """Read a file of torch.save with inert stubs of the harmless classes that it names."""
    with path.open("rb") as file:
        archive = file.read(len(ZIP)) == ZIP
    if archive:
        check_archive(path)
    check_pickles_of(path, archive)
    # Windows does not replace a file that is mapped.
    location: Any = copy_storage if archive and IS_WINDOWS else "cpu"
    names: dict[str, Any] = {}
    while True:
        try:
            with _safe_globals_lock, torch.serialization.safe_globals([(kind, name) for name, kind in names.items()]):
                # Memory-mapped: tensors are read when they are used, and cannot extend beyond the end of the file.
                return torch.load(path, map_location=location, weights_only=True, mmap=archive)
        except UnpicklingError as error:
            name = refused_name(error)
            kind = stub_for(name) if name else None
            if name is None or kind is None or name in names or len(names) >= MAX_NAMES:
                raise
            names[name] = kind


def copy_storage(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
    """Copy a memory-mapped storage to the memory of the CPU, as a ``map_location`` of ``torch.load``."""
    return storage.clone()


def check_pickles_of(path: Path, archive: bool) -> None:
    """Raise ValueError if a pickle of a file makes calls that weights do not need, see ``check_pickles``."""
    size = path.stat().st_size
    if not archive:
        with path.open("rb") as file:
            check_pickles(file, size, PICKLES)
        return
    with zipfile.ZipFile(path) as records:
        for record in records.infolist():
            # The name as torch reads it; zipfile can prefer another one.
            if ".pkl" in record.orig_filename:
                with records.open(record) as file:
                    check_pickles(file, size)


def check_nesting(content: Any) -> None:
    """Raise ValueError if nested values are too deep or too many: a pickle can name one list many times in another."""
    pending = [(content, 0)]
    num_values = 0
    while pending:
        value, depth = pending.pop()
        children = children_of(value)
        num_values += len(children)
        if num_values > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(f"it must contain at most {MAX_VALUES} values, nested at most {MAX_DEPTH} times")
        pending += [(child, depth + 1) for child in children]


def children_of(value: Any) -> list[Any]:
    """Return the values inside a container or its stub; an empty list for any other value."""
    if isinstance(value, PickleStub):
        return [value.arguments, content_of(value)]
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else []


def check_archive(path: Path) -> None:
    """Raise ValueError if records of a zip file are compressed, or claim more bytes than the file has."""
    check_directory(path)
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its record {record.filename!r:.100} is compressed, which neither torch nor clipgen does")
    claimed = sum(max(record.file_size, record.compress_size) for record in records)
    size = path.stat().st_size
    if claimed > size:
        raise ValueError(f"its records claim {claimed} bytes, but the file has {size}")


def check_directory(path: Path) -> None:
    """Raise ValueError unless the directory of a zip file is directly before its end.

    Otherwise another reader could find another directory, with records that were not checked.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - 98, 0))
        end = file.read()
    directory_end = size - 22
    mark, length, offset, comment = ZIP_END.unpack(end[-22:].rjust(22))
    if end[-42:-38] == b"PK\x06\x07":
        directory_end = size - 98
        _, place = ZIP64_LOCATOR.unpack(end[-42:-22])
        _, length, offset = ZIP64_END.unpack(end[-98:-42])
        offset = offset if place == directory_end else -1
    if mark != b"PK\x05\x06" or comment or offset + length != directory_end:
        raise ValueError("it does not end with the directory of its records")


def refused_name(error: Exception) -> str | None:
    """Return the full name of the class or function that torch refused, if that is the error."""
    match = re.search(r"[Uu]nsupported (?:global: |class )?GLOBAL ([\w.]+)", " ".join(str(error).split()))
    if match is None:
        return None
    name = match[1].rstrip(".")
    return name if "." in name else f"builtins.{name}"  # torch omits this module


def short_reason(error: Exception) -> str:
    """Return torch's reason in short; the function's name where a file asks for one that no weights need."""
    reason = " ".join(str(error).split()) or "it ends too early"
    if "allocate memory" in reason:
        return "it claims more memory than this machine has"
    if name := refused_name(error):
        return f"it references {name}, which weights do not need: refused"
    return reason.rpartition("WeightsUnpickler error: ")[2][:200]


# ------------------------------------------------------------------------------------------------------------ weights


def check_safetensors_header(path: Path) -> None:
    """Raise ValueError if the header of a safetensors file is too long: reading millions of tensors takes hours.

    Other damage is left to the safetensors library.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise ValueError(f"{path} is damaged: its header must have at most {MAX_HEADER} bytes, got {length}")


def check_weights_file(path: Path) -> None:
    """Raise ValueError if a file of weights claims more than it contains, or wants to run code.

    This is for files that another library reads: of safetensors, of NumPy or of torch.save.
    """
    if path.suffix == ".safetensors":
        check_safetensors_header(path)
    elif path.suffix in (".npz", ".npy"):
        try:
            check_archive(path)
        except (ValueError, zipfile.BadZipFile, struct.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    else:
        read_checkpoint(path)


def check_download(url: str) -> None:
    """Check the file of an address in torch's cache, if it is there, as ``read_checkpoint`` does."""
    cached = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if cached.is_file():
        read_checkpoint(cached)


def read_weights(path: str | Path, key: str, first: str, project: str) -> State:
    """Read the weights of another project: those under ``key``, or of a file that contains nothing else.

    Names that a wrapper has changed (DataParallel, torch.compile, a LightningModule around the model) are restored.

    Raises:
        ValueError: none of them is called ``first``; or they are not finite, or not all there.
    """
    checkpoint = read_checkpoint(path)
    for place in (key, *STATE_KEYS):
        state = checkpoint.get(place)
        if isinstance(state, Mapping):
            names = strip_wrappers(state, first, path)
            if first in names:
                return check_tensors(names, path)
    names = strip_wrappers(checkpoint, first, path)
    if first not in names:
        raise ValueError(f"{path} is not a checkpoint of {project}: it contains no {first}")
    return check_tensors(names, path)


def strip_wrappers(state: Mapping[Any, Any], first: str, path: str | Path) -> dict[str, Any]:
    """Return the weights by the names of the model itself, which has one called ``first``.

    Raises:
        ValueError: several models are in the file, and none of them is marked as the one.
    """
    named = {INSERTED.sub("", name): value for name, value in state.items() if isinstance(name, str)}
    prefixes = [name[: -len(first)] for name in named if name == first or name.endswith(f".{first}")]
    known = [wrapper for wrapper in WRAPPERS if wrapper in prefixes]
    if not known and len(prefixes) > 1:
        raise ValueError(f"{path} contains several models ({', '.join(sorted(prefixes))[:200]}): keep one in the file")
    prefix = (known or prefixes or [""])[0]
    return strip_prefix(prefix, named)


def check_tensors(state: dict[str, Any], path: str | Path) -> State:
    """Return the tensors of a checkpoint, which must be as large as they say, and finite.

    Raises:
        ValueError: one is something else; the message names the file.
    """
    storages: dict[int, int] = {}
    claimed = 0
    for name, tensor in state.items():
        check_dense(name, tensor, path)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        claimed += tensor.numel() * tensor.itemsize
    if claimed > MAX_SHARING * sum(storages.values()):
        raise ValueError(
            f"{path} is refused: its weights claim {claimed} bytes, but it contains {sum(storages.values())}"
        )
    check_finite(state, path)
    return state


def check_dense(name: str, tensor: Any, path: str | Path) -> None:
    """Raise ValueError unless a weight is an ordinary tensor whose memory contains all of its elements."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path} is refused: {name!r:.100} must be a tensor, got a {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"{path} is refused: {name!r:.100} must be a dense tensor, got a sparse or quantized one")
    bytes_needed = tensor.numel() * tensor.itemsize
    if tensor.untyped_storage().nbytes() < bytes_needed:
        stored = tensor.untyped_storage().nbytes()
        raise ValueError(f"{path} is refused: {name!r:.100} claims {bytes_needed} bytes, but {stored} are stored")


def check_finite(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise ValueError if a weight is NaN or infinite: everything computed with it would also be."""
    for name, tensor in state.items():
        if tensor.numel() and not all_finite(tensor):
            raise ValueError(
                f"{path} is refused: its weights must be finite, got NaN or infinity in {name!r:.100}; "
                "take an earlier checkpoint, or train again with a lower learning rate"
            )


def all_finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite, in one pass without temporary memory."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.detach().resolve_conj())
    if not tensor.is_floating_point():
        return True
    # 8-bit floating-point types cannot be compared.
    lowest, highest = (tensor if tensor.itemsize > 1 else tensor.float()).detach().aminmax()
    return bool(torch.isfinite(lowest) and torch.isfinite(highest))


def add_prefix(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by name, with a prefix before each name."""
    return {prefix + name: value for name, value in values.items()}


def strip_prefix(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """Return the entries whose names begin with ``prefix``, without the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
