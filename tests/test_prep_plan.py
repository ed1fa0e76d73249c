"""Plans of prepared splits: every sample once, the same plan every time, and no other plan in its place."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import plan as plan_module
from data_prep.open_source import open_source
from data_prep.plan import Plan, PlanError, load_plan, make_plan
from data_prep.policy import PolicyError
from data_prep.sources import Source
from images import image_folder
from nepa_dist.data.order import permutation


class Fake:
    """A source of N images without files."""

    kind = "folder"
    split = "train"
    has_masks = False
    num_ignored = 0
    class_names = ("ant", "bee", "cat")
    class_titles: tuple[str, ...] = ()

    def __init__(self, count: int, data: bytes = b"no image " * 100, **changes: Any) -> None:
        self.count, self.data = count, data
        self.fingerprint = hashlib.sha256(str(count).encode()).hexdigest()
        self.class_names, self.class_titles = ["ant", "bee", "cat"], []  # type: ignore[assignment]
        self.__dict__.update(changes)

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return str(index)

    def label(self, index: int) -> int:
        return -1

    def read(self, index: int) -> bytes:
        return self.data

    def read_mask(self, index: int) -> bytes | None:
        return self.data if self.has_masks else None


def _plan(source: Any, folder: Path, **changes: Any) -> Plan:
    settings: dict[str, Any] = {"name": "toy", "container": "tar", "policy": "short256", "seed": 3, "num_shards": 7}
    return make_plan(source, folder, **settings | changes)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("count", "shards"), [(1, 1), (7, 7), (100, 7), (1000, 3), (10, 1)])
def test_every_sample_is_in_one_shard(tmp_path: Path, count: int, shards: int) -> None:
    plan = _plan(Fake(count), tmp_path, num_shards=shards)
    parts = [plan.shard_ids(k) for k in range(plan.num_shards)]
    assert len(parts) == shards
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(IndexError):
        plan.shard_ids(shards)


def test_shards_are_well_mixed_and_not_in_the_order_of_training(tmp_path: Path) -> None:
    plan = _plan(Fake(5000), tmp_path, num_shards=5)
    for k in range(5):
        assert abs(plan.shard_ids(k).mean() - 2500) < 200
    assert not any(np.array_equal(plan.ids, permutation(3, epoch, 5000)) for epoch in range(3))


def test_a_plan_follows_from_source_and_settings(tmp_path: Path) -> None:
    first = _plan(Fake(50), tmp_path / "a")
    same = _plan(Fake(50), tmp_path / "elsewhere" / "b")
    assert _files(tmp_path / "a") == _files(tmp_path / "elsewhere" / "b")
    assert first == same
    digests = {_plan(Fake(50), tmp_path / str(k), **change).plan_sha256 for k, change in enumerate(CHANGES)}
    assert len(digests | {first.plan_sha256}) == len(CHANGES) + 1
    assert not np.array_equal(load_plan(tmp_path / "0").ids, first.ids)  # another seed


def test_the_same_plan_again_changes_nothing(tmp_path: Path) -> None:
    first = _plan(Fake(50), tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for shards in (7, None):  # without a number, that of the plan
        again = _plan(Fake(50), tmp_path, num_shards=shards, policy="short256-q90")
        assert again == first == load_plan(tmp_path)
        assert np.array_equal(again.ids, first.ids)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


CHANGES: list[dict[str, Any]] = [{"seed": 4}, {"num_shards": 8}, {"container": "mds"}, {"policy": "keep"}, {"name": "other"}]
LINES = [
    "seed: planned 3, now 4",
    "num_shards: planned 7, now 8",
    "container: planned tar, now mds",
    "policy: planned short256-q90, now keep",
    "name: planned toy, now other",
]


@pytest.mark.parametrize(("change", "line"), list(zip(CHANGES, LINES, strict=True)))
def test_another_plan_is_refused_with_the_differences(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    _plan(Fake(50), tmp_path)
    before = _files(tmp_path)
    with pytest.raises(PlanError, match=re.escape(line)) as caught:
        _plan(Fake(50), tmp_path, **change)
    assert str(caught.value).count("planned") == 1
    assert _files(tmp_path) == before


def test_of_two_that_plan_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: Any) -> int:
        _plan(Fake(50), tmp_path, policy="keep")  # another process, meanwhile
        return 7

    monkeypatch.setattr(plan_module, "_guess_shards", slow)
    with pytest.raises(PlanError, match="policy: planned keep, now short256-q90"):
        _plan(Fake(50), tmp_path, num_shards=None)
    assert load_plan(tmp_path).policy == "keep"
    assert not list(tmp_path.glob(".tmp-*"))


def test_another_source_is_refused_with_the_differences(tmp_path: Path) -> None:
    plan = _plan(Fake(50), tmp_path)
    plan.check_source(Fake(50))  # type: ignore[arg-type]
    other = Fake(51, class_names=["ant", "bug", "cat"])
    for refuse in (lambda: plan.check_source(other), lambda: _plan(other, tmp_path)):  # type: ignore[arg-type]
        with pytest.raises(PlanError) as caught:
            refuse()
        message = str(caught.value)
        assert "num_samples: planned 50, now 51" in message
        assert "class_names: planned 3 entries, number 1 is ['bee'], now 3 entries, number 1 is ['bug']" in message
        assert f"source fingerprint: planned {plan.source['fingerprint']}, now {other.fingerprint}" in message
        assert "source kind" not in message
        assert "has_masks" not in message


def test_a_changed_folder_is_another_source(tmp_path: Path) -> None:
    image_folder(tmp_path / "images")
    source: Source = open_source(tmp_path / "images", split="train")
    plan = _plan(source, tmp_path / "out", num_shards=2)
    plan.check_source(open_source(tmp_path / "images", split="train"))
    (tmp_path / "images" / "class_1" / "0.jpg").rename(tmp_path / "images" / "class_1" / "new.jpg")
    with pytest.raises(PlanError, match="the source is not the one that was planned:\n  source fingerprint: planned"):
        plan.check_source(open_source(tmp_path / "images", split="train"))


def test_shards_have_about_the_size_that_is_asked_for(tmp_path: Path) -> None:
    assert _plan(Fake(50), tmp_path / "a", num_shards=None).num_shards == 1
    assert _plan(Fake(1000, b"x" * 1000), tmp_path / "b", num_shards=None, shard_bytes=10_000).num_shards == 100
    assert _plan(Fake(1000, b"x" * 1000, has_masks=True), tmp_path / "c", num_shards=None, shard_bytes=10_000).num_shards == 200
    assert _plan(Fake(5, b"x" * 1000), tmp_path / "d", num_shards=None, shard_bytes=1).num_shards == 5
    image_folder(tmp_path / "images", size=(300, 200))
    source = open_source(tmp_path / "images", split="train")
    raw = _plan(source, tmp_path / "e", num_shards=None, policy="raw10", container="beton", shard_bytes=3 * 15 * 10 * 4)
    assert raw.num_shards == 3  # twelve images of 15 x 10 pixels, four to a shard


def test_a_large_plan_is_a_small_file(tmp_path: Path) -> None:
    plan = _plan(Fake(1_281_167), tmp_path, num_shards=600)
    assert np.bincount(plan.ids, minlength=1_281_167).max() == 1
    assert (tmp_path / "plan.json").stat().st_size < 2000
    assert (tmp_path / "plan.npy").stat().st_size < 6_000_000


def test_damaged_plans_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="holds no plan"):
        load_plan(tmp_path)
    _plan(Fake(50), tmp_path)
    good = _files(tmp_path)
    body = json.loads(good["plan.json"])
    flipped = bytearray(good["plan.npy"])
    flipped[-3] ^= 1
    for name, data, message in [
        ("plan.json", good["plan.json"][:-9], "cannot be read"),
        ("plan.json", b"[]", "no plan of format 1"),
        ("plan.json", json.dumps(body | {"format": 2}).encode(), "no plan of format 1"),
        ("plan.json", json.dumps(body | {"seed": 4}).encode(), "do not have the digests"),
        ("plan.json", json.dumps(body | {"extra": 4}).encode(), "damaged"),
        ("plan.npy", bytes(flipped), "do not have the digests"),
        ("plan.npy", good["plan.npy"][:-4], "damaged"),
        ("plan.npy", b"", "damaged"),
        ("plan.npy", good["plan.npy"].replace(b"}", b"y", 1), "damaged"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(PlanError, match=message):
            load_plan(tmp_path)
        (tmp_path / name).write_bytes(good[name])
    assert load_plan(tmp_path).num_samples == 50


def test_an_interrupted_plan_is_made_again(tmp_path: Path) -> None:
    _plan(Fake(50), tmp_path)
    good = _files(tmp_path)
    (tmp_path / "plan.json").unlink()
    (tmp_path / "plan.npy").write_bytes(b"half")
    _plan(Fake(50), tmp_path)
    assert _files(tmp_path) == good
    (tmp_path / "plan.json").unlink()
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(PlanError, match="holds a finished split without its plan"):
        _plan(Fake(50), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_shards": 0}, "number of shards must be 1 to 50"),
        ({"num_shards": 51}, "number of shards must be 1 to 50"),
        ({"container": "zip"}, "container 'zip' is unknown"),
        ({"policy": "raw256"}, "only beton holds"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"name": "a/b"}, "the name 'a/b'"),
        ({"shard_bytes": 0}, "at least 1 byte"),
    ],
)
def test_settings_are_checked_before_anything_is_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        _plan(Fake(50), tmp_path / "out", **change)
    with pytest.raises(PolicyError):
        _plan(Fake(50), tmp_path / "out", policy="small")
    with pytest.raises(PlanError, match="has 0 samples"):
        _plan(Fake(0), tmp_path / "out")
    assert not (tmp_path / "out").exists()
