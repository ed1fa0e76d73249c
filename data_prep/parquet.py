"""Source ``parquet``: Parquet or Arrow files with a column of images, as Hugging Face ``datasets`` writes them.

The image column is ``struct<bytes, path>`` or binary; labels are integers with names in the schema's metadata, integers, or
text. Files belong to the split that their names or folders begin with: ``train-00000-of-00002.parquet``,
``validation/data-00000.arrow``. Where no file says so, all are the training split.

A sample in a Parquet file costs the reading of its row group, for which ``datasets`` takes 100 images. Arrow files
(``save_to_disk``) have no such cost and are better for a large data set.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.sources import SourceError, Split, listed, one_line
from nepa_dist.data.decode import BadImage

_SPLIT = re.compile(r"(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id(?:ation)?)?)|(?P<test>test))(?=[-_.]|$)")
_MAX_GROUP = 512 << 20
"""Bytes of images in a row group: it is read whole for each image."""

_CACHED_GROUPS = 2
_MAX_CLASSES = 1_000_000


class ParquetSource:
    """Images in the rows of a folder's files; row r of FILE is called ``FILE/<r, nine digits>``.

    Args:
        root: folder; files may lie in folders below.
        split: which part.
        image_column: which column holds the images, where that is not clear.
        label_column: the same for the labels.

    Raises:
        SourceError: pyarrow is not installed; there are no files for the split; a file is damaged or of another schema; a
            column is not clear; a label is outside the class table; or a row group is too large to be read for each image.
    """

    kind = "parquet"
    has_masks = False

    def __init__(self, root: Path, split: Split, *, image_column: str | None = None, label_column: str | None = None) -> None:
        _arrow()
        self.split = split
        self._root = root.absolute()
        every, self.num_ignored = _files(root)
        of_split = {name: _split_of(name) for name in every}
        if not any(of_split.values()):
            of_split = dict.fromkeys(every, "train")
        elif strange := [name for name, part in of_split.items() if part is None]:
            raise SourceError(f"{root}: these files belong to no split by their names:{listed(strange)}")
        self._files = [name for name, part in of_split.items() if part == split]
        if not self._files:
            raise SourceError(f"{root} has no .parquet or .arrow files for the split {split}:{listed(every)}")
        self._open_tables: OrderedDict[str, Any] = OrderedDict()
        self._groups: OrderedDict[tuple[str, int], Any] = OrderedDict()
        schema = self._table(self._files[0]).schema
        features = _features(schema)
        self._image = _image_column(schema, features, image_column, self._files[0])
        label = _label_column(schema, features, label_column, self._files[0])
        columns = {name: self._scan(name, label) for name, part in of_split.items() if part in ("train", "val")}
        parts = [columns[name] for name in self._files]
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        if not self._ends[-1]:
            raise SourceError(f"{root}: the files of the split {split} have no rows")
        names = features.get(label or "", {}).get("names")
        # The table is made of all splits, so that a label means the same in each.
        self.class_names = [str(name) for name in names] if names else _classes(list(columns.values()))
        self.class_titles: list[str] = []
        self._labels = _labels(np.concatenate(parts), self.class_names, bool(names), root)
        self.fingerprint = self._digest(parts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        """``FILE/ROW``."""
        file, row = self._place(index)
        return f"{one_line(file)}/{row:09d}"

    def label(self, index: int) -> int:
        """Class of an image; -1 is unknown."""
        return int(self._labels[index])

    def read(self, index: int) -> bytes:
        """The image file. Raises OSError if it cannot be read, BadImage if the row holds no bytes."""
        file, row = self._place(index)
        try:
            value = self._table(file).image(row, self._image, self._groups)
        except _arrow().lib.ArrowException as error:
            raise OSError(f"{self.name(index)} cannot be read: {error}") from None
        if value is None:
            raise BadImage("the row has no image bytes (only a path to a file, or nothing)")
        return bytes(value)

    def read_mask(self, index: int) -> None:
        """None: there are no masks."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open_tables": OrderedDict(), "_groups": OrderedDict()}

    def _place(self, index: int) -> tuple[str, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        file = int(np.searchsorted(self._ends, index, side="right"))
        return self._files[file], index - (int(self._ends[file - 1]) if file else 0)

    def _table(self, name: str) -> _ParquetTable | _ArrowTable:
        if name not in self._open_tables:
            path = self._root / name
            try:
                self._open_tables[name] = _ParquetTable(path) if path.suffix == ".parquet" else _ArrowTable(path)
            except (_arrow().lib.ArrowException, OSError) as error:
                raise SourceError(f"{path} cannot be read: {error}") from None
            if len(self._open_tables) > 64:
                self._open_tables.popitem(last=False)
        return self._open_tables[name]  # type: ignore[no-any-return]

    def _scan(self, name: str, label: str | None) -> NDArray[Any]:
        """Labels of a file's rows: int64, or text; -1 without a label column."""
        table = self._table(name)
        missing = [column for column in (self._image, label) if column is not None and column not in table.schema.names]
        if missing:
            raise SourceError(f"{self._root / name} lacks the column {missing[0]!r} that {self._files[0]} has")
        if (size := table.largest_group(self._image)) > _MAX_GROUP:
            raise SourceError(
                f"{self._root / name} has {size >> 20} MiB of images in one row group, which is read for each of them; "
                "write it again with row_group_size=100, or as Arrow files"
            )
        if label is None:
            return np.full(table.num_rows, -1, np.int64)
        try:
            column = table.column(label)
        except (_arrow().lib.ArrowException, OSError) as error:
            raise SourceError(f"{self._root / name} cannot be read: {error}") from None
        kind = column.type
        if not kind.equals(self._table(self._files[0]).schema.field(label).type):
            raise SourceError(f"{self._root / name}: the label column {label!r} has another type than in {self._files[0]}")
        types = _arrow().types
        if types.is_integer(kind):
            return np.array([-1 if value is None else value for value in column.to_pylist()], np.int64)
        if types.is_string(kind) or types.is_large_string(kind):
            return np.array([value or "" for value in column.to_pylist()], object)
        raise SourceError(f"{self._root / name}: the label column {label!r} has the type {kind}; use integers or text")

    def _digest(self, parts: list[NDArray[Any]]) -> str:
        digest = hashlib.sha256(self.split.encode() + b"\0")
        for name, part in zip(self._files, parts, strict=True):
            digest.update(f"{name}\0{os.path.getsize(self._root / name)}\0{len(part)}\0".encode("utf-8", "surrogateescape"))
        digest.update(self._labels.astype("<i4").tobytes())
        return digest.hexdigest()


class _ParquetTable:
    """One Parquet file; row groups are read as they are needed."""

    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        self._path = str(path)
        self._file = parquet.ParquetFile(path)
        self.schema = self._file.schema_arrow
        meta = self._file.metadata
        self.num_rows = int(meta.num_rows)
        self._ends = np.cumsum([meta.row_group(g).num_rows for g in range(meta.num_row_groups)], dtype=np.int64)

    def column(self, name: str) -> Any:
        return self._file.read(columns=[name]).column(name)

    def largest_group(self, image: str) -> int:
        """Bytes of the images in the largest row group, unpacked."""
        meta = self._file.metadata
        groups = [meta.row_group(g) for g in range(meta.num_row_groups)]
        return max((sum(_chunk_bytes(group, image)) for group in groups), default=0)

    def image(self, row: int, column: str, cache: OrderedDict[tuple[str, int], Any]) -> bytes | None:
        group = int(np.searchsorted(self._ends, row, side="right"))
        key = (self._path, group)
        if key not in cache:
            while len(cache) >= _CACHED_GROUPS:
                cache.popitem(last=False)
            cache[key] = self._file.read_row_group(group, columns=[column]).column(column)
        return _bytes_of(cache[key][row - (int(self._ends[group - 1]) if group else 0)])


class _ArrowTable:
    """One Arrow IPC file or stream, mapped into memory."""

    def __init__(self, path: Path) -> None:
        pyarrow = _arrow()
        with path.open("rb") as file:
            is_file = file.read(6) == b"ARROW1"
        source = pyarrow.memory_map(str(path))
        self._table = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source).read_all()
        self.schema = self._table.schema
        self.num_rows = int(self._table.num_rows)

    def column(self, name: str) -> Any:
        return self._table.column(name)

    def largest_group(self, image: str) -> int:
        """0: one image can be read alone."""
        return 0

    def image(self, row: int, column: str, cache: OrderedDict[tuple[str, int], Any]) -> bytes | None:
        return _bytes_of(self._table.column(column)[row])


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise SourceError("reading Parquet and Arrow files needs pyarrow: pip install pyarrow") from None
    return pyarrow


