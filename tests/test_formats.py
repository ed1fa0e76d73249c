"""The three containers: what we write, the libraries they come from read, and the other way round."""

import importlib.util
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.formats.base import Scan, ShardError, StoredSample
from data_prep.formats.registry import CONTAINERS, get_format
from nepa_dist.data.index import ENCODED, RAW, ShardRecord
from shards import HEIGHT, WIDTH, image_file, make_samples, mask_file, pixels, run_script, sha256


def _write(path: Path, container: str, samples: Sequence[StoredSample], *, with_mask: bool = False) -> Scan:
    """Write a shard and read it back without its records, which must be the same."""
    module = get_format(container)
    records = module.write_shard(path, samples, with_mask=with_mask)
    scan = module.scan_shard(path)
    assert (scan.records == records).all()
    return scan


def _contents(path: Path, scan: Scan) -> list[tuple[bytes, int, bytes]]:
    data = path.read_bytes()

    def part(record: np.void, kind: str) -> bytes:
        return data[int(record[f"{kind}offset"]) :][: int(record[f"{kind}length"])]

    return [(part(record, ""), int(record["label"]), part(record, "mask_")) for record in scan.records]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("masks", [False, True])
def test_a_shard_holds_its_samples_and_has_the_same_bytes_each_time(tmp_path: Path, container: str, masks: bool) -> None:
    samples = [sample._replace(label=-1) if sample.id == 4 else sample for sample in make_samples(7, masks=masks)]
    path = tmp_path / get_format(container).shard_name(0)
    scan = _write(path, container, samples, with_mask=masks)
    assert _contents(path, scan) == [(sample.image, sample.label, sample.mask or b"") for sample in samples]
    assert set(scan.records["height"]) == {HEIGHT}
    assert set(scan.records["width"]) == {WIDTH}
    assert set(scan.records["encoding"]) == {ENCODED}
    _write(tmp_path / "again", container, samples, with_mask=masks)
    assert sha256(path) == sha256(tmp_path / "again")
    _write(tmp_path / "other", container, samples[1:], with_mask=masks)
    assert sha256(path) != sha256(tmp_path / "other")


@pytest.mark.parametrize("container", CONTAINERS)
def test_masks_are_left_out_where_they_are_not_wanted(tmp_path: Path, container: str) -> None:
    scan = _write(tmp_path / "shard", container, make_samples(3, masks=True), with_mask=False)
    assert not scan.records["mask_length"].any()


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_lazy_sequence_is_read_one_sample_at_a_time(tmp_path: Path, container: str) -> None:
    alive = 0

    class Lazy(Sequence[StoredSample]):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, i):  # type: ignore[no-untyped-def]
            return make_samples(5)[i]

        def __iter__(self) -> Iterator[StoredSample]:
            nonlocal alive
            for sample in make_samples(5):
                alive += 1
                yield sample
                assert alive == 1
                alive -= 1

    get_format(container).write_shard(tmp_path / "lazy", Lazy(), with_mask=False)
    get_format(container).write_shard(tmp_path / "generator", (s for s in make_samples(5)), with_mask=False)
    get_format(container).write_shard(tmp_path / "list", make_samples(5), with_mask=False)
    assert sha256(tmp_path / "lazy") == sha256(tmp_path / "list") == sha256(tmp_path / "generator")


def test_an_image_turned_by_exif_counts_as_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    sample = make_samples(1)[0]._replace(image=image_file(0, exif=exif), height=WIDTH, width=HEIGHT)
    for container in CONTAINERS:
        scan = _write(tmp_path / container, container, [sample])
        assert (int(scan.records["height"][0]), int(scan.records["width"][0])) == (WIDTH, HEIGHT)


def test_raw_pixels_and_large_images_in_a_beton(tmp_path: Path) -> None:
    samples = make_samples(4, raw=True, masks=True)
    big = np.random.default_rng(0).integers(0, 255, (1000, 1000, 3)).astype(np.uint8)
    samples[2] = samples[2]._replace(image=big.tobytes(), height=1000, width=1000)  # more than ffcv's smallest page
    scan = _write(tmp_path / "x.beton", "beton", samples, with_mask=True)
    assert set(scan.records["encoding"]) == {RAW}
    assert [image for image, _, _ in _contents(tmp_path / "x.beton", scan)] == [sample.image for sample in samples]


