"""Shards that are damaged or made to do harm: each is refused, with its file, its sample and the reason, and never loaded."""

import io
import json
import pickle
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.formats.base import ShardError
from data_prep.formats.registry import CONTAINERS, get_format
from shards import edit, image_file, make_samples, mask_file

IMAGE = image_file(0)


def _problems(container: str, path: Path) -> str:
    with pytest.raises(ShardError) as caught:
        get_format(container).scan_shard(path)
    assert caught.value.path == path
    assert str(caught.value).startswith(str(path))
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems  # noqa: S301
    return str(caught.value)


def _tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path


def _special(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("members", "reasons"),
    [
        ([("../a.jpg", IMAGE)], ["../a.jpg", "leads out"]),
        ([("x/../../a.jpg", IMAGE)], ["leads out"]),
        ([("/a.jpg", IMAGE)], ["member /a.jpg", "absolute"]),
        ([("a\nb.jpg", IMAGE)], [r"a\nb.jpg", "control characters"]),
        ([_special("a.jpg", tarfile.SYMTYPE)], ["member a.jpg", "symbolic link"]),
        ([_special("a.jpg", tarfile.LNKTYPE)], ["hard link"]),
        ([_special("a.jpg", tarfile.CHRTYPE)], ["a device"]),
        ([_special("a.jpg", tarfile.FIFOTYPE)], ["a pipe"]),
        ([_special("a.jpg", b"Z")], ["unknown kind"]),
        ([("a.jpg", IMAGE), ("a.jpg", IMAGE)], ["member a.jpg", "comes twice"]),
        ([("a.jpg", IMAGE), ("b.jpg", IMAGE), ("a.cls", b"1")], ["sample a", "comes twice"]),
        ([("a.jpg", IMAGE), ("a.png", IMAGE)], ["sample a", "2 image members: jpg, png"]),
        ([("a.jpg", IMAGE), ("a.cls", b"cat")], ["sample a", "b'cat' is no integer"]),
        ([("a.jpg", IMAGE), ("a.cls", b"9" * 19)], ["9999999999999999999 is not in"]),
        ([("a.jpg", IMAGE), ("a.cls", b"1" * 1000)], ["the label has 1000 bytes"]),
        ([("a.cls", b"1")], ["sample a", "has no image among its members: cls"]),
        ([("a.jpg", b"not an image")], ["sample a", "not an image"]),
        ([("a.jpg", IMAGE), ("a.seg.png", IMAGE)], ["the mask is no PNG"]),
        ([("a.jpg", IMAGE), ("a.pkl", b"x")], ["member a.pkl", "can run code"]),
        ([("a.jpg", IMAGE), ("a.meta.pyd", b"x")], ["member a.meta.pyd"]),
        ([("README", b"text")], ["holds no samples"]),
        (
            [("a.jpg", IMAGE), ("b.jpg", b""), ("c.cls", b"1"), ("../d.jpg", IMAGE), ("e.jpg", IMAGE), ("e.pth", b"")],
            ["sample b", "sample c", "../d.jpg", "e.pth"],
        ),
    ],
)  # fmt: skip
def test_members_that_must_not_be_in_a_tar(tmp_path: Path, members: list[tuple[str, bytes]], reasons: list[str]) -> None:
    text = _problems("tar", _tar(tmp_path / "x.tar", *members))
    assert all(reason in text for reason in reasons), text


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return Path.touch.__get__(tmp_path / "touched"), ()  # type: ignore[return-value]

    _problems("tar", _tar(tmp_path / "x.tar", ("a.jpg", IMAGE), ("a.pickle", pickle.dumps(Evil()))))
    assert not (tmp_path / "touched").exists()


def _header_field(start: int, text: bytes) -> Callable[[bytearray], None]:
    """Set a field of the first header, with a right checksum."""

    def change(data: bytearray) -> None:
        data[start : start + len(text)] = text
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])

    return change


def _longest_header(data: bytearray) -> None:
    """A first member that claims to be a name of 8 TiB."""
    _header_field(124, b"\x80" + (1 << 43).to_bytes(11, "big"))(data)
    _header_field(156, b"L")(data)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_header_field(124, b"77777777777\0"), "longer than the rest of the file"),
        (_header_field(124, b"\x80" + (1 << 62).to_bytes(11, "big")), "longer than the rest of the file"),
        (_header_field(124, b"\xff" * 12), "longer than the rest of the file"),
        (_longest_header, "longer than the rest of the file"),
        (_header_field(124, b"zzz"), "byte 0: it is no tar file"),
        (lambda data: data.__setitem__(0, 255), "byte 0: it is no tar file"),
        (lambda data: data.__setitem__(1536, 255), "byte 1536: a member's header is damaged"),
        (lambda data: data.__delitem__(slice(1000, None)), "longer than the rest"),
        (lambda data: data.__delitem__(slice(1700, None)), "ends without the mark"),
        (lambda data: data.__delitem__(slice(1536, None)), "ends without the mark"),
        (lambda data: data.__delitem__(slice(4096, None)), "half of the mark"),
        (lambda data: data.extend(IMAGE), "data behind the end"),
        (lambda data: data.clear(), "ends without the mark"),
        (lambda data: data.__setitem__(slice(0, 3), b"\x1f\x8b\x08"), "compressed archives"),
    ],
)  # fmt: skip
def test_a_damaged_tar(tmp_path: Path, change: Callable[[bytearray], object], reason: str) -> None:
    path = _tar(tmp_path / "x.tar", ("a.jpg", IMAGE[:600].ljust(1024, b"\0")), ("a.cls", b"1"), ("b.txt", b"3"))
    edit(path, lambda data: data.__delitem__(slice(4608, None)))
    edit(path, change)
    assert reason in _problems("tar", path)


