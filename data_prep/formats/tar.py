"""WebDataset shards: a tar file with the members ``00000017.cls``, ``00000017.jpg`` and ``00000017.seg.png`` of sample 17.

They are written by webdataset's own TarWriter. With a fixed time and owner its bytes depend on the samples alone; the image
keeps the ending that fits its bytes (jpg, png, webp, ...), and a sample without a label has no ``.cls``.

Scanning does not use the ``tarfile`` archive reader: it takes a damaged header for the end of the archive, and reads a
long-name record of any size into memory. Only its parser of one 512-byte header is used. Members are grouped as webdataset
does it: the key ends at the first dot of the base name.
"""

from __future__ import annotations

import logging
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.formats.base import (
    Problems,
    Scan,
    ShardError,
    StoredSample,
    as_sequence,
    describe,
    fill_record,
    image_extension,
    new_records,
    parse_label,
    probe_image,
)
from nepa_dist.data.index import ENCODED, INDEX_DTYPE, RAW, ShardRecord
from nepa_dist.data.prepared import crc32c_function

LABEL = "cls"
MASK = "seg.png"

_log = logging.getLogger(__name__)

_BLOCK = tarfile.BLOCKSIZE
_MAX_EXTENDED = 1 << 20
"""Bytes of a long name or of PAX records."""

_IMAGES = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif"))
_LABELS = frozenset((LABEL, "class", "label"))
_MASKS = frozenset((MASK, "mask.png", "seg", "mask"))
_CODE = frozenset(("pkl", "pickle", "pyd", "pth", "pt", "joblib", "dill"))
_KEY = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)", re.DOTALL)  # webdataset's rule
_META = re.compile(r"__[^/]*__($|/)")  # webdataset leaves these out, too
_PAX = re.compile(rb"([0-9]{1,20}) ")
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


def shard_name(k: int) -> str:
    """File name of shard k."""
    return f"shard-{k:05d}.tar"


def write_shard(path: Path, samples: Iterable[StoredSample], *, with_mask: bool) -> NDArray[Any]:
    """Write a shard, see :class:`data_prep.formats.base.Format`. Raw pixels are refused."""
    from webdataset.writer import TarWriter  # brings torch along

    crc32c = crc32c_function()
    samples = as_sequence(samples)
    records = new_records(samples)
    with open(path, "wb") as file, TarWriter(file, user="", group="", mtime=0, encoder=False) as writer:
        for record, sample in zip(records, samples, strict=True):
            try:
                members = _members(sample, with_mask)
                end, places = writer.tarstream.offset, {}
                for ending in sorted(members):  # TarWriter's order
                    places[ending] = end + _BLOCK
                    end += _BLOCK + _padded(len(members[ending]))
                image = next(ending for ending in members if ending in _IMAGES)
                fill_record(record, sample, places[image], places.get(MASK, 0), crc32c)
            except ValueError as error:
                raise ShardError(path, [(describe(sample), str(error))]) from None
            writer.write({"__key__": f"{sample.id:08d}", **members})
            if writer.tarstream.offset != end:
                raise RuntimeError(f"webdataset put {describe(sample)} at an unexpected place of {path}")
    return records


def finish(folder: Path, shards: Sequence[ShardRecord]) -> None:
    """Nothing: webdataset needs the shards alone."""


def scan_shard(path: Path) -> Scan:
    """Read any WebDataset shard that is not compressed, see :class:`data_prep.formats.base.Format`.

    Folders, names without an ending and webdataset's ``__meta__`` members belong to no sample; a warning counts them.
    """
    problems = Problems(path)
    crc32c = crc32c_function()
    rows, keys = [], []
    ignored: list[str] = []
    with open(path, "rb") as file:
        for key, members in _samples(file, problems, ignored):
            record = np.zeros(1, INDEX_DTYPE)[0]
            try:
                _fill(record, members, file, crc32c)
            except ValueError as error:
                problems.add(f"sample {key}", str(error))
                continue
            rows.append(record)
            keys.append(key)
    problems.check()
    if not rows:
        raise problems.fatal("", "it holds no samples")
    if ignored:
        _log.warning("%s: %d members belong to no sample and are left out, the first is %s", path, len(ignored), ignored[0])
    return Scan(np.array(rows, INDEX_DTYPE), keys)


class _Member(NamedTuple):
    name: str
    offset: int
    length: int


def _members(sample: StoredSample, with_mask: bool) -> dict[str, bytes]:
    """Ending -> content."""
    if sample.encoding == RAW:
        raise ValueError("raw pixels fit in beton shards only")
    ending = image_extension(sample.image)
    if ending is None:
        raise ValueError("it is no image of a known format")
    members = {ending: sample.image}
    if sample.label != -1:
        members[LABEL] = str(sample.label).encode()
    if with_mask and sample.mask:
        members[MASK] = sample.mask
    return members


def _fill(record: Any, members: dict[str, _Member], file: BinaryIO, crc32c: Any) -> None:
    """Make the record of one sample. Raises ValueError with the reason why it cannot be used."""
    masks = [ending for ending in members if ending in _MASKS]
    labels = [ending for ending in members if ending in _LABELS]
    images = [ending for ending in members if ending in _IMAGES] or [
        ending for ending in members if ending.rpartition(".")[2] in _IMAGES and ending not in _MASKS
    ]
    for what, found in (("image", images), ("label", labels), ("mask", masks)):
        if len(found) > 1:
            raise ValueError(f"has {len(found)} {what} members: {', '.join(found)}")
    if not images:
        raise ValueError(f"has no image among its members: {', '.join(members)}")
    image = _read(file, members[images[0]])
    info = probe_image(image)
    record["encoding"], record["height"], record["width"] = ENCODED, info.height, info.width
    record["offset"], record["length"], record["crc"] = members[images[0]].offset, len(image), crc32c(image)
    record["label"] = -1
    if labels:
        if members[labels[0]].length > 64:
            raise ValueError(f"the label has {members[labels[0]].length} bytes")
        record["label"] = parse_label(_read(file, members[labels[0]]))
    if masks:
        mask = _read(file, members[masks[0]])
        if image_extension(mask) != "png":
            raise ValueError("the mask is no PNG")
        record["mask_offset"], record["mask_length"], record["mask_crc"] = members[masks[0]].offset, len(mask), crc32c(mask)