def test_no_sample_of_a_beton_crosses_the_border_of_a_page(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 250, 3)).astype(np.uint8)
    samples = [s._replace(image=noise.tobytes(), height=200, width=250) for s in make_samples(40, raw=True, masks=True)]
    records = _write(tmp_path / "x.beton", "beton", samples, with_mask=True).records
    page = int.from_bytes((tmp_path / "x.beton").read_bytes()[4:8], "little")
    first = records["offset"] // page
    last = (np.maximum(records["offset"] + records["length"], records["mask_offset"] + records["mask_length"]) - 1) // page
    assert page >= 1 << 21
    assert page.bit_count() == 1
    assert (first == last).all()
    assert len(set(first.tolist())) > 1


def test_the_ending_in_a_tar_is_that_of_the_bytes(tmp_path: Path) -> None:
    kinds = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
    samples = [make_samples(1)[0]._replace(id=i, image=image_file(i, kind)) for i, kind in enumerate(kinds)]
    _write(tmp_path / "x.tar", "tar", samples)
    with tarfile.open(tmp_path / "x.tar") as archive:
        members = archive.getmembers()
    assert [m.name for m in members if not m.name.endswith(".cls")] == [
        "00000000.jpg", "00000001.png", "00000002.webp", "00000003.bmp", "00000004.tif", "00000005.gif",
    ]  # fmt: skip
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o444)}


@pytest.mark.parametrize(
    ("container", "change", "reason"),
    [
        ("tar", {"encoding": RAW}, "raw pixels"),
        ("mds", {"encoding": RAW}, "raw pixels"),
        ("beton", {"image": image_file(0, "PNG")}, "PNG"),
        ("beton", {"encoding": RAW}, "RGB pixels"),
        ("tar", {"image": b"text"}, "no image"),
        ("mds", {"image": b""}, "empty"),
        ("mds", {"height": 70000}, "70000"),
        ("tar", {"label": -2}, "label -2"),
        ("beton", {"label": 2**31}, "label 2147483648"),
    ],
)
def test_what_a_container_cannot_hold_is_named(tmp_path: Path, container: str, change: dict[str, object], reason: str) -> None:
    samples = make_samples(2)
    samples[1] = samples[1]._replace(**change)
    with pytest.raises(ShardError, match=r"sample 1 \(class_1/1.jpg\): .*" + reason):
        get_format(container).write_shard(tmp_path / "x", samples, with_mask=False)


def test_a_cmyk_jpeg_does_not_go_into_a_beton(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels(0)).convert("CMYK").save(buffer, "JPEG")
    with pytest.raises(ShardError, match="CMYK JPEG"):
        get_format("beton").write_shard(tmp_path / "x", [make_samples(1)[0]._replace(image=buffer.getvalue())], with_mask=False)


def test_webdataset_reads_ours(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    samples = make_samples(6, masks=True)
    samples[3] = samples[3]._replace(label=-1)
    _write(tmp_path / "x.tar", "tar", samples, with_mask=True)
    read = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False))
    assert [(s["__key__"], s["jpg"], s.get("cls"), s.get("seg.png")) for s in read] == [
        (f"{s.id:08d}", s.image, None if s.label < 0 else b"%d" % s.label, s.mask) for s in samples
    ]


@pytest.mark.parametrize("options", [{}, {"mtime": 0, "user": "x"}])
def test_shards_of_webdataset_are_read(tmp_path: Path, options: dict[str, object]) -> None:
    writer = pytest.importorskip("webdataset.writer")
    long = "folder/" + "n" * 150
    with writer.ShardWriter(str(tmp_path / "%02d.tar"), maxcount=3, verbose=0, **options) as sink:
        for i in range(5):
            key = long if i == 1 else f"n01440764/n01440764_{i}"
            sink.write({"__key__": key, "jpg": image_file(i), "cls": i, "json": {"a": 1}, "seg.png": mask_file(i)})
    contents, keys = [], []
    for path in sorted(tmp_path.glob("*.tar")):
        scan = get_format("tar").scan_shard(path)
        contents += _contents(path, scan)
        keys += scan.keys
    assert contents == [(image_file(i), i, mask_file(i)) for i in range(5)]
    assert keys == [long if i == 1 else f"n01440764/n01440764_{i}" for i in range(5)]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_other_programs_are_read(tmp_path: Path, kind: int, caplog: pytest.LogCaptureFixture) -> None:
    names = ["./a/", "./a/README", "./a/" + "é" * 30 + ".JPG", "./a/" + "é" * 30 + ".cls", "./a/" + "x" * 90 + ".png"]
    if kind != tarfile.USTAR_FORMAT:
        names.append("./" + "long/" * 60 + "z.jpeg")
    contents = {"JPG": image_file(1), "cls": b" 7\n", "png": image_file(2, "PNG"), "jpeg": image_file(3)}
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            data = contents.get(name.rpartition(".")[2], b"")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    scan = get_format("tar").scan_shard(tmp_path / "x.tar")
    assert [(image, label) for image, label, _ in _contents(tmp_path / "x.tar", scan)] == [
        (image_file(1), 7), (image_file(2, "PNG"), -1), (image_file(3), -1),
    ][: len(scan.keys)]  # fmt: skip
    assert scan.keys[0] == "./a/" + "é" * 30
    assert len(scan.keys) == len(names) - 3
    assert "README" in caplog.text or "2 members" in caplog.text


