"""MDS shards of mosaicml-streaming: the columns ``id`` and ``label`` (int), ``image`` and, for segmentation, ``mask`` (bytes).

Layout, little-endian::

    uint32             number of samples N
    uint32 [N + 1]     where each sample starts in the file; the last is the end of the file
    JSON               the columns: names, encodings, sizes
    per sample         uint32 length of each column without a fixed size, then the columns

They are written here and not by streaming's MDSWriter, which wants a folder of its own (it empties one that is not), puts an
``index.json`` beside each shard that knows of no other, and needs a working torchvision to be imported. The bytes are the same
as MDSWriter's with ``size_limit=None, hashes=["sha256"]``. :func:`finish` writes the index of the whole split.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.files import write_file
from data_prep.formats.base import (
    MAX_SIDE,
    Problems,
    Scan,
    ShardError,
    StoredSample,
    as_sequence,
    check_label,
    describe,
    fill_record,
    image_extension,
    new_records,
    parse_label,
    probe_image,
)
from nepa_dist.data.index import ENCODED, INDEX_DTYPE, RAW, ShardRecord
from nepa_dist.data.prepared import crc32c_function

INDEX = "index.json"

_MAX_BYTES = 2**32 - 1
_MAX_CONFIG = 1 << 20
_INTEGERS = {
    "int": np.dtype("<i8"),
    **{f"{kind}int{bits}": np.dtype(f"<{'u' if kind else 'i'}{bits // 8}") for kind in ("", "u") for bits in (8, 16, 32, 64)},
}
_SIZES = {name: dtype.itemsize for name, dtype in _INTEGERS.items()} | {"float16": 2, "float32": 4, "float64": 8}
_FILES = ("bytes", "jpeg", "png")
"""Encodings whose value is the file itself."""
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "x")
_LABELS = ("label", "labels", "cls", "class", "target", "y")
_MASKS = ("mask", "seg", "segmentation", "annotation")
_KEYS = ("id", "key", "__key__", "filename", "name")


def shard_name(k: int) -> str:
    """File name of shard k, as streaming calls it."""
    return f"shard.{k:05d}.mds"


def write_shard(path: Path, samples: Iterable[StoredSample], *, with_mask: bool) -> NDArray[Any]:
    """Write a shard, see :class:`data_prep.formats.base.Format`. Raw pixels, and more than 4 GiB, are refused."""
    crc32c = crc32c_function()
    samples = as_sequence(samples)
    records = new_records(samples)
    config = json.dumps(_config(with_mask), sort_keys=True).encode()
    head = struct.Struct("<II" if with_mask else "<I")
    numbers = struct.Struct("<q")
    starts = np.zeros(len(samples) + 1, np.uint64)
    starts[0] = position = 4 + 4 * len(starts) + len(config)
    with open(path, "wb") as file:
        file.seek(position)
        for i, sample in enumerate(samples):
            mask = (sample.mask or b"") if with_mask else b""
            sizes = head.pack(len(sample.image), len(mask)) if with_mask else head.pack(len(sample.image))
            place = position + len(sizes) + 8
            mask_place = place + len(sample.image) + 8
            end = mask_place + len(mask)
            try:
                if sample.encoding == RAW:
                    raise ValueError("raw pixels fit in beton shards only")
                if end > _MAX_BYTES:
                    raise ValueError("an MDS shard holds less than 4 GiB: use more shards")
                fill_record(records[i], sample, place, mask_place if with_mask else 0, crc32c)
            except ValueError as error:
                raise ShardError(path, [(describe(sample), str(error))]) from None
            file.write(b"".join((sizes, numbers.pack(sample.id), sample.image, numbers.pack(sample.label), mask)))
            starts[i + 1] = position = end
        file.seek(0)
        file.write(struct.pack("<I", len(samples)) + starts.astype("<u4").tobytes() + config)
    return records


def finish(folder: Path, shards: Sequence[ShardRecord]) -> None:
    """Write streaming's ``index.json`` of all shards in one step."""
    entries = []
    for shard in shards:
        path = folder / shard.name
        with open(path, "rb") as file:
            config = _read_config(file, _read_starts(file, Problems(path)), Problems(path))
        info = {"basename": shard.name, "bytes": shard.bytes, "hashes": {"sha256": shard.sha256}}
        entries.append({**config, "samples": shard.num_samples, "raw_data": info, "zip_data": None})
    write_file(folder / INDEX, json.dumps({"version": 2, "shards": entries}, sort_keys=True).encode())


