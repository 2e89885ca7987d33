"""Reading what torch.save wrote, without executing anything in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


class PickleStub:
    """Stands for the classes that old checkpoints name without using them, so that none of their code runs."""


STUBBED_CLASSES = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)  # Lightning 1.0 pickled it as a key


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What torch.save wrote as a dict; nothing in it is executed.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no checkpoint, or one that wants to run code.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        with torch.serialization.safe_globals([(PickleStub, name) for name in STUBBED_CLASSES]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise anything from KeyError to OSError
        if isinstance(error, OSError) and error.filename:  # the system's, not torch's
            raise
        raise ValueError(f"{path} is no readable checkpoint: {unreadable(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no readable checkpoint: it holds a {type(found).__name__}")
    return found


def unreadable(error: Exception) -> str:
    """torch's reason in short; which function it was where a file asks for one that no weights need."""
    reason = " ".join(str(error).split()) or "it ends too early"
    if named := re.search(r"[Uu]nsupported (?:global: |class )?GLOBAL ([\w.]+)", reason):
        return f"it wants to run {named[1]}, which no weights need: refused"
    return reason.rpartition("WeightsUnpickler error: ")[2][:200]


def read_weights(path: str | Path, key: str, first: str, project: str) -> State:
    """The weights of another project: those under ``key``, or of a file that holds nothing else.

    Raises:
        ValueError: none of them is called ``first``.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint.get(key, checkpoint)
    if not isinstance(state, dict) or first not in state:
        raise ValueError(f"{path} is no checkpoint of {project}: there is no {first} in it")
    return state


def below(prefix: str, state: State) -> State:
    """Tensors whose names begin with ``prefix``, which is taken off."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