_STREAMING = """
import importlib.util, json, sys
from pathlib import Path
import torch
try:
    import torchvision
except (ImportError, RuntimeError):  # built for another torch: two operators are missing
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import numpy as np
from PIL import Image
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from data_prep.formats.registry import get_format
from shards import image_file, make_samples, mask_file, pixels, sha256

ours, theirs, foreign = map(Path, sys.argv[1:])
samples = make_samples(7, masks=True)
clean_stale_shared_memory()
dataset = StreamingDataset(local=str(ours), remote=None, shuffle=False, batch_size=1, validate_hash="sha256")
read = [dataset[i] for i in range(len(dataset))]
order = [s for k in range(3) for s in samples[k::3]]
assert [(r["id"], r["image"], r["label"], r["mask"]) for r in read] == [(s.id, s.image, s.label, s.mask or b"") for s in order]

columns = {"id": "int", "image": "bytes", "label": "int", "mask": "bytes"}
with MDSWriter(out=str(theirs), columns=columns, hashes=["sha256"], size_limit=None) as writer:
    for s in samples[0::3]:
        writer.write({"id": s.id, "image": s.image, "label": s.label, "mask": s.mask or b""})
assert sha256(theirs / "shard.00000.mds") == sha256(ours / "shard.00000.mds")
first, expected = (json.loads((folder / "index.json").read_text())["shards"][0] for folder in (ours, theirs))
assert first == expected

image = Image.fromarray(pixels(5))
for kind in ("jpeg", "png", "pil"):
    out = foreign / kind
    with MDSWriter(out=str(out), columns={"x": kind, "y": "uint16", "note": "json", "seg": "png", "name": "str"}) as writer:
        for i in range(3):
            mask = Image.fromarray(np.full((24, 32), i, np.uint8))
            writer.write({"x": image, "y": i, "note": {}, "seg": mask, "name": "n%d" % i})
    path = out / "shard.00000.mds"
    scan = get_format("mds").scan_shard(path)
    assert scan.keys == ["n0", "n1", "n2"] and scan.records["label"].tolist() == [0, 1, 2]
    data = path.read_bytes()
    record = scan.records[1]
    stored = data[record["offset"]:][:record["length"]]
    if kind == "pil":
        assert stored == pixels(5).tobytes() and record["encoding"] == 1
    else:
        assert stored.startswith(b"\\xff\\xd8" if kind == "jpeg" else b"\\x89PNG")
    assert (record["height"], record["width"]) == (24, 32)
    assert data[record["mask_offset"]:][:record["mask_length"]].startswith(b"\\x89PNG")
"""


def test_streaming_reads_ours_and_we_read_streaming(tmp_path: Path) -> None:
    if importlib.util.find_spec("streaming") is None:
        pytest.skip("mosaicml-streaming is not installed")
    samples = make_samples(7, masks=True)
    module = get_format("mds")
    ours = tmp_path / "ours"
    ours.mkdir()
    parts = []
    for k in range(3):
        path = ours / module.shard_name(k)
        count = len(module.write_shard(path, samples[k::3], with_mask=True))
        parts.append(ShardRecord(path.name, path.stat().st_size, sha256(path), count))
    module.finish(ours, parts)
    first = (ours / "index.json").read_bytes()
    module.finish(ours, parts)
    assert (ours / "index.json").read_bytes() == first
    assert [shard["samples"] for shard in json.loads(first)["shards"]] == [3, 2, 2]
    assert sorted(path.name for path in ours.iterdir()) == ["index.json", *(part.name for part in parts)]
    run_script(_STREAMING, ours, tmp_path / "theirs", tmp_path / "foreign")


