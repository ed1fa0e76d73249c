"""Adopting shards that other programs wrote: they are read without trusting them and left as they are."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from data_prep.adopt import adopt
from data_prep.files import PrepError, UsageError
from data_prep.formats.registry import CONTAINERS
from data_prep.verify import Level, Verification, verify_split
from images import image_folder
from nepa_dist.data.index import NAMES
from nepa_dist.data.prepared import PreparedContainer
from splits import prepare


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("source") / "images", num_classes=3, per_class=20)


@pytest.fixture(scope="module")
def originals(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good split in each container."""
    root = tmp_path_factory.mktemp("prepared")
    return {container: prepare(images, root / container, container) for container in CONTAINERS}


def check(folder: Path, level: Level = "hash", workers: int = 1) -> Verification:
    return verify_split(folder, level=level, workers=workers, quiet=True)


def archive(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def picture(kind: str = "JPEG", size: tuple[int, int] = (20, 10), value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB" if kind == "JPEG" else "L", size, value).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("container", CONTAINERS)
def test_shards_are_adopted_as_they_are(originals: dict[str, Path], tmp_path: Path, container: str) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    for path in originals[container].glob("shard*"):
        shutil.copy2(path, folder)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    manifest = adopt(folder, name="mine", class_names=["a", "b", "c"], workers=1, quiet=True)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("shard*")} == before
    assert (manifest.num_samples, manifest.split, manifest.class_names) == (60, "train", ["a", "b", "c"])
    assert check(folder, "decode").good
    ours, theirs = PreparedContainer(originals[container]), PreparedContainer(folder, check=True)
    as_pairs = [sorted((sample.label, sample.image) for sample in map(split.read, range(60))) for split in (ours, theirs)]
    assert as_pairs[0] == as_pairs[1]
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert adopt(folder, name="mine", class_names=["a", "b", "c"], quiet=True) == manifest
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_foreign_keys_become_names_and_ids_follow_them(tmp_path: Path) -> None:
    archive(tmp_path / "b-0.tar", [("z.jpg", picture(value=1)), ("z.cls", b"1")])
    archive(tmp_path / "a-1.tar", [("q.jpg", picture()), ("q.cls", b"0"), ("b.jpg", picture()), ("b.cls", b"7")])
    manifest = adopt(tmp_path, quiet=True)
    assert (tmp_path / NAMES).read_text().splitlines() == ["a-1.tar/b", "a-1.tar/q", "b-0.tar/z"]
    assert manifest.class_names == [str(label) for label in range(8)]
    assert [PreparedContainer(tmp_path).read(i).label for i in range(3)] == [7, 0, 1]


def test_adopted_images_that_do_not_decode_are_found(tmp_path: Path) -> None:
    data = picture(size=(64, 64))
    archive(tmp_path / "a.tar", [("0.jpg", data), ("0.cls", b"0"), ("1.jpg", data[: len(data) - 40]), ("1.cls", b"0")])
    adopt(tmp_path, quiet=True)
    assert check(tmp_path, "hash").good
    found = check(tmp_path, "decode")
    assert [problem.sample for problem in found.problems] == [1]
    assert "the image: cannot be decoded" in found.problems[0].reason


def test_adopted_masks_must_fit(tmp_path: Path) -> None:
    def sample(key: str, mask: bytes) -> list[tuple[str, bytes]]:
        return [(f"{key}.jpg", picture()), (f"{key}.seg.png", mask)]

    good, large, high = picture("PNG", value=255), picture("PNG", (30, 10)), picture("PNG", value=9)
    archive(
        tmp_path / "a.tar",
        [*sample("0", good), *sample("1", large), *sample("2", high), *sample("3", picture("PNG", value=255))],
    )
    adopt(tmp_path, class_names=["sky", "sea"], quiet=True)
    assert [(problem.sample, problem.reason) for problem in check(tmp_path, "decode").problems] == [
        (1, "the mask has 30x10 pixels, the index says 20x10"),
        (2, "the mask has the label 9; the class table ends at 2"),
    ]


def test_hostile_shards_are_refused_and_all_are_named(tmp_path: Path) -> None:
    archive(tmp_path / "a.tar", [("0.jpg", picture()), ("0.pkl", b"cos\nsystem\n(S'touch /tmp/run'\ntR.")])
    archive(tmp_path / "b.tar", [("../0.jpg", picture())])
    archive(tmp_path / "c.tar", [("0.jpg", picture()), ("0.cls", b"0")])
    with pytest.raises(PrepError) as caught:
        adopt(tmp_path, quiet=True)
    assert len(caught.value.problems) >= 2
    assert "a.tar" in caught.value.problems[0]
    assert "b.tar" in caught.value.problems[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar", "c.tar"]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], r"holds no \*\.tar"),
        (["a.tar", "b.mds"], "tar and mds"),
        (["a.tar.gz"], "compressed"),
        (["a.tar", "plan.json"], "of our own already"),
    ],
)
def test_folders_that_cannot_be_adopted(tmp_path: Path, names: list[str], reason: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=reason):
        adopt(tmp_path, quiet=True)


def test_a_lost_mds_shard_is_missed(originals: dict[str, Path], tmp_path: Path) -> None:
    for path in [*originals["mds"].glob("shard*"), originals["mds"] / "index.json"]:
        shutil.copy2(path, tmp_path)
    (tmp_path / "shard.00002.mds").unlink()
    with pytest.raises(PrepError, match=r"shard\.00002\.mds is missing"):
        adopt(tmp_path, quiet=True)


def test_labels_beyond_the_class_names_are_refused(tmp_path: Path) -> None:
    archive(tmp_path / "a.tar", [("0.jpg", picture()), ("0.cls", b"2000000000")])
    with pytest.raises(UsageError, match="labels up to 2,000,000,000"):
        adopt(tmp_path, quiet=True)
    with pytest.raises(UsageError, match="there are 1 class names"):
        adopt(tmp_path, class_names=["a"], quiet=True)