def scan_shard(path: Path) -> Scan:
    """Read any MDS shard that is not compressed, see :class:`data_prep.formats.base.Format`.

    The image, label, mask and key are found by the usual names of columns. A column of pickles is refused.
    """
    problems = Problems(path)
    crc32c = crc32c_function()
    with open(path, "rb") as file:
        starts = _read_starts(file, problems)
        columns = _columns(_read_config(file, starts, problems), problems)
        roles = _roles(columns, problems)
        records = np.zeros(len(starts) - 1, INDEX_DTYPE)
        keys, seen = [], set[str]()
        for i in range(len(records)):
            where = f"sample {i}"
            try:
                places = _split(file, int(starts[i]), int(starts[i + 1]), columns)
                key = _text(file, places, columns, roles["key"], str(i))
                if key in seen or not key.isprintable():
                    raise ValueError(f"its {roles['key']} {key!r} " + ("comes twice" if key in seen else "is not printable"))
                seen.add(key)
                keys.append(key)
                _fill(records[i], file, places, columns, roles, crc32c)
            except ValueError as error:
                problems.add(where, str(error))
    problems.check()
    return Scan(records, keys)


class _Column(NamedTuple):
    name: str
    encoding: str
    size: int | None
    """Bytes; None where each sample says it."""


_Places = dict[str, tuple[int, int]]
"""Column -> first byte in the file and length."""


def _config(with_mask: bool) -> dict[str, Any]:
    columns = {"id": "int", "image": "bytes", "label": "int"} | ({"mask": "bytes"} if with_mask else {})
    return {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": ["sha256"],
        "size_limit": None,
        "column_names": list(columns),
        "column_encodings": list(columns.values()),
        "column_sizes": [_SIZES.get(encoding) for encoding in columns.values()],
    }


