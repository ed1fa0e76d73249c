"""Shards in the format of ffcv (version 2): the fields ``image`` (RGBImageField), ``label`` (IntField) and, for segmentation,
``mask`` (BytesField with a PNG).

Layout, little-endian::

    header             version, number of fields, page size, number of samples, where the allocation table is
    fields             type and name of each
    metadata           one row per sample: mode, width, height and place of the image; label; place and size of the mask
    pages              from a multiple of the page size on; no sample crosses the border of a page
    allocation table   sample, place and size of each image and mask

They are written here and not by ffcv's DatasetWriter: it decodes every JPEG and encodes it anew, it hangs for ever if one
sample raises, it cannot be taken up again, and with several workers its bytes differ from run to run.

An image is stored as the JPEG file it is, or as raw pixels; ffcv can decode nothing else. Width and height are those of the
JPEG's pixels, which ffcv does not turn upright.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
    check_label,
    describe,
    fill_record,
    image_extension,
    new_records,
    probe_image,
)
from nepa_dist.data.index import ENCODED, INDEX_DTYPE, RAW, ShardRecord
from nepa_dist.data.prepared import crc32c_function

VERSION = 2
MIN_PAGE = 1 << 21
"""Bytes; the smallest page that ffcv allows."""
MAX_PAGE = 1 << 31

_HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table_ptr", "<u8")],
    align=True,
)
_FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
_ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
_BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])
_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_INT_TYPE, _IMAGE_TYPE, _BYTES_TYPE = 1, 2, 3
_TYPES = {0: np.dtype("<f8"), 1: np.dtype("<i8"), 2: _IMAGE, 3: _BYTES, 4: np.dtype("<u8"), 5: _BYTES, 6: np.dtype("<u8")}
"""Type of a field -> what a row of the metadata holds of it: float, int, image, bytes, array, JSON, tensor."""
_JPG_MODE, _RAW_MODE = 0, 1
_MAX_FIELDS = 256
_IMAGES = ("image", "img", "jpg", "jpeg", "x")
_LABELS = ("label", "labels", "cls", "class", "target", "y")
_MASKS = ("mask", "seg", "segmentation", "annotation")
_ADVICE = "use a policy that re-encodes, or another container"
_MODES = ("L", "RGB")


def shard_name(k: int) -> str:
    """File name of shard k."""
    return f"shard-{k:05d}.beton"


def write_shard(path: Path, samples: Iterable[StoredSample], *, with_mask: bool) -> NDArray[Any]:
    """Write a shard, see :class:`data_prep.formats.base.Format`.

    An image that is neither JPEG nor raw pixels is refused, and a JPEG that is neither gray nor RGB. The first sample is read
    twice, and all are if one does not fit in a page.
    """
    samples = as_sequence(samples)
    # A sixteenth of a page is lost at most, and small shards are not mostly padding.
    page_size = _page_for(16 * len(samples[0].image)) if samples else MIN_PAGE
    while True:
        try:
            return _write(path, samples, with_mask, min(page_size, MAX_PAGE))
        except _TooLarge as error:
            page_size = _page_for(error.size)


def finish(folder: Path, shards: Sequence[ShardRecord]) -> None:
    """Nothing: ffcv needs the shards alone."""


def scan_shard(path: Path) -> Scan:
    """Read any beton, see :class:`data_prep.formats.base.Format`.

    The image is the RGBImageField (``jpg``, ``raw``, ``smart`` or ``proportion``), or a BytesField of that name with an image
    file; label and mask are found by the usual names. ffcv names no samples: their keys are their numbers.
    """
    problems = Problems(path)
    crc32c = crc32c_function()
    with open(path, "rb") as file:
        layout = _read_layout(file, problems)
        records = np.zeros(len(layout.rows), INDEX_DTYPE)
        for i in range(len(records)):
            try:
                _fill(records[i], i, layout, file, crc32c)
            except ValueError as error:
                problems.add(f"sample {i}", str(error))
    problems.check()
    return Scan(records, [str(i) for i in range(len(records))])


class _TooLarge(Exception):
    """A sample does not fit in a page; ``size`` in bytes."""

    def __init__(self, size: int) -> None:
        self.size = size


def _page_for(size: int) -> int:
    """The smallest page that holds ``size`` bytes."""
    return max(MIN_PAGE, 1 << (size - 1).bit_length())


def _write(path: Path, samples: Sequence[StoredSample], with_mask: bool, page_size: int) -> NDArray[Any]:
    crc32c = crc32c_function()
    records = new_records(samples)
    fields = np.zeros(3 if with_mask else 2, _FIELD)
    fields["name"] = (b"image", b"label", b"mask")[: len(fields)]
    fields["type_id"] = (_IMAGE_TYPE, _INT_TYPE, _BYTES_TYPE)[: len(fields)]
    rows = np.zeros(len(samples), _row_type(fields["type_id"]))
    allocations: list[tuple[int, int, int]] = []
    front = _HEADER.itemsize + fields.nbytes + rows.nbytes
    position = _align(front, page_size)
    with open(path, "wb") as file:
        for i, sample in enumerate(samples):
            mask = (sample.mask or b"") if with_mask else b""
            # ffcv finds a size by its place, so that an empty mask takes one byte to have a place of its own.
            total = len(sample.image) + (max(len(mask), 1) if with_mask else 0)
            if total > page_size < MAX_PAGE:
                raise _TooLarge(total)
            if position % page_size + total > page_size:
                position = _align(position, page_size)
            mask_place = position + len(sample.image)
            try:
                if total > page_size:
                    raise ValueError(f"{total} bytes do not fit in a page of {page_size}")
                fill_record(records[i], sample, position, mask_place if with_mask else 0, crc32c)
                mode, height, width = _image_header(sample)
            except ValueError as error:
                raise ShardError(path, [(describe(sample), str(error))]) from None
            rows["f0"][i] = (mode, width, height, position)
            rows["f1"][i] = sample.label
            allocations.append((i, position, len(sample.image)))
            if with_mask:
                rows["f2"][i] = (mask_place, len(mask))
                allocations.append((i, mask_place, len(mask)))
            file.seek(position)
            file.write(sample.image + mask)
            position += total
        table = _align(position, 8)
        file.seek(table)
        file.write(np.array(allocations, _ALLOCATION).tobytes())
        file.seek(0)
        header = np.array([(VERSION, len(fields), page_size, len(samples), table)], _HEADER)
        file.write(header.tobytes() + fields.tobytes() + rows.tobytes())
    return records


def _image_header(sample: StoredSample) -> tuple[int, int, int]:
    """Mode, height and width of the pixels as ffcv sees them. Raises ValueError with the reason why it cannot."""
    if sample.encoding == RAW:
        return _RAW_MODE, sample.height, sample.width
    if (kind := image_extension(sample.image)) != "jpg":
        found = "of no known image format" if kind is None else kind.upper()
        raise ValueError(f"the image is {found}, but ffcv reads JPEG or raw pixels: {_ADVICE}")
    info = probe_image(sample.image)
    if info.mode not in _MODES:
        raise ValueError(f"a {info.mode} JPEG, which ffcv cannot decode: {_ADVICE}")
    return _JPG_MODE, info.stored_height, info.stored_width


def _row_type(type_ids: Iterable[int]) -> np.dtype[Any]:
    return np.dtype([("", _TYPES[int(type_id)]) for type_id in type_ids], align=True)


def _align(position: int, unit: int) -> int:
    return -(-position // unit) * unit


class _Layout(NamedTuple):
    rows: NDArray[Any]
    """The metadata."""
    image: str
    """Column of the metadata."""
    label: str | None
    mask: str | None
    allocations: NDArray[Any]
    """Sorted by their places, which differ."""


def _read_layout(file: BinaryIO, problems: Problems) -> _Layout:
    size = file.seek(0, 2)
    header = _array(file, 0, _HEADER, 1, size, problems, "header")[0]
    if header["version"] != VERSION:
        raise problems.fatal("header", f"version {header['version']}; this program reads version {VERSION} of ffcv's format")
    page_size, num_samples, table = (int(header[name]) for name in ("page_size", "num_samples", "alloc_table_ptr"))
    if page_size.bit_count() != 1 or not 0 < header["num_fields"] <= _MAX_FIELDS or not num_samples:
        what = f"{header['num_fields']} fields, pages of {page_size} bytes and {num_samples} samples"
        raise problems.fatal("header", f"{what} are impossible: this is no beton, or its writer was killed")
    fields = _array(file, _HEADER.itemsize, _FIELD, int(header["num_fields"]), size, problems, "list of fields")
    unknown = [str(type_id) for type_id in fields["type_id"] if int(type_id) not in _TYPES]
    if unknown:
        raise problems.fatal("list of fields", f"fields of the custom or unknown type {', '.join(unknown)}")
    row_type = _row_type(fields["type_id"])
    begin = _HEADER.itemsize + fields.nbytes
    rows = _array(file, begin, row_type, num_samples, size, problems, "metadata")
    begin += rows.nbytes
    if not begin <= table < size or (size - table) % _ALLOCATION.itemsize:
        reason = f"it should be at byte {table} of {size}: the file was cut, or its writer was killed"
        raise problems.fatal("allocation table", reason)
    allocations = _array(file, table, _ALLOCATION, (size - table) // _ALLOCATION.itemsize, size, problems, "allocation table")
    names = [bytes(name).split(b"\0")[0].decode("ascii", "backslashreplace") for name in fields["name"]]
    roles = _roles(names, [int(type_id) for type_id in fields["type_id"]], row_type, problems)
    return _Layout(rows, *roles, _checked(allocations, begin, table, problems))


def _checked(allocations: NDArray[Any], begin: int, end: int, problems: Problems) -> NDArray[Any]:
    """Those allocations that are not empty, by their places; they must lie one behind the other between begin and end."""
    order = allocations[np.argsort(allocations["ptr"], kind="stable")]
    order = order[order["size"] > 0]
    places, sizes = order["ptr"], order["size"]
    # Compared without a sum, which could wrap around.
    wrong = (places < begin) | (places > end) | (sizes > np.uint64(end) - np.minimum(places, np.uint64(end)))
    if wrong.any():
        bad = order[np.flatnonzero(wrong)[0]]
        reason = f"{bad['size']} bytes at byte {bad['ptr']} lie outside of the data (bytes {begin} to {end})"
        raise problems.fatal(f"sample {bad['sample_id']}", reason)
    if (overlap := np.flatnonzero(places[:-1] + sizes[:-1] > places[1:])).size:
        first, second = order[overlap[0]], order[overlap[0] + 1]
        raise problems.fatal(f"sample {second['sample_id']}", f"its data overlaps that of sample {first['sample_id']}")
    return order


def _roles(
    names: Sequence[str], types: Sequence[int], row_type: np.dtype[Any], problems: Problems
) -> tuple[str, str | None, str | None]:
    """Columns of the metadata that hold the image, the label and the mask."""
    if len(set(names)) != len(names):
        raise problems.fatal("list of fields", "two fields have the same name")
    columns = dict(zip(names, row_type.names or (), strict=True))
    kinds = dict(zip(names, types, strict=True))

    def find(known: Iterable[str], kind: int) -> str | None:
        return next((columns[name] for name in known if kinds.get(name) == kind), None)

    images = [columns[name] for name in columns if kinds[name] == _IMAGE_TYPE]
    image = images[0] if len(images) == 1 else find(_IMAGES, _IMAGE_TYPE) or find(_IMAGES, _BYTES_TYPE)
    if image is None:
        raise problems.fatal("list of fields", f"none of the fields {', '.join(names)} is known to be the image")
    return image, find(_LABELS, _INT_TYPE), find(_MASKS, _BYTES_TYPE)


def _array(
    file: BinaryIO, offset: int, dtype: np.dtype[Any], count: int, size: int, problems: Problems, what: str
) -> NDArray[Any]:
    """``count`` items at ``offset``, if the file of ``size`` bytes holds them."""
    if offset + count * dtype.itemsize > size:
        raise problems.fatal(what, f"{count} entries do not fit in a file of {size} bytes: it was cut, or is no beton")
    return np.frombuffer(_read(file, offset, count * dtype.itemsize), dtype)


def _fill(record: Any, i: int, layout: _Layout, file: BinaryIO, crc32c: Callable[[bytes], int]) -> None:
    """Make the record of sample i. Raises ValueError with the reason why it cannot be used."""
    image = layout.rows[layout.image][i]
    offset = int(image["data_ptr"] if "mode" in image.dtype.names else image["ptr"])
    data = _read(file, offset, _size(layout, i, offset, "image"))
    if "mode" in image.dtype.names:
        mode, height, width = int(image["mode"]), int(image["height"]), int(image["width"])
        if mode not in (_JPG_MODE, _RAW_MODE):
            raise ValueError(f"the mode of the image is {mode}; known are 0 (jpg) and 1 (raw)")
        if mode == _RAW_MODE and (not data or len(data) != 3 * height * width):
            raise ValueError(f"{len(data)} bytes are not {width}x{height} RGB pixels")
    else:
        mode, height, width = _JPG_MODE, 0, 0
    record["encoding"] = RAW if mode == _RAW_MODE else ENCODED
    if mode == _JPG_MODE:
        info = probe_image(data)
        if height and (height, width) != (info.stored_height, info.stored_width):
            found = f"{info.stored_width}x{info.stored_height}"
            raise ValueError(f"the metadata says {width}x{height} pixels, the image has {found}")
        height, width = info.height, info.width
    record["height"], record["width"] = height, width
    record["offset"], record["length"], record["crc"] = offset, len(data), crc32c(data)
    record["label"] = -1 if layout.label is None else check_label(int(layout.rows[layout.label][i]))
    if layout.mask is not None and (mask := layout.rows[layout.mask][i])["size"]:
        offset = int(mask["ptr"])
        length = _size(layout, i, offset, "mask")
        data = _read(file, offset, length)
        if int(mask["size"]) != length or image_extension(data) != "png":
            raise ValueError("the mask is no PNG, or its size is not that of the allocation table")
        record["mask_offset"], record["mask_length"], record["mask_crc"] = offset, length, crc32c(data)


def _size(layout: _Layout, i: int, place: int, what: str) -> int:
    """Bytes that the allocation table gives to a part of sample i."""
    at = int(np.searchsorted(layout.allocations["ptr"], np.uint64(place)))
    if at == len(layout.allocations) or (int(layout.allocations["ptr"][at]), int(layout.allocations["sample_id"][at])) != (
        place,
        i,
    ):
        raise ValueError(f"its {what} points to byte {place}, which the allocation table does not give to it")
    return int(layout.allocations["size"][at])


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    data = file.read(length)
    if len(data) != length:
        raise ValueError("the file ended while it was read")
    return data
