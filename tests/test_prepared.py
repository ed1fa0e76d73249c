"""Prepared splits: the same samples from every container, and what is said of one that is not whole."""

import io
import multiprocessing
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from data_prep.formats.base import StoredSample, probe_image
from data_prep.formats.registry import CONTAINERS
from images import batch_digest
from nepa_dist.config import DataConfig
from nepa_dist.data.containers import Container, DataError
from nepa_dist.data.decode import BadImage
from nepa_dist.data.folder import FolderContainer
from nepa_dist.data.index import INDEX, MANIFEST, NAMES, content_sha256, read_manifest
from nepa_dist.data.loader import EvalLoader, TrainLoader
from nepa_dist.data.open import open_container, open_split
from nepa_dist.data.prepared import PreparedContainer, decode_mask, is_local
from shards import HEIGHT, WIDTH, edit, make_samples, pixels, sha256, write_split

Name = Literal["tar", "mds", "beton"]


def _mask(sample: StoredSample) -> Any:
    return None if sample.mask is None else np.asarray(Image.open(io.BytesIO(sample.mask)))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_each_container_gives_the_samples(tmp_path: Path, container: Name, access: Literal["mmap", "pread"]) -> None:
    samples = make_samples(8, masks=True)
    samples[5] = samples[5]._replace(label=-1)
    manifest = write_split(tmp_path / "train", container, samples)
    split = PreparedContainer(tmp_path / "train", access=access, check=True)
    assert (len(split), split.class_names, split.num_ignored) == (8, ["a", "b", "c"], 0)
    assert split.fingerprint == manifest.content_sha256
    for sample in samples:
        read = split.read(sample.id)
        assert read.image == sample.image
        assert type(read.image) is bytes
        assert read.label == sample.label
        assert (read.mask is None) == (sample.mask is None)
        assert read.mask is None or np.array_equal(read.mask, _mask(sample))
        shard = manifest.shards[sample.id % 3].name
        assert split.name(sample.id) == f"class_{sample.id % 3}/{sample.id}.jpg ({shard})"
    for index in (-1, 8):
        with pytest.raises(IndexError):
            split.read(index)


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    samples = make_samples(6, masks=True)
    prints = [write_split(tmp_path / name, name, samples, shards=i + 1).content_sha256 for i, name in enumerate(CONTAINERS)]
    assert len(set(prints)) == 1
    samples[2] = samples[2]._replace(label=0)
    assert write_split(tmp_path / "other", "tar", samples).content_sha256 != prints[0]


@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_raw_pixels_need_no_decoding(tmp_path: Path, access: Literal["mmap", "pread"]) -> None:
    write_split(tmp_path / "train", "beton", make_samples(4, raw=True))
    split = PreparedContainer(tmp_path / "train", access=access, max_open=1)
    images: list[Any] = [split.read(i).image for i in range(4)]  # the first shards are closed by now
    for i, image in enumerate(images):
        assert image.shape == (HEIGHT, WIDTH, 3)
        assert image.dtype == np.uint8
        assert not image.flags.writeable
        assert np.array_equal(image, pixels(i))


def test_training_sees_the_same_batches_in_every_container(tmp_path: Path, tiny_images: Path) -> None:
    folder = FolderContainer(tiny_images, "train")
    samples = []
    for i in range(len(folder)):
        data = folder.read(i).image
        assert isinstance(data, bytes)
        info = probe_image(data)
        samples.append(StoredSample(i, folder.name(i), data, 0, info.height, info.width, folder.read(i).label, None))

    def digests(container: Container, workers: int) -> list[str]:
        loader = TrainLoader(
            container, DataConfig(num_workers=workers), image_size=16, seed=3, global_batch_size=4, micro_batch_size=4,
            rank=0, world_size=1, start_step=0, num_steps=5,
        )  # fmt: skip
        return [batch_digest(batch) for batch in loader]

    expected = digests(folder, 0)
    for name in CONTAINERS:
        write_split(tmp_path / name / "train", name, samples)
        container = open_container(str(tmp_path / name), "train", image_size=16)
        assert isinstance(container, PreparedContainer)
        assert digests(container, 0) == expected
        assert digests(container, 2) == expected  # forked, with files that are open already


def _labels(split: PreparedContainer) -> list[int]:
    return [split.read(i).label for i in range(len(split))]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_container_goes_to_another_process(tmp_path: Path, method: str) -> None:
    write_split(tmp_path / "train", "tar", make_samples(5))
    split = PreparedContainer(tmp_path / "train")
    expected = _labels(split)
    assert len(pickle.dumps(split)) < 4000
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_labels, (split,)) == expected
    assert _labels(pickle.loads(pickle.dumps(split))) == expected  # noqa: S301


