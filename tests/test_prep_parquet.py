"""Parquet and Arrow files as a source."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep import parquet
from data_prep.open_source import open_source
from data_prep.sources import Source, SourceError
from nepa_dist.data.decode import BadImage


def test_without_pyarrow_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "train-0.parquet").write_bytes(b"x")
    with pytest.raises(SourceError, match="pip install pyarrow"):
        open_source(tmp_path, split="train")


try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    pa = pq = None
needs_pyarrow = pytest.mark.skipif(pa is None, reason="pyarrow is not installed")


def _rows(first: int, count: int) -> list[bytes]:
    return [f"image {k}".encode() * (k + 1) for k in range(first, first + count)]


def _table(images: list[Any], labels: Any = None, names: list[str] | None = None, *, struct: bool = True) -> Any:
    if struct:
        values = [{"bytes": image, "path": f"{k}.jpg"} for k, image in enumerate(images)]
        columns = {"image": pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    else:
        columns = {"image": pa.array(images, pa.binary())}
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels)
    if names is not None:
        features["label"] = {"_type": "ClassLabel", "names": names}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _write(path: Path, table: Any, form: str = "parquet") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "parquet":
        pq.write_table(table, path, row_group_size=3)
    else:
        writer = (pa.ipc.new_stream if form == "stream" else pa.ipc.new_file)(str(path), table.schema)
        with writer:
            writer.write_table(table, max_chunksize=3)


def _content(source: Source) -> list[tuple[str, int, bytes]]:
    return [(source.name(i), source.label(i), source.read(i)) for i in range(len(source))]


def _refused(root: Path, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(root, **{"split": "train", "kind": "parquet"} | options)
    return str(caught.value)


@needs_pyarrow
@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize(
    ("form", "names"),
    [
        (
            "parquet",
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/validation-00000.parquet"],
        ),
        ("stream", ["train/data-00000-of-00002.arrow", "train/data-00001-of-00002.arrow", "val/data-00000.arrow"]),
        ("file", ["train_0.arrow", "train_1.arrow", "val.arrow"]),
    ],
)
def test_splits_rows_and_labels(tmp_path: Path, struct: bool, form: str, names: list[str]) -> None:
    classes = ["tench, Tinca tinca", "goldfish"]
    _write(tmp_path / names[0], _table(_rows(0, 7), [0, 1, 0, 1, 1, None, -1], classes, struct=struct), form)
    _write(tmp_path / names[1], _table(_rows(7, 2), [0, 1], classes, struct=struct), form)
    _write(tmp_path / names[2], _table(_rows(20, 4), [1, 1, 0, 0], classes, struct=struct), form)
    (tmp_path / "test-0.parquet").write_bytes(b"not read")
    _write((tmp_path / names[0]).with_name("cache-123.arrow"), _table(_rows(0, 2)), "stream")
    train, val = (open_source(tmp_path, split=split) for split in ("train", "val"))
    expected = [(f"{names[0]}/{row:09d}", image) for row, image in enumerate(_rows(0, 7))]
    expected += [(f"{names[1]}/{row:09d}", image) for row, image in enumerate(_rows(7, 2))]
    assert [(name, image) for name, _, image in _content(train)] == expected
    assert [label for _, label, _ in _content(train)] == [0, 1, 0, 1, 1, -1, -1, 0, 1]
    assert [(label, image) for _, label, image in _content(val)] == list(zip([1, 1, 0, 0], _rows(20, 4), strict=True))
    assert train.class_names == val.class_names == classes
    assert (train.kind, train.has_masks, train.read_mask(0), train.num_ignored) == ("parquet", False, None, 1)
    assert train.fingerprint != val.fingerprint
    assert sorted(train.name(i).encode() for i in range(9)) == [train.name(i).encode() for i in range(9)]
    backwards = [train.read(i) for i in reversed(range(9))]
    assert backwards == _rows(0, 9)[::-1]
    assert _content(pickle.loads(pickle.dumps(train))) == _content(train)  # noqa: S301 - our own bytes


@needs_pyarrow
def test_class_tables_without_names_span_the_splits(tmp_path: Path) -> None:
    for kind, train, val, names in [
        ("int", [2, 0], [3, -1], ["0", "1", "2", "3"]),
        ("text", ["dog", "Cat"], ["été", None], ["Cat", "dog", "été"]),
        ("none", None, None, []),
    ]:
        _write(tmp_path / kind / "train.parquet", _table(_rows(0, 2), train))
        _write(tmp_path / kind / "val.parquet", _table(_rows(0, 2), val))
        sources = [open_source(tmp_path / kind, split=split) for split in ("train", "val")]
        assert [source.class_names for source in sources] == [names, names]
        labels = [source.label(i) for source in sources for i in range(2)]
        assert labels == {"int": [2, 0, 3, -1], "text": [1, 0, 2, -1], "none": [-1] * 4}[kind]


@needs_pyarrow
def test_fingerprint_does_not_know_the_place_but_the_labels(tmp_path: Path) -> None:
    prints = []
    for place, labels in [("a", [0, 1]), ("b", [0, 1]), ("c", [1, 0])]:
        _write(tmp_path / place / "only.parquet", _table(_rows(0, 2), labels, ["x", "y"]))
        prints.append(open_source(tmp_path / place, split="train").fingerprint)
    assert prints[0] == prints[1] != prints[2]


@needs_pyarrow
def test_what_is_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.parquet"
    assert "has no .parquet or .arrow files for the split train" in _refused(tmp_path)
    path.write_bytes(b"PAR1 nothing of the kind")
    assert "train.parquet cannot be read" in _refused(tmp_path)
    _write(path, _table(_rows(0, 2), [0, 5], ["x", "y"]))
    assert "labels outside the class table of the schema (0 .. 1):\n  5" in _refused(tmp_path)
    _write(path, _table(_rows(0, 2), [0.5, 1.5]))
    assert "has the type double" in _refused(tmp_path)
    _write(path, _table(_rows(0, 2), [0, 10**9]))
    assert "the label 1000000000 without a class table" in _refused(tmp_path)
    _write(path, pa.table({"a": _rows(0, 2), "b": _rows(0, 2), "kind": [0, 1]}))
    assert "which column is the image? Those with bytes are ['a', 'b']" in _refused(tmp_path)
    assert "which column is the image" in _refused(tmp_path, image_column="kind")
    assert "which column is the label" in _refused(tmp_path, image_column="a", label_column="z")
    chosen = open_source(tmp_path, split="train", image_column="b", label_column="kind")
    assert [chosen.label(i) for i in range(2)] == [0, 1]
    assert "split val" in _refused(tmp_path, split="val")
    _write(tmp_path / "odd.parquet", _table(_rows(0, 1)))
    assert "belong to no split by their names:\n  odd.parquet" in _refused(tmp_path)
    (tmp_path / "odd.parquet").rename(tmp_path / "train_2.parquet")  # sorted behind the others
    assert "lacks the column" in _refused(tmp_path, image_column="b")
    monkeypatch.setattr(parquet, "_MAX_GROUP", 10)
    assert "row_group_size=100" in _refused(tmp_path, image_column="b")


@needs_pyarrow
def test_a_row_without_bytes_cannot_be_read(tmp_path: Path) -> None:
    _write(tmp_path / "train.parquet", _table([b"a", None]))
    source = open_source(tmp_path, split="train")
    assert source.read(0) == b"a"
    with pytest.raises(BadImage, match="no image bytes"):
        source.read(1)
    with pytest.raises(IndexError):
        source.read(2)