def _read_starts(file: BinaryIO, problems: Problems) -> NDArray[np.int64]:
    """int64 [N + 1], where each sample starts."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(4)
    num_samples = int.from_bytes(head, "little")
    table_end = 4 + 4 * (num_samples + 1)
    if len(head) < 4 or not num_samples or table_end > size:
        raise problems.fatal(
            "header", f"it names {num_samples} samples, which do not fit in {size} bytes: this is no MDS shard"
        )
    starts = np.frombuffer(file.read(table_end - 4), "<u4").astype(np.int64)
    if len(starts) != num_samples + 1:
        raise problems.fatal("header", "the file ended while it was read")
    if (back := np.flatnonzero(np.diff(starts) <= 0)).size:
        i = int(back[0])
        raise problems.fatal(f"sample {i}", f"its bytes {starts[i]} to {starts[i + 1]} run backwards or are none")
    if starts[0] < table_end or starts[-1] != size:
        reason = f"the samples lie in bytes {starts[0]} to {starts[-1]} of {size}: the file was cut or is damaged"
        raise problems.fatal("header", reason)
    return starts


def _read_config(file: BinaryIO, starts: NDArray[np.int64], problems: Problems) -> dict[str, Any]:
    """The JSON object between the table and the first sample."""
    begin = 4 + 4 * len(starts)
    length = int(starts[0]) - begin
    if length > _MAX_CONFIG:
        raise problems.fatal("header", f"the description of the columns has {length} bytes")
    file.seek(begin)
    try:
        config = json.loads(file.read(length))
    except (ValueError, RecursionError):
        raise problems.fatal("header", "the description of the columns is no JSON") from None
    if not isinstance(config, dict) or config.get("version") != 2 or config.get("format") != "mds":
        raise problems.fatal("header", "this is no MDS shard of version 2")
    return config


def _columns(config: dict[str, Any], problems: Problems) -> list[_Column]:
    lists = [config.get(f"column_{what}") for what in ("names", "encodings", "sizes")]
    if not all(isinstance(each, list) for each in lists) or len({len(each) for each in lists if each is not None}) != 1:
        raise problems.fatal("header", "the lists of columns are missing or of different lengths")
    columns = [_Column(*parts) for parts in zip(*lists, strict=True)]
    for name, encoding, size in columns:
        if not (isinstance(name, str) and isinstance(encoding, str) and (size is None or (type(size) is int and size > 0))):
            raise problems.fatal("header", f"the column {name!r} has the encoding {encoding!r} and the size {size!r}")
        if encoding == "pkl":
            raise problems.fatal(f"column {name}", "pickles can run code when they are loaded; they are refused")
        if encoding in _SIZES and size != _SIZES[encoding]:
            raise problems.fatal(f"column {name}", f"{encoding} has {_SIZES[encoding]} bytes, not {size}")
    if len({column.name for column in columns}) != len(columns):
        raise problems.fatal("header", "two columns have the same name")
    return columns


def _roles(columns: Sequence[_Column], problems: Problems) -> dict[str, str | None]:
    """Which column is the image, the label, the mask and the key."""
    kinds = {column.name: column.encoding for column in columns}

    def find(names: Iterable[str], encodings: Iterable[str]) -> str | None:
        return next((name for name in names if kinds.get(name, "") in encodings), None)

    pictures = [name for name, kind in kinds.items() if kind in ("jpeg", "png", "pil")]
    image = find(_IMAGES, (*_FILES, "pil")) or (pictures[0] if len(pictures) == 1 else None)
    if image is None:
        described = ", ".join(f"{name}:{kind}" for name, kind in kinds.items())
        raise problems.fatal("header", f"none of the columns {described} is known to be an image (such as image:bytes)")
    label = find(_LABELS, (*_INTEGERS, "str_int"))
    return {
        "image": image,
        "label": label,
        "mask": find(_MASKS, ("bytes", "png")),
        "key": find((key for key in _KEYS if key not in (image, label)), ("int", "str")),
    }


def _split(file: BinaryIO, begin: int, end: int, columns: Sequence[_Column]) -> _Places:
    """Where the columns of one sample lie. Raises ValueError if they do not fill it."""
    variable = [column.name for column in columns if column.size is None]
    if 4 * len(variable) > end - begin:
        raise ValueError("it is too short to hold its columns")
    sizes = struct.unpack(f"<{len(variable)}I", _read(file, begin, 4 * len(variable)))
    given = dict(zip(variable, sizes, strict=True))
    places, position = {}, begin + 4 * len(variable)
    for column in columns:
        length = given[column.name] if column.size is None else column.size
        places[column.name] = position, length
        position += length
    if position != end:
        raise ValueError(f"its columns have {position - begin} bytes, but it has {end - begin}")
    return places


def _fill(
    record: Any,
    file: BinaryIO,
    places: _Places,
    columns: Sequence[_Column],
    roles: dict[str, str | None],
    crc32c: Callable[[bytes], int],
) -> None:
    """Make the record of one sample. Raises ValueError with the reason why it cannot be used."""
    kinds = {column.name: column.encoding for column in columns}
    image, label, mask = str(roles["image"]), roles["label"], roles["mask"]
    offset, length = places[image]
    data = _read(file, offset, length)
    if kinds[image] == "pil":
        header, height, width = _pil_header(data)
        record["encoding"], record["height"], record["width"] = RAW, height, width
        offset, data = offset + header, data[header:]
    else:
        info = probe_image(data)
        record["encoding"], record["height"], record["width"] = ENCODED, info.height, info.width
    record["offset"], record["length"], record["crc"] = offset, len(data), crc32c(data)
    record["label"] = -1
    if label is not None:
        value = _read(file, *places[label]) if places[label][1] <= 64 else b"(long)"
        kind = _INTEGERS.get(kinds[label])
        record["label"] = parse_label(value) if kind is None else check_label(int(np.frombuffer(value, kind)[0]))
    if mask is not None and places[mask][1]:
        data = _read(file, *places[mask])
        if image_extension(data) != "png":
            raise ValueError("the mask is no PNG")
        record["mask_offset"], record["mask_length"], record["mask_crc"] = places[mask][0], len(data), crc32c(data)


def _pil_header(data: bytes) -> tuple[int, int, int]:
    """Bytes before the pixels, height and width of streaming's ``pil`` encoding; only RGB is read."""
    if len(data) >= 12:
        width, height, length = struct.unpack_from("<III", data)
        fills = 0 < 3 * width * height == len(data) - 12 - length and max(width, height) <= MAX_SIDE
        if fills and data[12 : 12 + length] == b"RGB":
            return 12 + length, height, width
    raise ValueError("its pixels are not RGB, or do not fill the image")


def _text(file: BinaryIO, places: _Places, columns: Sequence[_Column], name: str | None, default: str) -> str:
    """The key of a sample."""
    if name is None:
        return default
    offset, length = places[name]
    if length > 4096:
        raise ValueError(f"its {name} has {length} bytes")
    data = _read(file, offset, length)
    kind = next(column.encoding for column in columns if column.name == name)
    return str(int.from_bytes(data, "little", signed=True)) if kind == "int" else data.decode("utf-8", "backslashreplace")


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    data = file.read(length)
    if len(data) != length:
        raise ValueError("the file ended while it was read")
    return data
