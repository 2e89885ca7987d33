"""The files of a tar shard, and the samples that their names make of them."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from clipgen.data.decoding import EXTENSIONS, UNREADABLE_EXTENSIONS, UnusableImageError, has_ending, looks_like_image
from clipgen.data.skip_counter import SkipCounter

# A larger file is refused before it is read: two megabytes of a compressed or sparse one may stand for gigabytes.
MAX_MEMBER_BYTES = 1 << 28
# So much of files whose names begin alike is held at once, to find out which belong together.
_GROUP_FILES = 64
_GROUP_BYTES = 1 << 28
_HEADER_BYTES = 1 << 20  # of an extended header, which holds names
_LABEL = ".cls"
_LABEL_BYTES = 1024
_EXTENDED_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


@dataclass
class Sample:
    """A picture of a shard, with its class.

    Args:
        url: the shard.
        name: path of the picture inside the shard.
        image: its bytes.
        label: content of its `.cls` file; None where there is none.
    """

    url: str
    name: str
    image: bytes
    label: bytes | None


@dataclass
class Member:
    """A file of a shard that is of use: a picture or a label.

    Args:
        name: path inside the shard.
        base: the path up to the first dot of its last part, which webdataset groups by.
        stem: the path without its ending.
        label: whether it holds a label.
    """

    name: str
    base: str
    stem: str
    label: bool
    data: bytes = b""


def read_members(stream: IO[bytes], url: str, tally: SkipCounter) -> Iterator[Member]:
    """Read the pictures and labels of a shard in order, compressed or not; count the pictures that are refused.

    Raises:
        tarfile.TarError, OSError, EOFError: the shard is broken; what came before has been yielded.
    """
    with _Archive.open(fileobj=stream, mode="r|*") as archive:
        while (info := archive.next()) is not None:
            try:
                member = _useful(info)
                if member is None:
                    continue
                member.data = _content(archive, info, member.label)
                if not has_ending(member.name) and not looks_like_image(member.data[:32]):
                    raise UnusableImageError("not an image", "it has no ending")
            except UnusableImageError as error:
                tally.skip(f"{url}: {info.name}", error)
                continue
            yield member


def group_samples(members: Iterable[Member], url: str, tally: SkipCounter) -> Iterator[Sample]:
    """Make samples of the members of a shard; count the pictures that belong to another one's sample.

    As in webdataset's shards, neighbors whose names are the same up to the first dot may belong together: `0.cls` is
    the label of `0.jpg`, and `0.seg.png` a part of the same sample. Pictures that numbers tell apart (`clip.0001.png`,
    `clip.0002.png`), and those of which none is named by the base alone, are samples of their own.
    """
    group: list[Member] = []
    for member in members:
        if group and member.base != group[0].base:
            yield from _split(group, url, tally)
            group = []
        elif _is_large(group):
            complete = [other for other in group if other.stem != member.stem] or group
            yield from _split(complete, url, tally)
            group = [] if complete is group else [other for other in group if other.stem == member.stem]
        group.append(member)
    yield from _split(group, url, tally)


def _split(group: list[Member], url: str, tally: SkipCounter) -> Iterator[Sample]:
    """Make samples of the members of one base."""
    labels = {member.stem: member.data for member in group if member.label}
    pictures = [member for member in group if not member.label]
    chosen: dict[str, Member] = {}
    for picture in sorted(pictures, key=lambda each: each.name.lower().endswith(UNREADABLE_EXTENSIONS)):
        used = chosen.setdefault(picture.stem, picture)
        if used is not picture:
            detail = "it is there twice" if used.name == picture.name else f"{used.name} is used"
            # The name alone would be that of the picture which is used.
            tally.skip(f"{url}: second {picture.name}", UnusableImageError("same name", detail))
    for picture in pictures:
        if chosen[picture.stem] is not picture:
            continue
        main = chosen.get(picture.base)
        if main not in (None, picture) and not _numbered(picture):
            tally.set_aside(f"{url}: {picture.name}", main.name)  # type: ignore[union-attr]
        else:
            yield Sample(url, picture.name, picture.data, labels.get(picture.stem, labels.get(picture.base)))


def _is_large(group: list[Member]) -> bool:
    return len(group) >= _GROUP_FILES or sum(len(member.data) for member in group) > _GROUP_BYTES


def _numbered(member: Member) -> bool:
    """Return whether a number follows the base: `clip.0001.png`, but not `0.seg.png`."""
    return any(part[:1].isdigit() for part in member.stem[len(member.base) :].split("."))


def _useful(info: tarfile.TarInfo) -> Member | None:
    """Return the member without its data; None of what is no picture and no label.

    Raises:
        UnusableImageError: it is a picture that is not stored as a plain file.
    """
    folder, slash, last = info.name.rpartition("/")
    if info.isdir() or last.startswith(".") or re.match(r"__[^/]*__($|/)", info.name):
        return None
    ending = Path(last).suffix.lower() if has_ending(last) else ""
    if ending not in (*EXTENSIONS, *UNREADABLE_EXTENSIONS, _LABEL, ""):
        return None
    if not info.isreg():
        raise UnusableImageError("unreadable", "a link or a device inside a tar file")
    stem = folder + slash + last[: len(last) - len(ending)]
    base = folder + slash + last.split(".", 1)[0]
    return Member(info.name, base, stem, ending == _LABEL)


def _content(archive: tarfile.TarFile, info: tarfile.TarInfo, label: bool) -> bytes:
    """Read a member, or raise UnusableImageError where it is sparse or too large."""
    limit = _LABEL_BYTES if label else MAX_MEMBER_BYTES
    if info.issparse():
        raise UnusableImageError("too large", "a sparse file inside a tar file")
    if info.size > limit:
        raise UnusableImageError("too large", f"{info.size} bytes inside a tar file, above {limit}")
    file = archive.extractfile(info)
    assert file is not None  # as it is a plain file
    return file.read()


class _Info(tarfile.TarInfo):
    """A member whose headers are bounded; tarfile reads extended ones, and the maps of sparse files, whole."""

    sparse: Any

    def _proc_member(self, archive: Any) -> Any:
        if self.type in _EXTENDED_HEADERS and self.size > _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes, above {_HEADER_BYTES}")
        return super()._proc_member(archive)  # type: ignore[misc]

    def _proc_sparse(self, archive: Any) -> Any:
        _, extended, _ = self._sparse_structs  # type: ignore[attr-defined]
        while extended:
            block = archive.fileobj.read(tarfile.BLOCKSIZE)
            extended = len(block) == tarfile.BLOCKSIZE and bool(block[504])
        self.sparse = []  # never read
        self.offset_data = archive.fileobj.tell()
        archive.offset = self.offset_data + self._block(self.size)  # type: ignore[attr-defined]
        return self

    def _proc_gnusparse_10(self, following: Any, pax_headers: Any, archive: Any) -> None:
        following.sparse = []


class _Archive(tarfile.TarFile):
    """A tar file that is read in order, and tells of every break, where tarfile takes a damaged header for the end.

    A tar file that was appended to another one by `cat` is read, too.
    """

    tarinfo = _Info
    exhausted = False

    def next(self) -> tarfile.TarInfo | None:
        """Return the next member; None at the end."""
        if self.exhausted:
            return None
        following = getattr(self, "firstmember", None) or self._following()
        self.firstmember = None
        self.exhausted = following is None
        return following

    def _following(self) -> tarfile.TarInfo | None:
        file: Any = self.fileobj
        if self.offset != file.tell():
            file.seek(self.offset - 1)
            if not file.read(1):
                raise tarfile.ReadError("unexpected end of data")
        ended = False
        while True:
            try:
                return self.tarinfo.fromtarfile(self)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                self.offset += tarfile.BLOCKSIZE
                ended = True
            except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
                if ended:
                    return None
                raise tarfile.ReadError("it ends without the mark of its end") from None
            except tarfile.HeaderError as error:
                raise tarfile.ReadError(f"damaged header: {error}") from error