def _open_shards(folder: Path) -> int:
    """Shards below a folder that this process has open; other tests may have left some of theirs open."""
    descriptors = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    opened = [path.readlink() for path in descriptors if path.is_symlink()]
    return sum(path.suffix == ".tar" and path.is_relative_to(folder) for path in opened)


@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_no_more_files_are_open_than_allowed(tmp_path: Path, access: Literal["mmap", "pread"]) -> None:
    write_split(tmp_path / "train", "tar", make_samples(8), shards=8)
    split = PreparedContainer(tmp_path / "train", access=access, max_open=2)
    assert _open_shards(tmp_path) == 0
    assert _labels(split) == [i % 3 for i in range(8)] == _labels(split)
    assert _open_shards(tmp_path) == 2
    del split
    assert _open_shards(tmp_path) == 0


def test_the_index_stays_in_its_file(tmp_path: Path) -> None:
    write_split(tmp_path / "train", "tar", make_samples(5))
    split = PreparedContainer(tmp_path / "train")
    assert str(tmp_path / "train" / INDEX) in Path("/proc/self/maps").read_text()
    del split


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_check_finds_a_changed_byte(tmp_path: Path, container: Name) -> None:
    samples = make_samples(6, masks=True)
    write_split(tmp_path / "train", container, samples)
    for path in (tmp_path / "train").glob("*shard*"):
        data = path.read_bytes()
        for part in (samples[1].image, samples[3].mask or b""):
            data = data.replace(part, part[:100] + bytes([part[100] ^ 1]) + part[101:])
        path.write_bytes(data)
    split = PreparedContainer(tmp_path / "train", check=True)
    with pytest.raises(OSError, match=r"sample 1 \(class_1/1.jpg \(.*\)\): the image is damaged"):
        split.read(1)
    with pytest.raises(OSError, match=r"sample 3 .*: the mask is damaged"):
        split.read(3)
    assert split.read(0).image == samples[0].image
    assert PreparedContainer(tmp_path / "train").read(1).label == 1
    found = []
    for checksums in (True, False):
        config = DataConfig(source=str(tmp_path), checksums=checksums, num_workers=0)
        loader = EvalLoader(open_split(config, "train", image_size=16), config, image_size=16, batch_size=6)
        found.append([(bad.id, "the image is damaged" in bad.reason) for batch in loader for bad in batch.bad])
    assert found[0] == [(1, True), (3, False)]
    assert (1, True) not in found[1]


def test_checksums_are_asked_only_of_what_has_them(tiny_images: Path) -> None:
    for source in (str(tiny_images), "digits"):
        with pytest.raises(DataError, match=r"data.checksums: .* has no prepared train split"):
            open_split(DataConfig(source=source, checksums=True), "train", image_size=16)


def test_a_shard_that_is_cut_later_is_an_error_of_its_samples(tmp_path: Path) -> None:
    write_split(tmp_path / "train", "tar", make_samples(3), shards=1)
    split = PreparedContainer(tmp_path / "train", access="pread")
    os.truncate(tmp_path / "train" / "shard-00000.tar", 100)
    with pytest.raises(OSError, match=r"sample 2 .* shorter than it was"):
        split.read(2)
    os.unlink(tmp_path / "train" / "shard-00000.tar")
    with pytest.raises(FileNotFoundError):
        PreparedContainer.read(pickle.loads(pickle.dumps(split)), 0)  # noqa: S301


def test_all_shards_that_are_missing_or_cut_are_named(tmp_path: Path) -> None:
    write_split(tmp_path / "train", "tar", make_samples(30), shards=15)
    folder = tmp_path / "train"
    (folder / "shard-00003.tar").unlink()
    os.truncate(folder / "shard-00007.tar", 100)
    with pytest.raises(DataError) as caught:
        PreparedContainer(folder)
    text = str(caught.value)
    assert "2 of 16 files cannot be used" in text
    assert "shard-00003.tar: No such file" in text
    assert "shard-00007.tar: 100 bytes instead of" in text
    for k in range(15):
        (folder / f"shard-{k:05d}.tar").unlink(missing_ok=True)
    with pytest.raises(DataError, match="and 5 more"):
        PreparedContainer(folder)


def _change_manifest(**values: object) -> Callable[[Path], object]:
    return lambda folder: (folder / MANIFEST).write_bytes(replace(read_manifest(folder / MANIFEST), **values).to_bytes())  # type: ignore[arg-type]


