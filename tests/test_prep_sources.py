"""Sources of a prepared split: folders, the ILSVRC2012 archives, images with masks, Parquet and Arrow files."""

from __future__ import annotations

import gzip
import io
import multiprocessing
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data_prep.open_source import open_source
from data_prep.sources import Source, SourceError, Split
from images import image_folder
from nepa_dist.data.open import open_container

# In the order of the ILSVRC ids 1, 2, 3, 4: not that of the sorted WordNet ids.
WNIDS = ["n03000000", "n01443537", "n02000000", "n01440764"]
TRUTH = [2, 4, 1, 1, 3, 2]
Member = tuple[str, bytes]


def _image(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (10, 10), (value, value, value)).save(file, "JPEG")
    return file.getvalue()


def _tar(path: Path, members: list[Member], *changes: Callable[[tarfile.TarInfo], Any]) -> bytes:
    """An archive; each function changes the header of the last member."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, (name, data) in enumerate(members, 1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for change in changes if number == len(members) else ():
                change(info)
            archive.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def _train_tar(root: Path) -> None:
    classes = []
    for c, wnid in enumerate(WNIDS):
        images = [(f"{wnid}_{number}.JPEG", _image(10 * c + number)) for number in (10026, 9, 200)]
        classes.append((f"{wnid}.tar", _tar(root / "class.tmp", images)))
    _tar(root / "ILSVRC2012_img_train.tar", classes)
    (root / "class.tmp").unlink()


def _val_tar(root: Path, count: int = len(TRUTH)) -> None:
    images = [(f"ILSVRC2012_val_{k:08d}.JPEG", _image(100 + k)) for k in range(count, 0, -1)]
    _tar(root / "ILSVRC2012_img_val.tar", images)


def _devkit(root: Path, truth: list[int] = TRUTH) -> None:
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children"]
    synsets = np.empty((len(WNIDS) + 1, 1), dtype=[(name, object) for name in fields])
    for k, wnid in enumerate(WNIDS):
        synsets[k, 0] = (float(k + 1), wnid, f"thing {wnid}, other word", "a gloss", 0.0)
    synsets[-1, 0] = (5.0, "n00001740", "entity", "an inner node", 2.0)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    base = "ILSVRC2012_devkit_t12/data/"
    text = "".join(f"{number}\n" for number in truth).encode()
    members = [(base + "meta.mat", meta.getvalue()), (base + "ILSVRC2012_validation_ground_truth.txt", text)]
    data = _tar(root / "kit.tmp", members)
    (root / "kit.tmp").unlink()
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(data))


@pytest.fixture
def ilsvrc(tmp_path: Path) -> Path:
    root = tmp_path / "ilsvrc"
    root.mkdir()
    _train_tar(root)
    _val_tar(root)
    _devkit(root)
    return root


def _content(source: Source) -> list[tuple[str, int, bytes]]:
    return [(source.name(i), source.label(i), source.read(i)) for i in range(len(source))]


def _refused(path: Path, split: Split = "train", **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(path, split=split, **options)
    return str(caught.value)


def test_a_folder_has_the_ids_of_training(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", seed=1)
    image_folder(tmp_path / "val", num_classes=2, per_class=2, seed=2)
    (tmp_path / "train" / "class_0" / "notes.txt").write_text("x")
    for split in ("train", "val"):
        source = open_source(tmp_path, split=split)
        container = open_container(str(tmp_path), split, image_size=8)  # type: ignore[arg-type]
        samples = [container.read(i) for i in range(len(container))]
        assert _content(source) == [(container.name(i), s.label, s.image) for i, s in enumerate(samples)]
        assert (source.kind, source.class_names, source.has_masks) == ("folder", container.class_names, False)
        assert (source.fingerprint, source.num_ignored) == (container.fingerprint, container.num_ignored)
        assert source.read_mask(0) is None
    assert open_source(tmp_path / "val", split="train").class_names == ["class_0", "class_1"]


def test_flat_validation_images_beside_classes_are_refused(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", num_classes=2, per_class=1)
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(_image(1))
    assert "labels are unknown" in _refused(tmp_path, "val")


def test_names_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "new\nline\u2028.png").write_bytes(_image(1))
    assert open_source(tmp_path, split="train").name(0) == "new\\nline\\u2028.png"


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_archives_equal_the_unpacked_folders(ilsvrc: Path, tmp_path: Path, split: Split) -> None:
    source = open_source(ilsvrc, split=split)
    assert source.kind == "ilsvrc2012"
    assert source.class_names == sorted(WNIDS)
    assert source.class_titles == [f"thing {wnid}, other word" for wnid in sorted(WNIDS)]
    for wnid in WNIDS:
        (tmp_path / "folder" / "train" / wnid).mkdir(parents=True)
    for name, _, data in _content(source):
        (tmp_path / "folder" / split / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / split / name).write_bytes(data)
    folder = open_source(tmp_path / "folder", split=split)
    assert _content(source) == _content(folder)
    assert source.class_names == folder.class_names
    assert source.fingerprint == folder.fingerprint


def test_train_images_of_the_archive(ilsvrc: Path) -> None:
    content = _content(open_source(ilsvrc, split="train"))
    assert [name for name, _, _ in content[:3]] == [f"n01440764/n01440764_{k}.JPEG" for k in ("10026", "200", "9")]
    images = {
        f"{w}/{w}_{k}.JPEG": (sorted(WNIDS).index(w), _image(10 * c + k)) for c, w in enumerate(WNIDS) for k in (10026, 9, 200)
    }
    assert {name: (label, data) for name, label, data in content} == images


def _val_labels(source: Source) -> dict[int, str]:
    """Number of the validation image -> WordNet id; the pixels prove the number."""
    labels = {}
    for name, label, data in _content(source):
        number = int(name[-13:-5])
        assert data == _image(100 + number)
        assert name.startswith(source.class_names[label] + "/")
        labels[number] = source.class_names[label]
    return labels


def test_ilsvrc_ids_are_not_ranks(ilsvrc: Path) -> None:
    expected = {k: WNIDS[number - 1] for k, number in enumerate(TRUTH, 1)}
    assert _val_labels(open_source(ilsvrc, split="val")) == expected
    wrong = {k: sorted(WNIDS)[number - 1] for k, number in enumerate(TRUTH, 1)}
    assert expected != wrong


@pytest.mark.parametrize("form", ["wnid", "rank", "name wnid", "name rank"])
@pytest.mark.parametrize("table", ["devkit", "train"])
def test_validation_labels_from_a_text_file(ilsvrc: Path, tmp_path: Path, form: str, table: str) -> None:
    (ilsvrc / ("ILSVRC2012_img_train.tar" if table == "devkit" else "ILSVRC2012_devkit_t12.tar.gz")).unlink()
    expected = {k: WNIDS[(k * k) % 3] for k in range(1, len(TRUTH) + 1)}
    lines = []
    for k, wnid in expected.items():
        label = wnid if "wnid" in form else str(sorted(WNIDS).index(wnid))
        lines.append(f"ILSVRC2012_val_{k:08d}.JPEG {label}" if "name" in form else label)
    if "name" in form:
        lines.reverse()
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    source = open_source(ilsvrc, split="val", val_labels=tmp_path / "labels.txt")
    assert source.class_names == sorted(WNIDS)
    assert _val_labels(source) == expected


def test_wrong_validation_labels_are_refused(ilsvrc: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"

    def refused(text: str) -> str:
        labels.write_text(text)
        return _refused(ilsvrc, "val", val_labels=labels)

    assert "ILSVRC ids" in refused("\n".join(map(str, [*TRUTH[:5], 4])))  # 1 .. 4 in the kit's order
    assert "5 labels for 6 images" in refused("0\n" * 5)
    assert "classes that the data set does not have" in refused("n09999999\n" * 6)
    assert "'dog'" in refused("0\n1\ndog\n0\n0\n0")
    names = [f"ILSVRC2012_val_{k:08d}.JPEG" for k in range(1, 7)]
    assert f"{names[5]} has no label" in refused("".join(f"{name} 0\n" for name in names[:5]))
    assert "occur twice" in refused("".join(f"{name} 0\n" for name in [*names, names[0]]))
    assert "every line" in refused("a b c")
    labels.unlink()
    assert "labels.txt cannot be read" in _refused(ilsvrc, "val", val_labels=labels)
    assert "is for sources of kind ilsvrc2012" in _refused(tmp_path, val_labels=labels)


def test_what_the_kit_and_the_archives_disagree_on(ilsvrc: Path, tmp_path: Path) -> None:
    _val_tar(ilsvrc, count=5)
    assert "missing 1, without label 0:\n  ILSVRC2012_val_00000006.JPEG" in _refused(ilsvrc, "val")
    _devkit(ilsvrc, truth=[2, 9])
    assert "line 2: '9' is no ILSVRC id" in _refused(ilsvrc, "val")
    kit = ilsvrc / "ILSVRC2012_devkit_t12.tar.gz"
    kit.write_bytes(kit.read_bytes()[:-40])
    assert "ILSVRC2012_devkit_t12.tar.gz cannot be read" in _refused(ilsvrc, "val")
    kit.unlink()
    assert "holds no labels: put ILSVRC2012_devkit_t12.tar.gz beside it" in _refused(ilsvrc, "val")
    (ilsvrc / "ILSVRC2012_img_train.tar").unlink()
    assert "ILSVRC2012_img_train.tar is missing" in _refused(ilsvrc)


def _set(**values: Any) -> Callable[[tarfile.TarInfo], Any]:
    return lambda info: [setattr(info, name, value) for name, value in values.items()]


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("../a.JPEG", {}, "'../a.JPEG' points outside"),
        ("/etc/a.JPEG", {}, "'/etc/a.JPEG' points outside"),
        ("a.JPEG", {"type": tarfile.SYMTYPE, "linkname": "x", "size": 0}, "'a.JPEG' is a symbolic link"),
        ("a.JPEG", {"type": tarfile.LNKTYPE, "linkname": "x", "size": 0}, "'a.JPEG' is a hard link"),
        ("a.JPEG", {"type": tarfile.CHRTYPE, "size": 0}, "'a.JPEG' is a character device"),
        ("a.JPEG", {"type": tarfile.FIFOTYPE, "size": 0}, "'a.JPEG' is a pipe"),
        ("ILSVRC2012_val_00000001.JPEG", {}, "'ILSVRC2012_val_00000001.JPEG' occurs twice"),
        ("./ILSVRC2012_val_00000001.JPEG", {}, "'ILSVRC2012_val_00000001.JPEG' occurs twice"),
        ("deep/a.JPEG", {}, "'deep/a.JPEG' lies in a folder"),
        ("other.JPEG", {}, "'other.JPEG' is not named"),
    ],
)
def test_hostile_members_are_named(ilsvrc: Path, name: str, values: dict[str, Any], reason: str) -> None:
    first = ("ILSVRC2012_val_00000001.JPEG", b"x")
    _tar(ilsvrc / "ILSVRC2012_img_val.tar", [first, (name, b"y")], _set(**values))
    before = sorted(ilsvrc.parent.rglob("*"))
    assert reason in _refused(ilsvrc, "val")
    assert sorted(ilsvrc.parent.rglob("*")) == before


def test_hostile_class_archives_are_named(ilsvrc: Path) -> None:
    inner = _tar(ilsvrc / "class.tmp", [("good.JPEG", b"x"), ("deep/../evil.JPEG", b"y")])
    _tar(ilsvrc / "ILSVRC2012_img_train.tar", [(f"{WNIDS[0]}.tar", inner)])
    assert f"{WNIDS[0]}.tar: the member 'deep/../evil.JPEG' points outside" in _refused(ilsvrc)
    _tar(ilsvrc / "ILSVRC2012_img_train.tar", [("class.tar", inner)])
    assert "'class.tar' is no class archive" in _refused(ilsvrc)
    _tar(ilsvrc / "ILSVRC2012_img_train.tar", [("n09999999.tar", _tar(ilsvrc / "class.tmp", [("a.JPEG", b"x")]))])
    assert "does not know:\n  n09999999" in _refused(ilsvrc)
    (ilsvrc / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert open_source(ilsvrc, split="train").class_names == ["n09999999"]


def test_damaged_archives_are_refused_and_not_cut(ilsvrc: Path) -> None:
    path = ilsvrc / "ILSVRC2012_img_val.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        third = archive.getmembers()[2].offset
        end = archive.getmembers()[-1].offset_data
    damaged = bytearray(whole)
    damaged[third + 148] ^= 1  # the check sum of a header in the middle: tarfile alone would end there without a word
    for data in (bytes(damaged), whole[: third + 100], whole[: end + 3], whole[:third], b"no archive" * 99):
        path.write_bytes(data)
        message = _refused(ilsvrc, "val")
        assert str(path) in message
        assert "cut off" in message or "damaged" in message
    path.write_bytes(whole)
    assert len(open_source(ilsvrc, split="val")) == len(TRUTH)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("size", [-1024, -1, 2**40, 2**62])
def test_impossible_sizes_neither_hang_nor_fill_the_memory(ilsvrc: Path, kind: bytes, size: int) -> None:
    good = _tar(ilsvrc / "good.tmp", [("ILSVRC2012_val_00000001.JPEG", b"x")])[:1024]
    info = tarfile.TarInfo("ILSVRC2012_val_00000002.JPEG")
    info.type, info.size = kind, size
    header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
    (ilsvrc / "ILSVRC2012_img_val.tar").write_bytes(good + header + bytes(10240))
    assert "ILSVRC2012_img_val.tar" in _refused(ilsvrc, "val")


def _read_all(source: Source) -> list[bytes]:
    return [source.read(i) for i in range(len(source))]


def test_an_archive_source_works_in_other_processes(ilsvrc: Path) -> None:
    source = open_source(ilsvrc, split="train")
    expected = _read_all(source)
    assert _read_all(pickle.loads(pickle.dumps(source))) == expected  # noqa: S301 - our own bytes
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_read_all, [source] * 4) == [expected] * 4
    path = ilsvrc / "ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(OSError, match="became shorter"):
        source.read(len(source) - 1)


def test_kinds_and_options_are_checked(ilsvrc: Path, tmp_path: Path) -> None:
    assert "is not a folder" in _refused(tmp_path / "nothing")
    assert "pass the folder that holds it" in _refused(ilsvrc / "ILSVRC2012_img_train.tar")
    assert "source kind 'zip' is unknown" in _refused(ilsvrc, kind="zip")
    (ilsvrc / "train").mkdir()
    assert "looks like ilsvrc2012 and folder" in _refused(ilsvrc)
    assert open_source(ilsvrc, split="train", kind="ilsvrc2012").kind == "ilsvrc2012"