def test_a_record_of_attributes_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 32
    with open(path, "wb") as file:
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(1 << 33)  # takes no room on the disk
    tracemalloc.start()
    assert "attributes of 4294967296 bytes" in _problems("tar", path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


@pytest.mark.parametrize("body", [b"9999999999 path=a\n", b"path=a", b"12 path", b"0 path=a\n", b"11 path=abc"])
def test_damaged_attributes(tmp_path: Path, body: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(body)
    data = info.tobuf(tarfile.USTAR_FORMAT) + body.ljust(512, b"\0") + bytes(1024)
    (tmp_path / "x.tar").write_bytes(data)
    assert "damaged PAX attributes" in _problems("tar", tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("record", "reason"), [("path=../up.jpg", "leads out"), ("GNU.sparse.major=1", "sparse"), ("size=x", "cut")]
)
def test_attributes_that_change_a_member(tmp_path: Path, record: str, reason: str) -> None:
    key, _, value = record.partition("=")
    info = tarfile.TarInfo("a.jpg")
    info.size, info.pax_headers = len(IMAGE), {key: value}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(IMAGE))
    assert reason in _problems("tar", tmp_path / "x.tar")


def _shard(path: Path, container: str, *, raw: bool = False) -> Path:
    get_format(container).write_shard(path, make_samples(3, masks=True, raw=raw), with_mask=True)
    return path


def _put(offset: int, kind: str, value: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(kind, data, offset, value)


def _config(**changes: object) -> Callable[[bytearray], None]:
    """Change the JSON in an MDS shard, which keeps its length."""

    def change(data: bytearray) -> None:
        start, end = 20, int.from_bytes(data[4:8], "little")
        text = json.dumps(json.loads(data[start:end]) | changes).encode()
        data[start:end] = text
        grown = len(text) - (end - start)
        for i in range(4):
            _put(4 + 4 * i, "<I", int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "little") + grown)(data)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_put(0, "<I", 0), "0 samples"),
        (_put(0, "<I", 2**32 - 1), "4294967295 samples, which do not fit"),
        (_put(8, "<I", 10), "sample 0: its bytes"),
        (_put(12, "<I", 2**31), "sample 2: its bytes"),
        (_put(4, "<I", 8), "the file was cut or is damaged"),
        (lambda data: data.__delitem__(slice(-5, None)), "the file was cut or is damaged"),
        (lambda data: data.__delitem__(slice(2, None)), "no MDS shard"),
        (lambda data: data.extend(b"x"), "the file was cut or is damaged"),
        (lambda data: data.__setitem__(20, ord("[")), "no JSON"),
        (_config(version=3), "no MDS shard of version 2"),
        (_config(column_encodings=["int", "pkl", "int", "bytes"]), "column image: pickles"),
        (_config(column_encodings=["int", "ndarray", "int", "bytes"]), "known to be an image"),
        (_config(column_sizes=[8, None, 4, None]), "column label: int has 8 bytes, not 4"),
        (_config(column_sizes=[8, None, "8", None]), "the size '8'"),
        (_config(column_sizes=[8]), "of different lengths"),
        (_config(column_names=["id", "image", "image", "mask"]), "the same name"),
        (_config(note="x" * (1 << 21)), "description of the columns has"),
    ],
)
def test_a_damaged_mds(tmp_path: Path, change: Callable[[bytearray], object], reason: str) -> None:
    path = _shard(tmp_path / "x.mds", "mds")
    edit(path, change)
    assert reason in _problems("mds", path)


def test_all_bad_samples_of_an_mds_are_listed(tmp_path: Path) -> None:
    path = _shard(tmp_path / "x.mds", "mds")
    starts = np.frombuffer(path.read_bytes()[4:16], "<u4").tolist()
    edit(path, _put(starts[0], "<I", 2**31))  # the length of its image
    edit(path, _put(starts[1] + 8, "<q", 0))  # the id of sample 0
    edit(path, lambda data: data.__setitem__(starts[2] + 4 + 4 + 8, 0))  # the first byte of its image
    text = _problems("mds", path)
    assert "sample 0: its columns have" in text
    assert "sample 2: not an image" in text