def _samples(file: BinaryIO, problems: Problems, ignored: list[str]) -> Iterator[tuple[str, dict[str, _Member]]]:
    """Key and members of each sample: ending in lower case -> member."""
    seen: set[str] = set()
    key, members = None, dict[str, _Member]()
    for member in _walk(file, problems, ignored):
        match = _KEY.fullmatch(member.name)
        if match is None or _META.match(member.name):
            ignored.append(member.name)
            continue
        ending = match[2].lower()
        if ending.rpartition(".")[2] in _CODE:
            problems.add(f"member {member.name}", "such a file can run code when it is loaded; it is refused")
            continue
        if match[1] != key:
            if key is not None:
                yield key, members
            key, members = match[1], {}
            if key in seen:
                problems.add(f"sample {key}", "the key comes twice, or its members do not follow each other")
            seen.add(key)
        if ending in members:
            problems.add(f"member {member.name}", "it comes twice")
        members[ending] = member
    if key is not None:
        yield key, members


def _walk(file: BinaryIO, problems: Problems, ignored: list[str]) -> Iterator[_Member]:
    """Plain files of the archive; the position of ``file`` is free between two of them."""
    size = file.seek(0, 2)
    position, long_name, pax = 0, None, dict[str, str]()
    while True:
        header = _header(file, position, size, problems)
        if header is None:
            return
        start = position + _BLOCK
        extended = header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
        name = header.name if extended else pax.get("path", long_name if long_name is not None else header.name)
        length = header.size if extended else _size(pax, header.size)
        if length is None or length < 0 or start + length > size:
            raise problems.fatal(
                f"member {_shown(name)}", "it is longer than the rest of the file: the file was cut or is damaged"
            )
        position = start + _padded(length)
        if extended:
            if length > _MAX_EXTENDED:
                raise problems.fatal(f"member at byte {start - _BLOCK}", f"a name or attributes of {length} bytes")
            file.seek(start)
            data = file.read(length)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = data.rstrip(b"\0").decode("utf-8", "backslashreplace")
            elif header.type == tarfile.XHDTYPE:
                pax = _pax_records(data, problems, start)
            continue
        long_name, sparse, pax = None, any(key.startswith("GNU.sparse") for key in pax), {}
        if reason := _refusal(header, name, sparse):
            problems.add(f"member {_shown(name)}", reason)
        elif header.isdir():
            ignored.append(name)
        else:
            yield _Member(name, start, length)


def _header(file: BinaryIO, position: int, size: int, problems: Problems) -> tarfile.TarInfo | None:
    """The header at ``position``; None at the mark that ends an archive."""
    file.seek(position)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise problems.fatal(f"byte {position}", "the file ends without the mark of an archive's end: it was cut")
    if block.count(0) == _BLOCK:
        while rest := file.read(1 << 20):
            if rest.count(0) != len(rest):
                raise problems.fatal(f"byte {position}", "there is data behind the end of the archive")
        if size < position + 2 * _BLOCK:
            raise problems.fatal(f"byte {position}", "half of the mark of the archive's end is missing: the file was cut")
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except (tarfile.HeaderError, ValueError, OverflowError):
        what = "it is no tar file" if position == 0 else "a member's header is damaged"
        raise problems.fatal(f"byte {position}", f"{what} (compressed archives must be unpacked first)") from None


def _pax_records(data: bytes, problems: Problems, where: int) -> dict[str, str]:
    """Parse ``LENGTH KEY=VALUE\\n`` records."""
    records = {}
    position = 0
    while position < len(data) and data[position]:
        match = _PAX.match(data, position)
        length = int(match[1]) if match else 0
        record = data[position : position + length]
        if match is None or position + length > len(data) or b"=" not in record or not record.endswith(b"\n"):
            raise problems.fatal(f"byte {where + position}", "damaged PAX attributes")
        key, _, value = record[match.end() - position : -1].partition(b"=")
        records[key.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
        position += length
    return records


def _size(pax: dict[str, str], default: int) -> int | None:
    """Length of a member; None if its PAX record is no number."""
    text = pax.get("size")
    if text is None:
        return default
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _refusal(header: tarfile.TarInfo, name: str, sparse: bool) -> str | None:
    """Why a member must not be there."""
    if sparse or not (header.isreg() or header.isdir()) or header.type == tarfile.GNUTYPE_SPARSE:
        kind = "a sparse file" if sparse else _KINDS.get(header.type, f"of the unknown kind {header.type!r}")
        return f"it is {kind}; only plain files are read"
    if name.startswith("/"):
        return "its name is an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return "its name leads out of the folder ('..')"
    if not name or not name.isprintable():
        return "its name is empty or holds control characters"
    return None


def _read(file: BinaryIO, member: _Member) -> bytes:
    file.seek(member.offset)
    data = file.read(member.length)
    if len(data) != member.length:
        raise ValueError("the file ended while it was read")
    return data


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK


def _shown(name: str) -> str:
    return name if name.isprintable() else ascii(name)
