"""Images with class masks in ADE20K's layout as a source."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.open_source import open_source
from data_prep.sources import SourceError


def _write(path: Path, values: np.ndarray) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG" if path.suffix == ".png" else "JPEG")
    path.write_bytes(file.getvalue())
    return file.getvalue()


def _pair(root: Path, stem: str, part: str = "training", value: int = 1) -> tuple[bytes, bytes]:
    image = _write(root / "images" / part / f"{stem}.jpg", np.full((12, 16, 3), value, np.uint8))
    return image, _write(root / "annotations" / part / f"{stem}.png", np.full((12, 16), value, np.uint8))


def _refused(root: Path, split: str = "train") -> str:
    with pytest.raises(SourceError) as caught:
        open_source(root, split=split)  # type: ignore[arg-type]
    return str(caught.value)


def test_images_and_masks_go_together(tmp_path: Path) -> None:
    pairs = {stem: _pair(tmp_path, stem, value=k) for k, stem in enumerate(("b_1", "a_2", "a_10"))}
    val = _pair(tmp_path, "v", "validation")
    (tmp_path / "annotations" / "training" / "readme.txt").write_text("x")
    source = open_source(tmp_path, split="train")
    assert (source.kind, source.has_masks, source.num_ignored) == ("ade20k", True, 1)
    assert [source.name(i) for i in range(3)] == ["a_10.jpg", "a_2.jpg", "b_1.jpg"]
    assert [(source.read(i), source.read_mask(i)) for i in range(3)] == [pairs[s] for s in ("a_10", "a_2", "b_1")]
    assert {source.label(i) for i in range(3)} == {-1}
    assert source.class_names == source.class_titles == []
    other = open_source(tmp_path, split="val")
    assert (len(other), other.read(0), other.read_mask(0)) == (1, *val)
    assert other.fingerprint != source.fingerprint


def test_fingerprint_follows_the_masks_too(tmp_path: Path) -> None:
    _pair(tmp_path / "one", "a")
    _pair(tmp_path / "two", "a")
    first = open_source(tmp_path / "one", split="train").fingerprint
    assert open_source(tmp_path / "two", split="train").fingerprint == first
    with (tmp_path / "two" / "annotations" / "training" / "a.png").open("ab") as file:
        file.write(b"longer")
    assert open_source(tmp_path / "two", split="train").fingerprint != first


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("objectInfo150.csv", "Idx,Ratio,Train,Val,Stuff,Name\n1,0.1,5,6,1,wall\n2,0.1,5,6,1,building;edifice\n"),
        ("objectInfo150.txt", "Idx\tRatio\tTrain\tVal\tName \n1\t0.1\t5\t6\twall \n2\t0.1\t5\t6\tbuilding;edifice\n"),
        ("objectInfo2.csv", 'Name,Idx\n"building;edifice",2\nwall,1\n\n'),
    ],
)
def test_class_table(tmp_path: Path, name: str, text: str) -> None:
    _pair(tmp_path, "a")
    (tmp_path / name).write_text(text)
    source = open_source(tmp_path, split="train")
    assert source.class_names == source.class_titles == ["wall", "building;edifice"]


@pytest.mark.parametrize(
    "text", ["", "Idx,Title\n1,wall\n", "Idx,Name\n0,wall\n", "Idx,Name\n1,a\n1,b\n", "Idx,Name\nx,a\n", "Idx,Name\n1\n"]
)
def test_a_class_table_that_is_none(tmp_path: Path, text: str) -> None:
    _pair(tmp_path, "a")
    (tmp_path / "objectInfo150.csv").write_text(text)
    assert "objectInfo150.csv" in _refused(tmp_path)


def test_all_that_do_not_pair_up_are_named_at_once(tmp_path: Path) -> None:
    for k in range(30):
        _pair(tmp_path, f"s{k:02d}")
    images, masks = tmp_path / "images" / "training", tmp_path / "annotations" / "training"
    (masks / "s03.png").unlink()
    (images / "s04.jpg").unlink()
    _write(images / "s05.png", np.zeros((12, 16, 3), np.uint8))
    message = _refused(tmp_path)
    assert message.startswith("3 images and annotations of training do not pair up")
    assert "images/training/s03.jpg has no annotation annotations/training/s03.png" in message
    assert "annotations/training/s04.png has no image" in message
    assert "images/training/s05.png: another image has the same annotation" in message
    for path in masks.iterdir():
        path.unlink()
    lines = _refused(tmp_path).splitlines()
    assert lines[0].startswith("31 images")
    assert (len(lines), lines[-1]) == (22, "  ... and 11 more")


def test_other_layouts_are_refused(tmp_path: Path) -> None:
    _pair(tmp_path, "a")
    assert "cannot read the folder" in _refused(tmp_path, "val")
    (tmp_path / "images" / "training" / "deep").mkdir()
    assert "holds the folder 'deep'" in _refused(tmp_path)
    (tmp_path / "images" / "validation").mkdir()
    (tmp_path / "annotations" / "validation").mkdir()
    assert "holds no images" in _refused(tmp_path, "val")
