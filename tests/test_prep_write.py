"""Writing a prepared split: the same bytes however it is done, whatever stops it, and no image left out in silence."""

from __future__ import annotations

import io
import json
import os
import signal
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.files import PrepError, UsageError
from data_prep.formats.registry import CONTAINERS
from data_prep.open_source import open_source
from data_prep.plan import Container, PlanError, make_plan
from data_prep.skip import SkippingSource, keep_skip_list, read_skip_list, without_skipped
from data_prep.write import BadSamplesError, write_split
from images import image_folder
from nepa_dist.data.prepared import PreparedContainer
from splits import Trapped, content, planned, source, write

SHARDS = 5


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("source") / "images", num_classes=3, per_class=20)


@pytest.fixture(scope="module")
def unbroken(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of a split that was written in one go."""
    folder = planned(images, tmp_path_factory.mktemp("unbroken") / "train")
    write(folder, images)
    return content(folder)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_reader_gets_every_image(images: Path, tmp_path: Path, container: Container) -> None:
    folder = planned(images, tmp_path / "train", container)
    done = write(folder, images)
    assert (done.written, done.kept, done.missing) == (SHARDS, 0, 0)
    assert not (folder / "repairs.jsonl").read_bytes()
    prepared, plain = PreparedContainer(folder, check=True), source(images)
    assert len(prepared) == 60
    assert prepared.class_names == ["class_0", "class_1", "class_2"]
    for i in range(60):
        sample = prepared.read(i)
        assert sample.label == plain.label(i)
        assert prepared.name(i).startswith(plain.name(i))
        assert isinstance(sample.image, bytes)
        assert min(Image.open(io.BytesIO(sample.image)).size) == 32


def test_all_containers_have_the_same_content(images: Path, tmp_path: Path) -> None:
    manifests = [write(planned(images, tmp_path / name / "train", name), images).manifest for name in CONTAINERS]
    digests = {manifest.content_sha256 for manifest in manifests if manifest}
    assert len(digests) == 1


def test_worker_processes_make_the_same_bytes(images: Path, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    folder = planned(images, tmp_path / "train")
    assert write(folder, images, workers=2).written == SHARDS
    assert content(folder) == unbroken


def test_tasks_share_the_shards_and_the_last_one_finishes(images: Path, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    folder = planned(images, tmp_path / "train")
    first = write(folder, images, shards=range(1, SHARDS, 2))
    assert (first.written, first.missing, first.manifest) == (2, 3, None)
    assert not (folder / "manifest.json").exists()
    last = write(folder, images, shards=range(0, SHARDS, 2))
    assert (last.written, last.missing) == (3, 0)
    assert content(folder) == unbroken


def test_a_finished_split_is_left_alone(images: Path, tmp_path: Path) -> None:
    folder = planned(images, tmp_path / "train")
    write(folder, images)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = write(folder, images, workers=2)
    assert (again.written, again.kept) == (0, SHARDS)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def _cut(folder: Path) -> None:
    os.truncate(folder / "shard.00001.mds", 100)


def _remove(folder: Path) -> None:
    (folder / "shard.00001.mds").unlink()


def _damage_side_file(folder: Path) -> None:
    path = folder / "parts" / "shard.00001.mds.json"
    path.write_bytes(path.read_bytes().replace(b'"num_samples":12', b'"num_samples":13'))


def _damage_index(folder: Path) -> None:
    (folder / "index.npy").write_bytes(b"nothing")


@pytest.mark.parametrize(("damage", "written"), [(_cut, 1), (_remove, 1), (_damage_side_file, 1), (_damage_index, 0)])
def test_writing_again_repairs(
    images: Path, tmp_path: Path, unbroken: dict[str, bytes], damage: Callable[[Path], None], written: int
) -> None:
    folder = planned(images, tmp_path / "train")
    write(folder, images)
    damage(folder)
    assert content(folder) != unbroken
    assert write(folder, images).written == written
    assert content(folder) == unbroken


def test_check_finds_a_changed_byte(images: Path, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    folder = planned(images, tmp_path / "train")
    write(folder, images)
    path = folder / "shard.00002.mds"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert write(folder, images).written == 0
    assert write(folder, images, check=True).written == 1
    assert content(folder) == unbroken


def test_another_source_is_refused(images: Path, tmp_path: Path) -> None:
    folder = planned(images, tmp_path / "train")
    other = image_folder(tmp_path / "other", num_classes=3, per_class=19)
    with pytest.raises(PlanError, match="not the one that was planned"):
        write(folder, other)


# Images that cannot be used


def _bomb() -> bytes:
    """A PNG of 60000 x 60000 pixels in its header."""
    file = io.BytesIO()
    Image.new("1", (8, 8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """24 images, of which 3 cannot be used."""
    folder = image_folder(tmp_path / "spoilt", num_classes=3, per_class=8)
    (folder / "class_0" / "3.jpg").write_bytes(b"")
    (folder / "class_1" / "5.jpg").write_bytes(_bomb())
    (folder / "class_2" / "0.jpg").write_bytes(b"<?php system('touch /tmp/run'); ?>")
    return folder


@pytest.mark.parametrize(("container", "workers"), [("mds", 2), ("beton", 1)])
def test_all_unusable_images_are_named(spoilt: Path, tmp_path: Path, container: Container, workers: int) -> None:
    folder = planned(spoilt, tmp_path / "out" / "train", container, shards=6)
    with pytest.raises(BadSamplesError) as caught:
        write(folder, spoilt, workers=workers)
    text = str(caught.value)
    assert "sample 3 (class_0/3.jpg): the file is empty" in text
    assert "sample 13 (class_1/5.jpg): too large" in text
    assert "sample 16 (class_2/0.jpg): not an image" in text
    assert "3 images cannot be used" in text
    assert not (folder / "manifest.json").exists()
    assert not list(folder.glob(".tmp-*"))
    listed = [json.loads(line)["name"] for line in (tmp_path / "out" / "bad-train.jsonl").read_text().splitlines()]
    assert listed == ["class_0/3.jpg", "class_1/5.jpg", "class_2/0.jpg"]
    assert 3 <= len(list(folder.glob("shard*"))) < 6, "the other shards are written"


def test_a_plan_without_them_has_dense_ids(spoilt: Path, tmp_path: Path) -> None:
    with pytest.raises(BadSamplesError) as caught:
        write(planned(spoilt, tmp_path / "first" / "train"), spoilt)
    folder = tmp_path / "second" / "train"
    keep_skip_list(folder, read_skip_list(caught.value.path))
    rest = without_skipped(source(spoilt), folder)
    make_plan(rest, folder, name="tiny", container="mds", policy="short32", num_shards=2)
    manifest = write_split(folder, rest, quiet=True).manifest
    assert manifest is not None
    assert (manifest.num_samples, manifest.source["skipped"]) == (21, 3)
    for name in ("class_0/3.jpg", "class_1/5.jpg", "class_2/0.jpg"):
        (spoilt / name).unlink()
    same = write(planned(spoilt, tmp_path / "third" / "train"), spoilt).manifest
    assert same is not None
    assert same.content_sha256 == manifest.content_sha256
    assert same.names_sha256 == manifest.names_sha256


def test_a_file_that_is_not_there_is_named_like_a_bad_image(spoilt: Path, tmp_path: Path) -> None:
    (spoilt / "class_0" / "0.jpg").unlink()
    (spoilt / "class_0" / "0.jpg").symlink_to("fetched/later")
    folder = tmp_path / "out" / "train"
    make_plan(source(spoilt), folder, name="tiny", container="mds", policy="short32")  # reads some images for their sizes
    with pytest.raises(BadSamplesError) as caught:
        write(folder, spoilt)
    assert "sample 0 (class_0/0.jpg): it cannot be read: No such file or directory" in str(caught.value)
    assert "4 images cannot be used" in str(caught.value)


def test_a_list_of_unknown_images_is_refused(images: Path) -> None:
    with pytest.raises(UsageError, match=r"no image 'class_9/1\.jpg'"):
        SkippingSource(source(images), {"class_0/1.jpg", "class_9/1.jpg"})


def test_repairs_are_counted_and_listed(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", num_classes=2, per_class=3)
    Image.new("L", (40, 40), 100).save(folder / "class_1" / "0.jpg")
    Image.new("CMYK", (40, 40)).save(folder / "class_0" / "2.jpg")
    out = planned(folder, tmp_path / "out" / "train", shards=2)
    manifest = write(out, folder).manifest
    assert manifest is not None
    assert manifest.repairs == {"cmyk": 1, "gray": 1}
    entries = [json.loads(line) for line in (out / "repairs.jsonl").read_text().splitlines()]
    assert [(entry["id"], entry["name"], entry["kinds"]) for entry in entries] == [
        (2, "class_0/2.jpg", ["cmyk"]),
        (3, "class_1/0.jpg", ["gray"]),
    ]


# Failing and dying


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise RuntimeError("surprise")


def _disk_error() -> None:
    raise OSError("Input/output error")


@pytest.mark.parametrize(
    ("trap", "workers", "reason"),
    [
        (_die, 2, r"the worker process ended \(SIGKILL\); if memory ran out"),
        (_raise, 2, "RuntimeError: surprise"),
        (_disk_error, 1, "Input/output error"),
    ],
)
def test_a_failing_worker_names_shard_and_sample(
    images: Path, tmp_path: Path, unbroken: dict[str, bytes], trap: Callable[[], object], workers: int, reason: str
) -> None:
    folder = planned(images, tmp_path / "train")
    with pytest.raises(PrepError, match=rf"shard\.0000.\.mds, sample 17 \(class_0/7\.jpg\): {reason}"):
        write_split(folder, Trapped(source(images), trap), workers=workers, quiet=True)
    assert not list(folder.rglob(".tmp-*"))
    write(folder, images)
    assert content(folder) == unbroken


def test_masks_go_with_their_images(tmp_path: Path) -> None:
    root = tmp_path / "ade"
    rng = np.random.default_rng(0)
    for i in range(6):
        for kind, part, ending in (("images", "training", "jpg"), ("annotations", "training", "png")):
            folder = root / kind / part
            folder.mkdir(parents=True, exist_ok=True)
            shape = (40, 60, 3) if kind == "images" else (40, 60)
            Image.fromarray(rng.integers(0, 3, shape).astype(np.uint8)).save(folder / f"ADE_train_{i:08d}.{ending}")
    (root / "objectInfo150.txt").write_text("Idx\tName\n1\tsky\n2\tsea\n")
    source = open_source(root, kind="ade20k", split="train")
    make_plan(source, tmp_path / "out", name="ade", container="mds", policy="short32", num_shards=2)
    write_split(tmp_path / "out", source, quiet=True)
    prepared = PreparedContainer(tmp_path / "out", check=True)
    mask = prepared.read(0).mask
    assert mask is not None
    assert mask.shape == (32, 48)
    assert mask.max() <= 2
