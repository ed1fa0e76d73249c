"""Folders of images: what counts, what it is called, and what is said when it does not work."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from nepa_dist.data.containers import DataError
from nepa_dist.data.folder import FolderContainer
from nepa_dist.data.open import open_container

Split = Literal["train", "val"]


def _image(path: Path, value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (10, 10), (value, value, value)).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def _open(source: Path, split: Split = "train") -> FolderContainer:
    container = open_container(str(source), split, image_size=32)
    assert isinstance(container, FolderContainer)
    return container


def _content(container: FolderContainer) -> dict[str, int]:
    return {container.name(i): container.read(i).label for i in range(len(container))}


def test_class_folders_with_nested_hidden_and_other_files(tmp_path: Path) -> None:
    data = _image(tmp_path / "cat" / "b.PNG", 3)
    for name in ("cat/deep/er/a.jpeg", "ant/z.JPG", "ant/y.webp", "dog/x.bmp", "dog/w.tif", "dog/v.TIFF"):
        _image(tmp_path / name)
    for name in ("cat/notes.txt", "labels.csv", "dog/archive.tar", "dog/png"):
        (tmp_path / name).write_text("x")
    _image(tmp_path / ".hidden" / "a.png")
    _image(tmp_path / "cat" / "._b.png")
    container = _open(tmp_path)
    assert container.class_names == ["ant", "cat", "dog"]
    assert _content(container) == {
        "ant/y.webp": 0, "ant/z.JPG": 0, "cat/b.PNG": 1, "cat/deep/er/a.jpeg": 1,
        "dog/v.TIFF": 2, "dog/w.tif": 2, "dog/x.bmp": 2,
    }  # fmt: skip
    assert container.num_ignored == 4
    assert container.read(2).image == data
    assert container.read(2).mask is None
    with pytest.raises(IndexError):
        container.read(7)
    with pytest.raises(IndexError):
        container.read(-1)


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        _image(tmp_path / name)
    (tmp_path / "empty").mkdir()
    container = _open(tmp_path)
    assert container.class_names == []
    assert _content(container) == {"a.png": -1, "b.png": -1}


def test_images_beside_class_folders_are_unlabeled(tmp_path: Path) -> None:
    _image(tmp_path / "top.png")
    _image(tmp_path / "cat" / "a.png")
    container = _open(tmp_path)
    assert container.class_names == ["cat"]
    assert _content(container) == {"cat/a.png": 0, "top.png": -1}


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_class_named_like_a_split_does_not_hide_the_others(tmp_path: Path, name: str) -> None:
    for folder in ("airplane", name):
        _image(tmp_path / folder / "0.png")
    with pytest.raises(DataError, match=rf"is {name}/ a split, or a class like airplane/ beside it\? Move"):
        _open(tmp_path)
    (tmp_path / "airplane").rename(tmp_path / "test2017")
    if name == "train":
        assert len(_open(tmp_path)) == 1


def test_train_and_val_share_their_class_list(tmp_path: Path) -> None:
    for name in ("train/ant/1.png", "train/bee/2.png", "train/cat/3.png", "val/cat/4.png"):
        _image(tmp_path / name)
    train, val = _open(tmp_path), _open(tmp_path, "val")
    assert train.class_names == val.class_names == ["ant", "bee", "cat"]
    assert _content(train) == {"ant/1.png": 0, "bee/2.png": 1, "cat/3.png": 2}
    assert _content(val) == {"cat/4.png": 2}


def test_names_that_are_not_text_survive(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    for name in ("übung ☃.png".encode(), b"caf\xe9.png", b"new\nline.png"):
        _image(tmp_path / "seed.png")
        os.rename(folder + b"/seed.png", folder + b"/" + name)
    container = _open(tmp_path)
    assert len(container) == 3
    assert all(container.read(i).image for i in range(3))
    shown = [container.name(i) for i in range(3)]
    assert "übung ☃.png" in shown
    assert "\n".join(shown).encode("utf-8")


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    root, other = tmp_path / "data", tmp_path / "other"
    _image(root / "cat" / "a.png")
    _image(other / "b.png")
    (root / "dog").symlink_to(other)
    (root / "cat" / "loop").symlink_to(root)
    for name in ("alias_of_cat", "zoo"):
        (root / name).symlink_to(root / "cat")
    (root / "itself").symlink_to(root / "itself")
    container = _open(root)
    assert set(_content(container)) == {"cat/a.png", "dog/b.png"}


def test_a_link_to_nothing_is_kept_for_the_reader_to_report(tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    container = _open(tmp_path)
    assert len(container) == 2
    with pytest.raises(FileNotFoundError):
        container.read(1)


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    _image(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    container = _open(tmp_path)
    assert (len(container), container.num_ignored) == (1, 1)


def test_fingerprint_follows_names_sizes_and_split_but_not_the_place(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for root in (one, two / "train", two / "val"):
        _image(root / "cat" / "a.png")
        _image(root / "cat" / "b.png")
    base = _open(one).fingerprint
    assert len(base) == 64
    assert _open(two).fingerprint == base
    assert _open(two, "val").fingerprint != base
    (two / "train" / "cat" / "b.png").rename(two / "train" / "cat" / "c.png")
    assert _open(two).fingerprint != base
    (one / "cat" / "b.png").write_bytes(b"longer than before" * 20)
    assert _open(one).fingerprint != base


def test_a_container_can_be_pickled(tmp_path: Path) -> None:
    _image(tmp_path / "cat" / "a.png")
    container = _open(tmp_path)
    assert _content(pickle.loads(pickle.dumps(container))) == _content(container)  # noqa: S301 - our own bytes


def test_the_working_folder_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _image(tmp_path / "data" / "a.png")
    monkeypatch.chdir(tmp_path)
    container = _open(Path("data"))
    monkeypatch.chdir("/")
    assert container.read(0).image


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    _image(tmp_path / "flowers" / "a.png")
    _image(tmp_path / "only_val" / "val" / "a.png")
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "empty" / "readme.md").write_text("x")
    (tmp_path / "archive.tar").write_bytes(b"x")
    cases: list[tuple[Path | None, Split, str]] = [
        (None, "train", "data.source is not set: pass --data FOLDER or --data digits"),
        (tmp_path / "flower", "train", f"no such folder; did you mean {tmp_path}/flowers"),
        (tmp_path / "digit", "train", "no such folder; did you mean digits"),
        (tmp_path / "zzz", "train", "zzz: no such folder$"),
        (tmp_path / "no" / "such", "train", f"neither this folder nor {tmp_path}/no can be found"),
        (tmp_path / "archive.tar", "train", "is a file; it must be a folder"),
        (tmp_path / "empty", "train", r"holds no images \(1 files ignored\); images end in jpg, jpeg, png"),
        (tmp_path / "flowers", "val", "has no val/ folder.*expected FOLDER/train/<class>"),
        (tmp_path / "only_val", "train", "has val/ but no train/"),
    ]
    for source, split, message in cases:
        with pytest.raises(DataError, match=message):
            open_container(source if source is None else str(source), split, image_size=32)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _image(tmp_path / "cat" / "a.png")
    scandir = os.scandir

    def denied(path: bytes) -> object:  # permissions do not stop the superuser, under whom tests may run
        if bytes(path).rstrip(b"/").endswith(b"cat"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=r"cannot read the folder .*cat/: Permission denied"):
        _open(tmp_path)


def test_counting_images_needs_no_torch(tmp_path: Path) -> None:
    _image(tmp_path / "cat" / "a.png")
    code = (
        "import sys\n"
        "from nepa_dist.data import augment, decode, digits, order\n"
        "from nepa_dist.data.open import open_container\n"
        "assert 'sklearn' not in sys.modules\n"
        "print(len(open_container(sys.argv[1], 'train', image_size=32)), len(open_container('digits', 'val', image_size=32)))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "1 2000\n", done.stderr


def test_many_files_are_stored_compactly(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"image_with_a_long_name_{i:05d}.jpg").touch()
    container = _open(tmp_path)
    assert len(pickle.dumps(container)) < 300 * 50
    assert container.name(299) == "image_with_a_long_name_00299.jpg"
    assert np.unique([container.name(i) for i in range(300)]).size == 300
