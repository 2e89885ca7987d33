"""A folder of results that are computed in parts, so that an interrupted computation can be resumed."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from clipgen.storage.files import read_json, write_json

RETRY_DELAYS = (1, 2, 4, 8)  # seconds
MAX_VALUE_LENGTH = 200  # characters of a value in an error message

Part = TypeVar("Part")


class ResumableStore:
    """A folder with an identity file and one file per part.

    The identity states what is computed and how. Each part depends only on the identity and is written atomically, so
    a part that exists is complete and is not computed again. Processes share the parts by rank, without communication.

    Args:
        folder: folder of the store; ``open`` creates it.
        identity_file: name of the JSON file with the identity.
        result_keys: keys that ``add_results`` adds to the identity file; they are not part of the identity.
    """

    def __init__(self, folder: Path, identity_file: str, result_keys: Collection[str] = ()):
        self.folder = folder
        self.identity_path = folder / identity_file
        self.result_keys = result_keys

    def read_identity(self) -> dict[str, Any]:
        """Read the identity, and the results once they were added."""
        return read_json(self.identity_path)

    def open(self, identity: Mapping[str, Any], prepare: Callable[[], None] = lambda: None) -> None:
        """Write the identity to a new store, or check that an existing store has the same one.

        Args:
            identity: JSON values that state what is computed and how.
            prepare: writes what belongs to a new store besides its parts. It runs before the identity is written, so
                that the identity file implies the other files.

        Raises:
            ValueError: the store has another identity; the message names the first difference.
        """
        # Processes that start together write the same files. The loser of such a race tries again.
        for delay in RETRY_DELAYS:
            try:
                return self._try_open(identity, prepare)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):
                    raise
                time.sleep(delay)
        self._try_open(identity, prepare)

    def _try_open(self, identity: Mapping[str, Any], prepare: Callable[[], None]) -> None:
        if self.identity_path.is_file():
            return self.require_same_identity(identity)
        self.folder.mkdir(parents=True, exist_ok=True)
        prepare()
        write_json(self.identity_path, identity)

    def require_same_identity(self, identity: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the first difference, if the store has another identity."""
        stored = self.read_identity()
        # A store that is complete also has results, a new identity does not.
        stored = {key: value for key, value in stored.items() if key not in self.result_keys}
        require_same_identity(self.folder, stored, identity)

    def write_missing(
        self,
        parts: Mapping[Path, Part],
        write: Callable[[Path, Part], None],
        on_existing: Callable[[Path], None] = lambda path: None,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Write the parts of this rank that do not exist yet.

        Args:
            parts: all parts of the store: the file of each, and what ``write`` needs to compute it.
            write: computes a part and writes its file atomically.
            on_existing: called for each part of this rank that exists already.
            rank: number of this process.
            world_size: number of processes that share the parts.
        """
        for path in list(parts)[rank::world_size]:
            if path.is_file():
                on_existing(path)
            else:
                write(path, parts[path])

    def is_complete(self, parts: Collection[Path]) -> bool:
        """Return whether all parts exist. Each process calls this after writing its own, so the last one gets True."""
        return all(path.is_file() for path in parts)

    def add_results(self, identity: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        """Write the identity file again, with results that are known only when all parts exist."""
        write_json(self.identity_path, {**identity, **results})


def require_same_identity(folder: Path, stored: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the first difference, if the stored identity of a folder differs from another one."""
    # Tuples become lists, as in the stored file.
    expected = json.loads(json.dumps(identity))
    for key in sorted({*stored, *expected}):
        if stored.get(key) != expected.get(key):
            stored_value = str(stored.get(key))[:MAX_VALUE_LENGTH]
            expected_value = str(expected.get(key))[:MAX_VALUE_LENGTH]
            raise ValueError(
                f"{folder} contains results computed with {key}={stored_value}, not {expected_value}; "
                "choose another output folder"
            )