def _files(root: Path) -> tuple[list[str], int]:
    """Relative names in the order of the samples' names, and the number of other files."""
    names, ignored = [], 0
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            # datasets leaves the results of map() beside the data as cache-*.arrow and tmp*.
            if file.endswith((".parquet", ".arrow")) and not file.startswith((".", "cache-", "tmp")):
                names.append(Path(folder, file).relative_to(root).as_posix())
            elif not file.startswith("."):
                ignored += 1
    return sorted(names, key=lambda name: os.fsencode(name + "/")), ignored


def _split_of(name: str) -> str | None:
    """``train``, ``val``, ``test`` or None: the last part of a path that begins with such a word."""
    found = [match for part in name.split("/") if (match := _SPLIT.match(part))]
    return found[-1].lastgroup if found else None


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What ``datasets`` wrote of the columns into the schema, {} if it did not."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {str(name): feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _image_column(schema: Any, features: dict[str, dict[str, Any]], wanted: str | None, file: str) -> str:
    types = _arrow().types

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def is_image(kind: Any) -> bool:
        return is_bytes(kind) or bool(types.is_struct(kind) and any(f.name == "bytes" and is_bytes(f.type) for f in kind))

    able = [field.name for field in schema if is_image(field.type)]
    marked = [name for name in able if features.get(name, {}).get("_type") == "Image"]
    choice = [wanted] if wanted is not None else marked or able
    if len(choice) != 1 or choice[0] not in able:
        hint = "pass the image column, or the kind folder if tables only lie beside images"
        raise SourceError(f"{file}: which column is the image? Those with bytes are {able}; {hint}")
    return choice[0]