_FFCV = """
import sys
from pathlib import Path
import numpy as np
from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
from ffcv.fields.basics import IntDecoder
from ffcv.fields.bytes import BytesDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.compiler import Compiler
from ffcv.reader import Reader
from ffcv.writer import DatasetWriter
from data_prep.formats.registry import get_format
from nepa_dist.data.decode import decode_image
from shards import image_file, make_samples, pixels

Compiler.set_enabled(False)  # numba takes many seconds
folder = Path(sys.argv[1])
module = get_format("beton")
samples = make_samples(6, masks=True)
raw = make_samples(6, masks=True, raw=True)
samples[3:] = raw[3:]  # both modes in one shard
module.write_shard(folder / "ours.beton", samples, with_mask=True)
reader = Reader(str(folder / "ours.beton"))
assert reader.field_names == ["image", "label", "mask"] and len(reader.metadata) == 6
lengths = reader.metadata["f2"]["size"]
assert lengths.tolist() == [len(s.mask or b"") for s in samples]
for os_cache in (True, False):
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()], "mask": [BytesDecoder()]}
    order = OrderOption.SEQUENTIAL
    loader = Loader(str(folder / "ours.beton"), 6, 1, os_cache=os_cache, order=order, pipelines=pipelines)
    (images, labels, masks), = [tuple(map(np.array, batch)) for batch in loader]
    for i, sample in enumerate(samples):
        expected = pixels(i) if i >= 3 else decode_image(sample.image)
        difference = np.abs(images[i].astype(int) - expected).max()
        assert difference == 0 if i >= 3 else difference <= 8, (i, difference)  # its JPEG decoder rounds otherwise
        assert bytes(masks[i][: lengths[i]]) == (sample.mask or b"")
    assert labels.ravel().tolist() == [0, 1, 2, 0, 1, 2]

class Data:
    def __init__(self, make):
        self.make = make
    def __len__(self):
        return 5
    def __getitem__(self, i):
        return self.make(i)

def scan(name, fields, make):
    path = folder / name
    DatasetWriter(str(path), fields, num_workers=1, page_size=1 << 21).from_indexed_dataset(Data(make))
    found, data = module.scan_shard(path).records, path.read_bytes()
    return found, [data[r["offset"]:][:r["length"]] for r in found], [data[r["mask_offset"]:][:r["mask_length"]] for r in found]

fields = {"note": JSONField(), "label": IntField(), "weight": FloatField(), "image": RGBImageField("proportion"),
          "extra": NDArrayField(np.dtype("f4"), (2,)), "mask": BytesField()}
np.random.seed(0)
mask = np.frombuffer(make_samples(1, masks=True)[0].mask, np.uint8)
records, images, masks = scan("a.beton", fields, lambda i: ({"a": 1}, i, 0.5, pixels(i), np.zeros(2, "f4"), mask))
assert records["label"].tolist() == list(range(5)) and set(masks) == {mask.tobytes()}
for i, (record, image) in enumerate(zip(records, images)):
    assert (record["height"], record["width"]) == (24, 32)
    assert image == pixels(i).tobytes() if record["encoding"] == 1 else image.startswith(b"\\xff\\xd8")
for mode, encoding in (("jpg", 0), ("raw", 1)):
    assert set(scan(mode, {"image": RGBImageField(mode)}, lambda i: (pixels(i),))[0]["encoding"]) == {encoding}
fields = {"image": BytesField(), "y": IntField()}
records, images, _ = scan("b.beton", fields, lambda i: (np.frombuffer(image_file(i), np.uint8), i))
assert images == [image_file(i) for i in range(5)] and records["label"].tolist() == list(range(5))
"""


def test_ffcv_reads_ours_and_we_read_ffcv(tmp_path: Path) -> None:
    if importlib.util.find_spec("ffcv") is None:
        pytest.skip("ffcv is not installed")
    run_script(_FFCV, tmp_path)


def test_an_unknown_container_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'zip'.*tar, mds, beton"):
        get_format("zip")