def test_twice_the_same_id_in_an_mds(tmp_path: Path) -> None:
    sample = make_samples(1)[0]
    get_format("mds").write_shard(tmp_path / "x.mds", [sample, sample], with_mask=False)
    assert "sample 1: its id '0' comes twice" in _problems("mds", tmp_path / "x.mds")


FIELDS = 24 + 3 * 1041
ROW = 40
TABLE = 16
"""Place of the pointer to the allocation table."""


def _table(data: bytearray) -> int:
    return int(struct.unpack_from("<Q", data, TABLE)[0])


def _allocation(number: int, part: int, value: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into("<Q", data, _table(data) + 24 * number + 8 * part, value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_put(0, "<H", 1), "version 1; this program reads version 2"),
        (_put(2, "<H", 0), "0 fields"),
        (_put(2, "<H", 65535), "65535 fields"),
        (_put(4, "<I", 12345), "pages of 12345 bytes"),
        (_put(8, "<Q", 0), "0 samples"),
        (_put(8, "<Q", 2**63), "do not fit in a file"),
        (_put(TABLE, "<Q", 0), "allocation table: it should be at byte 0"),
        (_put(TABLE, "<Q", 2**63), "allocation table: it should be"),
        (lambda data: data.__delitem__(slice(-1, None)), "allocation table: it should be"),
        (lambda data: data.__delitem__(slice(_table(data), None)), "its writer was killed"),
        (lambda data: data.__delitem__(slice(2000, None)), "list of fields: 3 entries do not fit"),
        (lambda data: data.__delitem__(slice(10, None)), "no beton"),
        (_put(24, "<B", 255), "custom or unknown type 255"),
        (_put(24, "<B", 0), "none of the fields image, label, mask is known to be the image"),
        (lambda data: data.__setitem__(slice(1066, 1082), b"image".ljust(16, b"\0")), "two fields have the same name"),
        (_allocation(0, 1, 2**63), "lie outside of the data"),
        (_allocation(0, 1, 100), "sample 0: "),
        (_allocation(0, 2, 2**64 - 1), "lie outside of the data"),
        (_allocation(0, 0, 77), "sample 0: its image points to byte"),
        (_allocation(0, 2, 3000), "overlaps"),
        (_put(FIELDS + 5, "<Q", 2**63), "sample 0: its image points to byte 9223372036854775808"),
        (_put(FIELDS + 5, "<Q", 0), "sample 0: its image points to byte 0"),
        (_put(FIELDS, "<B", 9), "sample 0: the mode of the image is 9"),
        (_put(FIELDS, "<B", 1), "are not 32x24 RGB pixels"),
        (_put(FIELDS + 1, "<H", 500), "the metadata says 500x24 pixels, the image has 32x24"),
        (_put(FIELDS + ROW + 16, "<q", 2**40), "sample 1: the label 1099511627776"),
        (_put(FIELDS + ROW + 32, "<Q", 3), "sample 1: the mask is no PNG, or its size"),
    ],
)
def test_a_damaged_beton(tmp_path: Path, change: Callable[[bytearray], object], reason: str) -> None:
    path = _shard(tmp_path / "x.beton", "beton")
    edit(path, change)
    assert reason in _problems("beton", path)


def test_raw_pixels_that_do_not_fill_their_image(tmp_path: Path) -> None:
    path = _shard(tmp_path / "x.beton", "beton", raw=True)
    edit(path, _put(FIELDS + 3, "<H", 25))
    assert "sample 0: 2304 bytes are not 32x25 RGB pixels" in _problems("beton", path)


def test_a_shard_with_many_problems_is_not_read_to_its_end(tmp_path: Path) -> None:
    text = _problems("tar", _tar(tmp_path / "x.tar", *((f"{i}.cls", b"1") for i in range(300))))
    assert text.count("\n") == 101
    assert "read no further" in text


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_shard_that_is_cut_anywhere_is_refused(tmp_path: Path, container: str) -> None:
    whole = _shard(tmp_path / "whole", container).read_bytes()
    path = tmp_path / "cut"
    end = whole.rindex(mask_file(0)[-20:]) + 20 if container == "tar" else len(whole)
    for length in {*range(0, end, max(1, end // 60)), end - 1}:
        path.write_bytes(whole[:length])
        _problems(container, path)


@pytest.mark.parametrize("container", CONTAINERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_is_refused_or_read_but_nothing_else(tmp_path: Path, container: str, data: st.DataObject) -> None:
    path = tmp_path / "x"
    if not (tmp_path / "whole").exists():
        _shard(tmp_path / "whole", container)
    whole = bytearray((tmp_path / "whole").read_bytes())
    front = whole[: 4096 if container == "beton" else 2048]
    tail = len(whole) - 200
    places = st.one_of(st.integers(0, len(front) - 1), st.integers(tail, len(whole) - 1))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8)):
        whole[place] = value
    path.write_bytes(whole)
    try:
        scan = get_format(container).scan_shard(path)
    except ShardError:
        return
    ends = scan.records["offset"] + scan.records["length"]
    assert (ends <= len(whole)).all()
    assert len(set(scan.keys)) == len(scan.records)
