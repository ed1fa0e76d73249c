"""Verifying and adopting: every damage is found and named, and shards of others are read without trusting them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.cross_check import cross_check
from data_prep.files import SUMS
from data_prep.finish import array_bytes, seal
from data_prep.formats.registry import CONTAINERS
from data_prep.plan import make_plan
from data_prep.verify import LEVELS, Level, Verification, verify_split
from data_prep.write import write_split
from images import image_folder
from nepa_dist.data.index import INDEX, MANIFEST, NAMES, content_sha256, read_index, read_manifest
from splits import prepare

SHARDS = 4


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("source") / "images", num_classes=3, per_class=20)


@pytest.fixture(scope="module")
def originals(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good split in each container."""
    root = tmp_path_factory.mktemp("prepared")
    return {container: prepare(images, root / container, container) for container in CONTAINERS}


@pytest.fixture
def split(originals: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the MDS split, to be damaged."""
    shutil.copytree(originals["mds"], tmp_path / "split")
    return tmp_path / "split"


def check(folder: Path, level: Level = "hash", workers: int = 1) -> Verification:
    return verify_split(folder, level=level, workers=workers, quiet=True)


def flip(path: Path, position: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def reasons(found: Verification) -> list[str]:
    return [problem.reason for problem in found.problems]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_good_split_is_good(originals: dict[str, Path], container: str, level: Level) -> None:
    found = check(originals[container], level)
    assert found.good, found.lines()
    assert found.warnings == []


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_flipped_bit_is_found(originals: dict[str, Path], tmp_path: Path, container: str) -> None:
    folder = tmp_path / "split"
    shutil.copytree(originals[container], folder)
    rng = random.Random(container)
    names = sorted(path.name for path in folder.iterdir() if path.stem not in ("parts", "plan") and path.stat().st_size)
    assert {MANIFEST, INDEX, NAMES, SUMS} < set(names)
    found = 0
    for number in range(100):
        path = folder / names[number % len(names)]
        data = path.read_bytes()
        flip(path, rng.randrange(len(data)), 1 << rng.randrange(8))
        report = check(folder)
        found += not report.good
        if path.name.startswith("shard"):
            assert {problem.file for problem in report.problems} == {path.name}
        path.write_bytes(data)
    assert found == 100
    assert check(folder).good


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("level", ["index", "hash"])
def test_a_damaged_image_is_named(originals: dict[str, Path], tmp_path: Path, container: str, level: Level) -> None:
    folder = tmp_path / "split"
    shutil.copytree(originals[container], folder)
    manifest = read_manifest(folder / MANIFEST)
    record = read_index(folder / INDEX, manifest)[23]
    shard = manifest.shards[int(record["shard"])].name
    flip(folder / shard, int(record["offset"]) + int(record["length"]) // 2)
    found = check(folder, level)
    assert [(problem.file, problem.sample) for problem in found.problems] == [(shard, 23)]
    assert found.lines() == [f"{folder / shard}, sample 23 (class_1/11.jpg): the image is damaged (CRC-32C differs)"]
    entry = found.to_json()["problems"][0]
    assert (entry["sample"], entry["name"]) == (23, "class_1/11.jpg")


def test_damage_between_samples_is_told_apart(split: Path) -> None:
    flip(split / "shard.00000.mds", 0)
    assert reasons(check(split)) == ["it is damaged between the samples (SHA-256 differs, all checksums fit)"]
    assert not check(split, "index").good


def test_shards_are_hashed_even_if_the_index_is_lost(split: Path) -> None:
    flip(split / INDEX, -1)
    flip(split / "shard.00002.mds", -1)
    assert [problem.file for problem in check(split).problems] == [INDEX, "shard.00002.mds"]


def test_missing_and_cut_and_extra_files(split: Path) -> None:
    (split / "shard.00001.mds").unlink()
    size = (split / "shard.00002.mds").stat().st_size
    with (split / "shard.00002.mds").open("r+b") as file:
        file.truncate(size - 10)
    (split / "index.json").unlink()
    (split / "shard.00009.mds").touch()
    quick = check(split, "quick")
    assert sorted((problem.file, problem.sample) for problem in quick.problems) == [
        ("index.json", -1),
        ("shard.00001.mds", -1),
        ("shard.00002.mds", -1),
    ]
    assert any(f"it has {size - 10:,} bytes; {size:,} were written" in reason for reason in reasons(quick))
    assert quick.warnings == [f"{split / 'shard.00009.mds'} is no part of the split"]
    lost = [problem for problem in check(split).problems if problem.sample >= 0]
    assert [(problem.file, problem.reason) for problem in lost] == [
        ("shard.00002.mds", "the image is cut off: the shard is too short")
    ]


def test_swapped_shards_are_recognised(originals: dict[str, Path], tmp_path: Path) -> None:
    split = tmp_path / "split"  # all beton shards have the same size here
    shutil.copytree(originals["beton"], split)
    one, two = split / "shard-00000.beton", split / "shard-00002.beton"
    one.rename(split / "other")
    two.rename(one)
    (split / "other").rename(two)
    sizes = one.stat().st_size == two.stat().st_size
    found = check(split)
    assert not found.good
    if sizes:
        assert reasons(found) == ["it has the content of shard-00002.beton", "it has the content of shard-00000.beton"]


def test_a_pipe_in_place_of_a_shard_does_not_hang(split: Path) -> None:
    (split / "shard.00001.mds").unlink()
    os.mkfifo(split / "shard.00001.mds")
    assert reasons(check(split)) == ["it is no plain file"]


def test_an_unfinished_split_is_said_to_be(split: Path) -> None:
    (split / MANIFEST).unlink()
    found = check(split, "quick")
    assert len(found.problems) == 1
    assert "not finished" in found.problems[0].reason


def test_worker_processes_find_the_same(split: Path) -> None:
    flip(split / "shard.00000.mds", -5)
    flip(split / "shard.00003.mds", -5)
    assert check(split, workers=2).problems == check(split).problems
    assert len(check(split).problems) == 2


def reseal(folder: Path, change: Callable[[Any], None]) -> None:
    """Change the index, and everything that vouches for it."""
    manifest = read_manifest(folder / MANIFEST)
    index = np.array(read_index(folder / INDEX, manifest))
    change(index)
    body = array_bytes(index)
    manifest = replace(manifest, index_sha256=hashlib.sha256(body).hexdigest(), content_sha256=content_sha256(index))
    seal(folder, manifest, {INDEX: body, NAMES: (folder / NAMES).read_bytes(), "repairs.jsonl": b""})


def _other_label(index: Any) -> None:
    index["label"][7] = 2


def _other_size(index: Any) -> None:
    index["height"][7] += 1


def _other_place(index: Any) -> None:
    index["offset"][7] += 1


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("change", [_other_label, _other_size, _other_place])
def test_an_index_that_tells_something_else_than_the_shards(
    originals: dict[str, Path], tmp_path: Path, container: str, change: Callable[[Any], None]
) -> None:
    folder = tmp_path / "split"
    shutil.copytree(originals[container], folder)
    reseal(folder, change)
    assert check(folder, "quick").good
    found = check(folder, "index")
    assert {problem.sample for problem in found.problems} == {7}


def _exchanged(index: Any) -> None:
    index[[3, 4]] = index[[4, 3]]


@pytest.mark.parametrize("container", ["tar", "mds"])
def test_an_index_with_two_samples_exchanged(originals: dict[str, Path], tmp_path: Path, container: str) -> None:
    folder = tmp_path / "split"
    shutil.copytree(originals[container], folder)
    reseal(folder, _exchanged)
    found = check(folder, "index")
    assert "the shard calls it 4" in " ".join(reasons(found)).replace("00000004", "4")


def test_a_label_without_a_class(split: Path) -> None:
    def change(index: Any) -> None:
        index["label"][0] = 3

    reseal(split, change)
    assert "its labels are 0 to 3, but there are 3 classes" in reasons(check(split, "index"))


# Two splits


def test_containers_of_one_source_hold_the_same(originals: dict[str, Path]) -> None:
    found = cross_check(originals["tar"], originals["beton"], workers=2, quiet=True)
    assert found.good
    assert found.compared == {"same_bytes": 60, "same_pixels": 0, "different": 0}


def test_coded_and_raw_pixels_are_the_same(images: Path, tmp_path: Path) -> None:
    kept, raw = (
        prepare(images, tmp_path / "keep", "tar", policy="keep"),
        prepare(images, tmp_path / "raw", "beton", policy="raw"),
    )
    assert check(raw, "decode").good
    found = cross_check(kept, raw, quiet=True)
    assert found.good
    assert found.compared["same_pixels"] == 60


def test_a_comparison_names_what_differs(originals: dict[str, Path], images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "changed")
    Image.new("RGB", (48, 40), (1, 2, 3)).save(tmp_path / "changed" / "class_0" / "5.jpg")
    other = prepare(tmp_path / "changed", tmp_path / "other", "mds")
    found = cross_check(originals["tar"], other, quiet=True)
    assert [problem.sample for problem in found.problems] == [15]  # the rank of class_0/5.jpg
    assert f"the image is another one in {other}" in reasons(found)
    reseal(other, _other_label)
    found = cross_check(originals["tar"], other, quiet=True)
    assert sorted(problem.sample for problem in found.problems) == [7, 15]
    shutil.move(tmp_path / "changed" / "class_0" / "5.jpg", tmp_path / "changed" / "class_1" / "zz.jpg")
    moved = prepare(tmp_path / "changed", tmp_path / "moved", "mds")
    assert "another name" in reasons(cross_check(other, moved, quiet=True))[0]
    (tmp_path / "changed" / "class_1" / "zz.jpg").unlink()
    fewer = prepare(tmp_path / "changed", tmp_path / "fewer", "mds")
    assert "60 samples here, 59 in" in reasons(cross_check(other, fewer, quiet=True))[0]


def test_a_damaged_split_is_not_compared(originals: dict[str, Path], split: Path) -> None:
    flip(split / INDEX, -1)
    found = cross_check(originals["tar"], split, quiet=True)
    assert [problem.file for problem in found.problems] == [INDEX]
    assert f"in {split}" in found.problems[0].reason


# What is odd


class Thousand:
    """As many classes as ImageNet, one image each."""

    kind, split, fingerprint, has_masks, num_ignored = "folder", "train", "0" * 64, False, 0
    class_titles: list[str] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.class_names = [f"n{number:08d}" for number in range(1000)]
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "JPEG")
        self._image = file.getvalue()

    def __len__(self) -> int:
        return 1000

    def name(self, index: int) -> str:
        return f"{self.class_names[index]}/0.jpg"

    def label(self, index: int) -> int:
        return index

    def read(self, index: int) -> bytes:
        return self._image

    def read_mask(self, index: int) -> None:
        return None


def test_an_incomplete_imagenet_is_warned_about(tmp_path: Path) -> None:
    source: Any = Thousand()
    make_plan(source, tmp_path / "train", name="imagenet", container="mds", policy="keep", num_shards=2)
    write_split(tmp_path / "train", source, quiet=True)
    found = check(tmp_path / "train", "index")
    assert found.good
    assert found.warnings[0] == "ImageNet-1K train has 1,281,167 images, this has 1,000"
    assert "have 732 to 1300 images, these have 1 (n00000000) to 1" in found.warnings[1]


def test_the_report_is_json(split: Path) -> None:
    flip(split / "shard.00000.mds", -5)
    report = json.loads(json.dumps(check(split).to_json()))
    assert (report["good"], report["num_samples"], report["num_shards"], report["level"]) == (False, 60, SHARDS, "hash")