def _label_column(schema: Any, features: dict[str, dict[str, Any]], wanted: str | None, file: str) -> str | None:
    marked = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    choice = [wanted] if wanted is not None else marked or [name for name in ("label",) if name in schema.names]
    if len(choice) > 1 or not set(choice) <= set(schema.names):
        raise SourceError(f"{file}: which column is the label? It has {schema.names}; pass the label column")
    return choice[0] if choice else None


def _chunk_bytes(group: Any, image: str) -> list[int]:
    chunks = (group.column(c) for c in range(group.num_columns))
    return [chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == image]


def _bytes_of(scalar: Any) -> bytes | None:
    value = scalar.as_py()
    return value.get("bytes") if isinstance(value, dict) else value


def _classes(columns: list[NDArray[Any]]) -> list[str]:
    """Class table where the files have none: the texts, sorted by their bytes, or the numbers up to the largest."""
    if any(column.dtype == object for column in columns):
        return sorted({str(value) for column in columns for value in column} - {""}, key=str.encode)
    largest = max((int(column.max()) for column in columns if len(column)), default=-1)
    if largest >= _MAX_CLASSES:
        raise SourceError(f"the label {largest} without a class table is not taken for a class; pass the label column")
    return [str(label) for label in range(largest + 1)]


def _labels(values: NDArray[Any], classes: list[str], named: bool, root: Path) -> NDArray[np.int32]:
    if values.dtype == object:
        index = {name: label for label, name in enumerate(classes)} | {"": -1}
        strange = sorted({str(value) for value in values} - set(index))
        values = np.array([index.get(str(value), -2) for value in values], np.int64)
    else:
        strange = [str(value) for value in np.unique(values[(values < -1) | (values >= len(classes))])]
    if strange:
        table = "of the schema " if named else ""
        raise SourceError(f"{root} has labels outside the class table {table}(0 .. {len(classes) - 1}):{listed(strange)}")
    return values.astype(np.int32)
