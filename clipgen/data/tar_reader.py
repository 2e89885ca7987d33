"""Read the files of a tar shard, and group them into samples by their names."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from clipgen.data.decoding import (
    EXTENSIONS,
    UNREADABLE_EXTENSIONS,
    UnusableImageError,
    has_extension,
    looks_like_image,
)
from clipgen.data.decompression import is_compressed, open_decompressed
from clipgen.data.skip_counter import SkipCounter

# Larger files are refused before they are read: two megabytes of a compressed or sparse file may expand to gigabytes.
MAX_MEMBER_BYTES = 1 << 28
# Limits of the group of files with the same base name that is held in memory to find out which belong together.
_MAX_GROUP_FILES = 64
_MAX_GROUP_BYTES = 1 << 28
# Limits of extended headers, which contain long names: their size, and their number before a file.
_MAX_HEADER_BYTES = 1 << 20
_MAX_HEADERS = 16
_BLOCK_BYTES = 1 << 20
_LABEL_EXTENSION = ".cls"
_MAX_LABEL_BYTES = 1024
_EXTENDED_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


@dataclass
class Sample:
    """An image of a shard, with its class.

    Args:
        url: the shard.
        name: path of the image inside the shard.
        image: bytes of the image file.
        label: content of its ``.cls`` file, or None.
    """

    url: str
    name: str
    image: bytes
    label: bytes | None


@dataclass
class Member:
    """An image or label file of a shard.

    Args:
        name: path inside the shard.
        base: path up to the first dot of the file name, by which webdataset groups files.
        stem: path without the extension.
        is_label: whether the file contains a label.
        data: content of the file.
    """

    name: str
    base: str
    stem: str
    is_label: bool
    data: bytes = b""


def read_members(stream: IO[bytes], url: str, skip_counter: SkipCounter) -> Iterator[Member]:
    """Read the images and labels of a shard in order, compressed or not; count the images that are refused.

    Raises:
        tarfile.TarError, OSError, EOFError: the shard is damaged; the files before the damage have been yielded.
    """
    with _Archive.open(fileobj=open_decompressed(stream), mode="r|") as archive:
        while (info := archive.next()) is not None:
            try:
                member = _read_member(archive, info)
            except UnusableImageError as error:
                skip_counter.skip(f"{url}: {info.name}", error)
                continue
            if member is not None:
                yield member
            elif info.isreg() and not _is_hidden(info.name):
                skip_counter.ignore_type(Path(info.name).suffix.lower())


def is_tar(path: Path) -> bool:
    """Return whether a file is a tar file, compressed or not, whose first member can be read.

    Raises:
        PermissionError: the file may not be read.
    """
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file, _Archive.open(fileobj=open_decompressed(file), mode="r|"):
            return True
    except PermissionError:
        raise
    except Exception:  # damaged headers raise anything
        return False


def count_samples(path: Path) -> int:
    """Return the number of samples with images in a local shard, as far as it can be read."""
    samples = group_samples(_members_without_content(path), str(path), _SilentCounter())
    return sum(not sample.name.lower().endswith(UNREADABLE_EXTENSIONS) for sample in samples)


class _SilentCounter(SkipCounter):
    """A counter that counts and logs nothing: the images that are refused are reported when they are read."""

    def __init__(self) -> None:
        pass

    def skip(self, name: str, error: UnusableImageError) -> bool:
        return False

    def set_aside(self, name: str, main_name: str) -> None:
        pass


def _members_without_content(path: Path) -> Iterator[Member]:
    """Yield the images and labels of a local shard without their content."""
    # Errors are reported when the images are read.
    with suppress(Exception), path.open("rb") as file, _open_local(file) as archive:
        while (info := archive.next()) is not None:
            with suppress(UnusableImageError):
                member = _member_of(info)
                if member is not None and (has_extension(member.name) or _starts_like_image(archive, info)):
                    yield member


def _starts_like_image(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bool:
    file = archive.extractfile(info)
    return file is not None and looks_like_image(file.read(32))


def _open_local(file: IO[bytes]) -> _Archive:
    """Open a tar file on the disk, compressed or not. Without compression, content that is not read is skipped."""
    compressed = is_compressed(file)
    file.seek(0)
    if compressed:
        return _Archive.open(fileobj=open_decompressed(file), mode="r|")
    return _Archive.open(fileobj=file, mode="r:")


def _read_member(archive: tarfile.TarFile, info: tarfile.TarInfo) -> Member | None:
    """Return an image or a label; None for any other file.

    Raises:
        UnusableImageError: the file is refused.
    """
    member = _member_of(info)
    if member is None:
        return None
    member.data = _read_content(archive, info, _MAX_LABEL_BYTES if member.is_label else MAX_MEMBER_BYTES)
    if not has_extension(member.name) and not looks_like_image(member.data[:32]):
        raise UnusableImageError("not an image", "the name has no extension")
    return member


def _member_of(info: tarfile.TarInfo) -> Member | None:
    """Return the member without its data; None for a file that is neither an image nor a label.

    Raises:
        UnusableImageError: the file is an image that is not stored as a plain file.
    """
    folder, slash, file_name = info.name.rpartition("/")
    if info.isdir() or _is_hidden(info.name):
        return None
    extension = Path(file_name).suffix.lower() if has_extension(file_name) else ""
    if extension not in (*EXTENSIONS, *UNREADABLE_EXTENSIONS, _LABEL_EXTENSION, ""):
        return None
    if not info.isreg():
        raise UnusableImageError("unreadable", "a link or a device inside a tar file")
    stem = folder + slash + file_name[: len(file_name) - len(extension)]
    base = folder + slash + file_name.split(".", 1)[0]
    return Member(info.name, base, stem, is_label=extension == _LABEL_EXTENSION)


def _is_hidden(name: str) -> bool:
    """Return whether a file is hidden, or has a name like ``__meta__``, which webdataset reserves."""
    return name.rpartition("/")[2].startswith(".") or re.match(r"__[^/]*__($|/)", name) is not None


def _read_content(archive: tarfile.TarFile, info: tarfile.TarInfo, max_bytes: int) -> bytes:
    """Read a file of a shard.

    Raises:
        UnusableImageError: the file is sparse or too large.
    """
    if info.issparse():
        raise UnusableImageError("too large", "a sparse file inside a tar file")
    if info.size > max_bytes:
        raise UnusableImageError("too large", f"{info.size} bytes inside a tar file, above {max_bytes}")
    file = archive.extractfile(info)
    assert file is not None  # because it is a plain file
    return file.read()


# ------------------------------------------------------------------------------------------------------------- samples


def group_samples(members: Iterable[Member], url: str, skip_counter: SkipCounter) -> Iterator[Sample]:
    """Group the members of a shard into samples; count the images that belong to the sample of another image.

    As in webdataset, consecutive files whose names are equal up to the first dot may belong together: ``0.cls`` is the
    label of ``0.jpg``, and ``0.seg.png`` a part of the same sample. Images that differ by a number (``clip.0001.png``,
    ``clip.0002.png``), and groups in which no image is named by the base alone, are samples of their own.
    """
    group: list[Member] = []
    for member in members:
        if group and member.base != group[0].base:
            yield from _split_group(group, url, skip_counter)
            group = []
        elif _is_large(group):
            # The files of the current stem may be incomplete, so they stay in memory if there are others.
            complete = [other for other in group if other.stem != member.stem]
            incomplete = [other for other in group if other.stem == member.stem]
            if complete:
                yield from _split_group(complete, url, skip_counter)
                group = incomplete
            else:
                yield from _split_group(group, url, skip_counter)
                group = []
        group.append(member)
    yield from _split_group(group, url, skip_counter)


def _split_group(group: list[Member], url: str, skip_counter: SkipCounter) -> Iterator[Sample]:
    """Yield the samples of members with the same base."""
    labels = {member.stem: member.data for member in group if member.is_label}
    images = [member for member in group if not member.is_label]
    image_of_stem = _choose_images(images, url, skip_counter)
    for image in images:
        if image_of_stem[image.stem] is not image:
            continue
        main_image = image_of_stem.get(image.base)
        if main_image is None or main_image is image or _is_numbered(image):
            label = labels.get(image.stem, labels.get(image.base))
            yield Sample(url, image.name, image.data, label)
        else:
            skip_counter.set_aside(f"{url}: {image.name}", main_image.name)


def _choose_images(images: list[Member], url: str, skip_counter: SkipCounter) -> dict[str, Member]:
    """Choose one image per stem, preferably of a format that can be decoded; count the others."""
    chosen: dict[str, Member] = {}
    for image in sorted(images, key=lambda member: member.name.lower().endswith(UNREADABLE_EXTENSIONS)):
        used = chosen.setdefault(image.stem, image)
        if used is not image:
            detail = "the name occurs twice" if used.name == image.name else f"{used.name} is used"
            # The name alone could be that of the image that is used.
            skip_counter.skip(f"{url}: second {image.name}", UnusableImageError("same name", detail))
    return chosen


def _is_large(group: list[Member]) -> bool:
    return len(group) >= _MAX_GROUP_FILES or sum(len(member.data) for member in group) > _MAX_GROUP_BYTES


def _is_numbered(member: Member) -> bool:
    """Return whether a number follows the base, as in ``clip.0001.png``, but not in ``0.seg.png``."""
    return any(part[:1].isdigit() for part in member.stem[len(member.base) :].split("."))


# ------------------------------------------------------------------------------------------------------------ archives


class _BoundedTarInfo(tarfile.TarInfo):
    """Header of a member with bounded memory; tarfile reads extended headers and maps of sparse files of any size."""

    sparse: Any

    def _proc_member(self, archive: Any) -> Any:
        if self.type in _EXTENDED_HEADERS:
            if self.size > _MAX_HEADER_BYTES:
                raise tarfile.ReadError(f"a header of {self.size} bytes, above {_MAX_HEADER_BYTES}")
            archive.num_headers += 1
            if archive.num_headers > _MAX_HEADERS:
                raise tarfile.ReadError(f"a file with more than {_MAX_HEADERS} headers")
        return super()._proc_member(archive)  # type: ignore[misc]

    def _proc_pax(self, archive: Any) -> Any:
        info = super()._proc_pax(archive)  # type: ignore[misc]
        # Headers for all files would add up; none of them matters to us.
        archive.pax_headers.clear()
        return info

    def _proc_sparse(self, archive: Any) -> Any:
        _, is_extended, _ = self._sparse_structs  # type: ignore[attr-defined]
        while is_extended:
            block = archive.fileobj.read(tarfile.BLOCKSIZE)
            is_extended = len(block) == tarfile.BLOCKSIZE and bool(block[504])
        # The content of sparse files is never read, so their maps are not kept.
        self.sparse = []
        self.offset_data = archive.fileobj.tell()
        archive.offset = self.offset_data + self._block(self.size)  # type: ignore[attr-defined]
        return self

    def _proc_gnusparse_10(self, next_info: Any, pax_headers: Any, archive: Any) -> None:
        next_info.sparse = []


class _Archive(tarfile.TarFile):
    """A tar file that is read in order and raises an error at any damage.

    tarfile takes a damaged header for the end of the file. Tar files that were concatenated by ``cat`` are also read.
    """

    tarinfo = _BoundedTarInfo
    exhausted = False
    # Extended headers of the current file.
    num_headers = 0

    def next(self) -> tarfile.TarInfo | None:
        """Return the next member; None at the end."""
        if self.exhausted:
            return None
        info = getattr(self, "firstmember", None) or self._read_header()
        self.firstmember = None
        self.exhausted = info is None
        return info

    def _read_header(self) -> tarfile.TarInfo | None:
        self._skip_content()
        end_marked = False
        self.num_headers = 0
        while True:
            try:
                return self.tarinfo.fromtarfile(self)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                # An empty block marks the end, but another tar file may follow.
                self.offset += tarfile.BLOCKSIZE
                end_marked = True
            except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
                if end_marked:
                    return None
                raise tarfile.ReadError("the file has no end-of-archive marker") from None
            except tarfile.HeaderError as error:
                raise tarfile.ReadError(f"damaged header: {error}") from error

    def _skip_content(self) -> None:
        """Move to the next header."""
        file: Any = self.fileobj
        if self.offset < file.tell():
            raise tarfile.ReadError("a file of negative size")
        # A stream is read, because the seeking of tarfile does not stop at its end.
        is_seekable = hasattr(file, "seekable") and file.seekable()
        if is_seekable and self.offset > file.tell():
            file.seek(self.offset - 1)
        while self.offset > file.tell():
            if not file.read(min(self.offset - file.tell(), _BLOCK_BYTES)):
                raise tarfile.ReadError("unexpected end of data")
