"""Where the files of a tar archive lie, read from its headers alone: nothing is unpacked and nothing is trusted.

The archive may itself lie inside another file, such as a class archive of ILSVRC2012 in the archive of all classes.
"""

from __future__ import annotations

import os
import tarfile
from typing import NamedTuple

from data_prep.sources import SourceError, one_line

_BLOCK = 512
_MAX_HEADER = 1 << 20
"""Bytes of a long name or of extended headers; more is an attack or damage."""

_MAX_NAME = 255
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


class Member(NamedTuple):
    """A plain file in an archive."""

    name: bytes
    """As stored, without a leading ``./``."""
    offset: int
    """First byte in the file that holds the archive."""
    size: int
    """Bytes."""


def scan(descriptor: int, start: int, size: int, where: str) -> list[Member]:
    """List the plain files of an uncompressed tar archive in their order; folders are passed over.

    Args:
        descriptor: open file; it is read with pread, so threads and forked processes may share it.
        start: first byte of the archive in the file.
        size: bytes of the archive.
        where: what to call it in messages.

    Raises:
        SourceError: it is damaged or cut off; or a member is no plain file, has an absolute name or one with ``..``, or occurs
            twice. The message names the member.
        OSError: the file cannot be read.
    """
    members: list[Member] = []
    names: set[bytes] = set()
    position = 0
    try:
        with tarfile.open(fileobj=_Window(descriptor, start, size), mode="r:", encoding="utf-8") as archive:  # type: ignore[call-overload]
            for info in archive:
                if info.offset_data <= position and position:
                    raise SourceError(f"{where} is damaged at byte {position}: a header leads back")
                if (name := _checked(info, where)) is not None:
                    if name in names:
                        raise SourceError(f"{where}: {one_line(name)!r} occurs twice")
                    names.add(name)
                    members.append(Member(name, start + info.offset_data, info.size))
                position = info.offset_data + -(-info.size // _BLOCK) * _BLOCK
                if position > size:
                    raise SourceError(f"{where} is cut off inside {one_line(info.name)!r}")
    except SourceError:
        raise
    except (tarfile.TarError, ValueError, IndexError, KeyError, OverflowError, RecursionError) as error:
        raise SourceError(f"{where} is no tar archive, or damaged after byte {position}: {error}") from None
    # tarfile takes a damaged header for the end of the archive, and would lose the rest without a word.
    if os.pread(descriptor, min(_BLOCK, size - position), start + position) != bytes(_BLOCK):
        raise SourceError(f"{where} is damaged or cut off at byte {position}: neither a member nor the end mark is there")
    return members


def _checked(info: tarfile.TarInfo, where: str) -> bytes | None:
    """Name of a plain file, None for a folder."""
    shown = one_line(info.name.encode("utf-8", "surrogateescape"))
    parts = info.name.split("/")
    if info.name.startswith("/") or ".." in parts:
        raise SourceError(f"{where}: the member {shown!r} points outside the archive")
    if info.isdir():
        return None
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.sparse is not None:
        what = _KINDS.get(info.type, "a sparse file" if info.sparse is not None else f"of type {info.type!r}")
        raise SourceError(f"{where}: the member {shown!r} is {what}; only plain files are read")
    name = info.name.removeprefix("./").encode("utf-8", "surrogateescape")
    if not name or b"\0" in name or len(name) > _MAX_NAME or info.size < 0:
        raise SourceError(f"{where}: the member {shown[:80]!r} has no usable name or size")
    return name


class _Window:
    """The part of a file that tarfile sees."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor, self._start, self._size = descriptor, start, size
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        if position < 0:
            raise ValueError("a header leads back")
        self._position = position
        return position

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _MAX_HEADER:
            raise ValueError(f"a header of {count} bytes")
        count = max(0, min(count, self._size - self._position))
        data = os.pread(self._descriptor, count, self._start + self._position)
        self._position += len(data)
        return data
