"""List the images of a folder, without importing torch."""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from clipgen.data.decoding import EXTENSIONS, UNREADABLE_EXTENSIONS, has_extension, looks_like_image, read_start
from clipgen.data.packed_strings import PackedStrings
from clipgen.storage.files import printable

logger = logging.getLogger(__name__)

# From this number on, shards are recommended.
_MANY_FILES = 10_000_000
# Number of other types of files that are named.
_MAX_TYPES = 10


class FolderListing:
    """The files below a folder, except hidden ones, as POSIX paths relative to it.

    Args:
        root: the folder.
        option: name of the option that contains it, for errors.

    Attributes:
        images: files that are named like images, or have no extension and begin like an image; sorted.
        no_extension: files without an extension that are not images.
        unreadable_folders: folders that cannot be listed, each with the reason.
        others: number of files of other types, by extension.

    Raises:
        FileNotFoundError, NotADirectoryError: ``root`` is not a folder.
    """

    def __init__(self, root: Path, option: str = "root"):
        if not root.exists():
            raise FileNotFoundError(f"{option} must be an existing folder of images, got {root}")
        if not root.is_dir():
            raise NotADirectoryError(
                f"{option} must be a folder of images (for tar shards: data=webdataset), got {root}"
            )
        self.root = root
        self.no_extension: list[str] = []
        self.unreadable_folders: dict[str, str] = {}
        self.others: Counter[str] = Counter()
        self.images = PackedStrings(self._find_images())
        if self.others:
            counts = [f"{count} {extension}" for extension, count in self.others.most_common(_MAX_TYPES)]
            more = ", ..." if len(self.others) > _MAX_TYPES else ""
            logger.info("%s: files of other types are not used: %s%s", printable(str(root)), ", ".join(counts), more)

    def require_images(self) -> PackedStrings:
        """Return the images; raise ValueError if there are none."""
        if not self.images:
            num_others = self.others.total() + len(self.no_extension)
            got = f"{num_others} files of other types" if num_others else "no files"
            if self.unreadable_folders:
                got += f" and {len(self.unreadable_folders)} folders that cannot be listed"
            raise ValueError(f"{self.root} must contain {', '.join(EXTENSIONS)} files, got {got}")
        return self.images

    def _find_images(self) -> Iterator[str]:
        """Yield the images in order, and note the other files; only the names of open folders are in memory."""
        num_images = 0
        visited: set[str] = set()
        # The next path is the last one.
        pending = [""]
        while pending:
            path = pending.pop()
            if not path or path.endswith("/"):
                pending += reversed(self._list_folder(path, visited))
            elif self._is_image(path):
                num_images += 1
                if num_images == _MANY_FILES:
                    _warn_of_many_files(self.root)
                yield path

    def _list_folder(self, folder: str, visited: set[str]) -> list[str]:
        """Return the paths in a folder. Those of sub-folders end in "/", which makes the order that of all paths."""
        # Links may lead in circles, so each folder is visited only once, under its first name.
        real_path = os.path.realpath(self.root / folder)
        if real_path in visited:
            return []
        visited.add(real_path)
        try:
            with os.scandir(self.root / folder) as entries:
                names = [_name_in_order(entry) for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            self.unreadable_folders[folder.rstrip("/") or "."] = error.strerror or str(error)
            return []
        return [folder + name for name in sorted(names)]

    def _is_image(self, file: str) -> bool:
        """Return whether a file is an image; count it if it is not."""
        name = file.rpartition("/")[2]
        if name.lower().endswith((*EXTENSIONS, *UNREADABLE_EXTENSIONS)):
            return True
        if has_extension(name):
            self.others[Path(name).suffix.lower()] += 1
            return False
        if looks_like_image(read_start(self.root / file)):
            return True
        self.no_extension.append(file)
        return False


def _name_in_order(entry: os.DirEntry[str]) -> str:
    """Return the name of a file, or that of a folder with "/" behind it."""
    try:
        return f"{entry.name}/" if entry.is_dir() else entry.name
    except OSError:
        # A link that cannot be followed is reported when the file is read.
        return entry.name


def _warn_of_many_files(root: Path) -> None:
    logger.warning(
        "%s contains at least %d images, which are all listed and opened before a training run starts: "
        "tar shards start faster (python -m clipgen make_shards, data=webdataset)",
        root,
        _MANY_FILES,
    )


def find_images(root: Path) -> list[str]:
    """List the images below ``root``, as sorted POSIX paths relative to it; see ``FolderListing``.

    Raises:
        FileNotFoundError, NotADirectoryError: ``root`` is not a folder.
        PermissionError: a folder cannot be listed.
        ValueError: there are no images.
    """
    listing = FolderListing(root)
    for folder, reason in listing.unreadable_folders.items():
        raise PermissionError(errno.EACCES, f"the folder cannot be listed ({reason})", str(root / folder))
    return list(listing.require_images())


def check_holds_images(root: Path, option: str = "root") -> None:
    """Raise an error if a folder does not exist or contains no image; the first file named like one ends the search.

    Args:
        root: the folder.
        option: name of the option that contains it, for errors.

    Raises:
        FileNotFoundError, NotADirectoryError: ``root`` is not a folder.
        ValueError: there are no images.
    """
    for _, _, files in os.walk(root):
        if any(name.lower().endswith(EXTENSIONS) for name in files):
            return
    FolderListing(root, option).require_images()