def _change_index(name: str, value: int) -> Callable[[Path], object]:
    """Change a field of sample 1 in the index and all digests of it."""

    def change(folder: Path) -> None:
        index = np.load(folder / INDEX)
        index[name][1] = value
        np.save(folder / INDEX, index)
        _change_manifest(index_sha256=sha256(folder / INDEX), content_sha256=content_sha256(index))(folder)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: edit(folder / INDEX, lambda data: data.__setitem__(-1, 7)), "index.npy is damaged or of another split"),
        (lambda folder: edit(folder / INDEX, lambda data: data.__delitem__(slice(50, None))), "index.npy cannot be read"),
        (lambda folder: edit(folder / INDEX, lambda data: data.__setitem__(data.index(b"}"), 121)), "index.npy cannot be read"),
        (lambda folder: (folder / INDEX).unlink(), "index.npy cannot be read"),
        (lambda folder: (folder / NAMES).unlink(), "names.txt: no such file"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json is not JSON"),
        (_change_manifest(format=99), "format 99"),
        (_change_manifest(num_samples=7), "do not add up"),
        (_change_manifest(class_names=["a"]), "labels from 0 to 2, but manifest.json names 1 classes"),
        (_change_index("label", -2), "labels from -2"),
        (_change_index("shard", 3), "names shard 3 of 3"),
        (_change_index("offset", 2**63), "sample 1 ends behind the end of its shard"),
        (_change_index("encoding", 2), "unknown encoding"),
        (_change_index("encoding", 1), "do not fill their pixels"),
    ],
)  # fmt: skip
def test_a_split_that_is_not_whole_is_not_opened(tmp_path: Path, change: Callable[[Path], object], reason: str) -> None:
    write_split(tmp_path / "train", "tar", make_samples(6))
    change(tmp_path / "train")
    with pytest.raises(DataError, match=reason):
        PreparedContainer(tmp_path / "train")


@pytest.mark.parametrize(
    ("mode", "data"), [("L", [0, 1, 149, 255]), ("I;16", [0, 1, 150, 65535]), ("P", [0, 1, 2, 3]), ("1", [0, 255, 0, 255])]
)
def test_masks_keep_their_numbers(mode: str, data: list[int]) -> None:
    image = Image.new(mode, (2, 2))
    image.putdata(data)
    if mode == "P":
        image.putpalette([10, 20, 30] * 256)
    file = io.BytesIO()
    image.save(file, "PNG")
    mask = decode_mask(file.getvalue())
    assert mask.ravel().tolist() == data
    assert np.issubdtype(mask.dtype, np.integer)


@pytest.mark.parametrize("mode", ["RGB", "LA", None])
def test_what_is_no_mask_is_a_bad_image(mode: str | None) -> None:
    file = io.BytesIO(b"no image")
    if mode is not None:
        Image.new(mode, (2, 2)).save(file, "PNG")
    with pytest.raises(BadImage, match="mask"):
        decode_mask(file.getvalue())


def test_open_container_knows_prepared_splits_and_bare_shards(tmp_path: Path, tiny_images: Path) -> None:
    data = tmp_path / "data"
    write_split(data / "train", "mds", make_samples(4))
    assert len(open_container(str(data), "train", image_size=8)) == 4
    with pytest.raises(DataError, match="has train/ but no val/"):
        open_container(str(data), "val", image_size=8)
    with pytest.raises(DataError, match=f"is one prepared split: name the folder that holds it, {data}"):
        open_container(str(data / "train"), "train", image_size=8)
    (data / "train" / MANIFEST).unlink()
    with pytest.raises(DataError, match=f"shard.00000.mds.* without an index: python -m data_prep adopt {data}"):
        open_container(str(data), "train", image_size=8)
    for name in ("a.tar", "b.beton"):
        folder = tmp_path / name / "train"
        folder.mkdir(parents=True)
        (folder / name).write_bytes(b"x")
        for source in (folder, folder.parent):
            with pytest.raises(DataError, match=f"adopt {source}"):
                open_container(str(source), "train", image_size=8)
    (tiny_images / "backup.tar").write_bytes(b"x")  # beside images it is just another file
    assert open_container(str(tiny_images), "train", image_size=8).num_ignored == 1


_MOUNTS = """
22 27 0:21 / /proc rw - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 27 0:40 / /scratch rw - lustre 10.0.0.1@o2ib:/scratch rw
31 27 0:41 / /scratch/local rw - xfs /dev/nvme0n1 rw
32 27 0:42 / /home rw - nfs4 server:/home rw
33 27 0:43 / /opt/with\\040space rw shared:7 - fuse.sshfs me@x:/ rw
34 27 0:44 / /var/over rw - nfs server:/a rw
35 27 0:45 / /var/over rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("folder", "local"),
    [
        ("/opt/x", True), ("/scratch/x", False), ("/scratch/local/x", True), ("/scratch/localx", False), ("/home", False),
        ("/homes", True), ("/opt/with space/x", False), ("/var/over/x", True),
    ],
)  # fmt: skip
def test_which_folders_are_local(folder: str, local: bool) -> None:
    assert is_local(Path(folder), _MOUNTS) is local
    assert not is_local(Path(folder), "")
