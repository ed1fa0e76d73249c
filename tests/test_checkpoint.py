"""Checkpoints: what is saved comes back, old ones go, a full disk costs nothing that was there."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import resource
import shutil
import subprocess
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from nepa_dist.checkpoint.portable import StateReader, write_entries
from nepa_dist.checkpoint.store import CheckpointError, CheckpointStore

Entry = tuple[str, dict[str, Tensor]]
Limit = Callable[[Path], AbstractContextManager[None]]


def make_entries(value: float, count: int = 3, numel: int = 64) -> list[Entry]:
    """Entries that are filled with one value."""
    return [
        (f"backbone.blocks.{i}.weight", {"weight": torch.full((numel,), value + i), "step": torch.tensor(value)})
        for i in range(count)
    ]


def watched(entries: list[Entry], seen: list[str]) -> Iterator[Entry]:
    """The entries, noting which were taken."""
    for name, fields in entries:
        seen.append(name)
        yield name, fields


def saved_value(path: Path) -> float:
    """The value given to :func:`make_entries`."""
    _, reader = CheckpointStore.open(path)
    return float(reader.read("backbone.blocks.0.weight")["weight"][0])


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def test_all_dtypes_and_shapes_come_back_exactly(store: CheckpointStore) -> None:
    torch.manual_seed(0)
    wide = torch.randn(6, 4)
    given: dict[str, dict[str, Tensor]] = {
        "backbone.patch_embed.weight": {
            "weight": wide,
            "exp_avg": wide.bfloat16(),
            "ema": wide.half(),
            "step": torch.tensor(7.0),
        },
        "head/odd name": {"weight": wide.t(), "exp_avg_sq": wide[:, 1]},
        "empty": {"weight": torch.empty(0, 5), "step": torch.tensor(float("nan"))},
        "parameter": {"weight": torch.nn.Parameter(wide.double()), "ema": torch.zeros(1).expand(9)},
        "counts": {"weight": torch.arange(5), "ema": torch.tensor([True, False])},
    }
    path = store.save(20, given.items(), {"seed": 1, "note": "é\n", "nested": {"lr": 1e-05}})
    manifest, reader = store.open(path)
    assert path == store.root / "step-00000020"
    assert (manifest.step, manifest.meta) == (20, {"seed": 1, "note": "é\n", "nested": {"lr": 1e-05}})
    assert reader.names() == sorted(given)
    for name, fields in given.items():
        assert sorted(reader.fields(name)) == sorted(fields)
        for field, tensor in reader.read(name).items():
            assert tensor.dtype == fields[field].dtype
            assert not tensor.requires_grad
            torch.testing.assert_close(tensor, fields[field].detach(), rtol=0, atol=0, equal_nan=True)
    assert list(reader.read("empty", ["step"])) == ["step"]
    with pytest.raises(CheckpointError, match="no parameter 'absent'"):
        reader.read("absent")
    with pytest.raises(CheckpointError, match="no 'ema' of parameter 'empty'"):
        reader.read("empty", ["ema"])


def test_what_was_read_outlives_the_files(store: CheckpointStore) -> None:
    path = store.save(1, make_entries(5.0), {})
    _, reader = store.open(path)
    weight = reader.read("backbone.blocks.0.weight")["weight"]
    file = path / "state-00000.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert weight.eq(5.0).all()


def test_equal_state_gives_equal_files(store: CheckpointStore) -> None:
    first = store.verify(store.save(1, make_entries(3.0), {}))
    second = store.verify(store.save(2, make_entries(3.0), {}))
    assert first.files == second.files


@pytest.mark.parametrize("limit", [1000, 5000, 40_000, 10_000_000])
def test_files_stay_under_the_limit(tmp_path: Path, limit: int) -> None:
    rng = random.Random(limit)
    sizes = [rng.randrange(0, 400) for _ in range(60)]
    entries = [
        (f"backbone.ü{i}.weight", {"weight": torch.full((1, 1, size), float(i)), "step": torch.tensor(1.0)})
        for i, size in enumerate(sizes)
    ]
    records = write_entries(tmp_path, entries, shard_bytes=limit)
    assert [record.name for record in records] == [f"state-{i:05d}.safetensors" for i in range(len(records))]
    for record in records:
        assert (tmp_path / record.name).stat().st_size == record.bytes
        parameters = {key.partition("/")[2] for key in safetensors.torch.load_file(tmp_path / record.name)}
        assert record.bytes <= limit or len(parameters) == 1
    assert len(records) < 4 * sum(sizes) * 4 / limit + 60 * 600 / limit + 2  # files are not needlessly small
    reader = StateReader(tmp_path)
    assert all(reader.read(name)["weight"].equal(fields["weight"]) for name, fields in entries)


def test_streams_without_holding_the_state(tmp_path: Path) -> None:
    numel, count, limit = 25_000, 40, 1_000_000  # 100 kB each, 4 MB in all
    given: list[weakref.ref[Tensor]] = []
    peak = 0

    def live_bytes() -> int:
        return sum(item.nbytes for item in gc.get_objects() if type(item) is Tensor and item.layout == torch.strided)

    def stream() -> Iterator[Entry]:
        nonlocal peak
        for i in range(count):
            assert all(ref() is None for ref in given), "an entry was still held when the next one was asked for"
            peak = max(peak, live_bytes() - before)
            tensor = torch.full((numel,), float(i))
            given.append(weakref.ref(tensor))
            yield f"p{i}", {"weight": tensor}
            del tensor

    gc.collect()
    before = live_bytes()
    write_entries(tmp_path, stream(), shard_bytes=limit)
    assert peak <= limit
    assert len(list(tmp_path.iterdir())) == 5


def test_a_stream_may_reuse_its_buffer(tmp_path: Path) -> None:
    buffer = torch.zeros(10)
    write_entries(tmp_path, ((f"p{i}", {"weight": buffer.fill_(i)}) for i in range(4)), shard_bytes=1 << 20)
    reader = StateReader(tmp_path)
    assert [float(reader.read(f"p{i}")["weight"][0]) for i in range(4)] == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "no entries"),
        ([("a", {"weight": torch.zeros(1)})] * 2, "'a' comes twice"),
        ([("a", {"grad": torch.zeros(1)})], "'a' has the fields"),
        ([("a", {})], "'a' has the fields"),
        ([("a", {"weight": torch.zeros(3).to_sparse()})], "full, dense tensor"),
    ],
)
def test_malformed_entries_are_refused_and_leave_nothing(store: CheckpointStore, entries: list[Entry], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        store.save(1, entries, {})
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize("meta", [{"x": float("nan")}, {"x": object()}, {"x": {1, 2}}])
def test_meta_that_is_not_json_is_refused(store: CheckpointStore, meta: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be JSON"):
        store.save(1, make_entries(1.0), meta)


def test_meta_with_number_keys_still_verifies(store: CheckpointStore) -> None:
    path = store.save(1, make_entries(1.0), {"by_rank": {2: "a", 10: (1, 2)}})
    assert store.verify(path).meta == {"by_rank": {"2": "a", "10": [1, 2]}}


def test_retention_keeps_the_newest_and_the_multiples(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2, keep_every=30)
    for step in range(10, 101, 10):
        store.save(step, make_entries(step), {})
    assert store.steps() == [30, 60, 90, 100]
    assert sorted(os.listdir(tmp_path)) == [f"step-{step:08d}" for step in (30, 60, 90, 100)]
    store.save(15, make_entries(15), {})
    assert 15 in store.steps(), "what was just saved is kept though newer steps exist"


@pytest.mark.parametrize("limits", [{"keep_last": 0}, {"keep_every": 0}, {"shard_bytes": 0}])
def test_limits_must_be_positive(tmp_path: Path, limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        CheckpointStore(tmp_path, **limits)


def test_sweep_removes_leftovers_alone(store: CheckpointStore) -> None:
    assert store.sweep() == []
    path = store.save(1, make_entries(1.0), {})
    leftover = store.root / ".tmp-step-00000002-77"
    leftover.mkdir()
    (leftover / "state-00000.safetensors").write_bytes(b"half")
    (store.root / "notes.txt").write_text("mine")
    (store.root / ".tmp-link").symlink_to(path)
    assert store.sweep() == [".tmp-link", ".tmp-step-00000002-77"]
    assert sorted(os.listdir(store.root)) == ["notes.txt", "step-00000001"]
    assert store.latest().path == path


def test_nothing_saved_yet(store: CheckpointStore) -> None:
    found = store.latest()
    assert (found.path, found.manifest, found.passed_over, store.steps()) == (None, None, [], [])


def test_same_step_and_meta_is_kept(store: CheckpointStore) -> None:
    path = store.save(4, make_entries(1.0), {"run": "a"})
    seen: list[str] = []
    assert store.save(4, watched(make_entries(2.0), seen), {"run": "a"}) == path
    assert saved_value(path) == 1.0
    assert len(seen) == 3, "the stream is a collective: it must be consumed"


@pytest.mark.parametrize("damage", [True, False])
def test_same_step_that_is_damaged_or_of_another_run_gives_way(
    store: CheckpointStore, damage: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = store.save(4, make_entries(1.0), {"run": "a"})
    if damage:
        (path / "state-00000.safetensors").write_bytes(b"rubbish")
    before = (path / "state-00000.safetensors").read_bytes()
    store.save(4, make_entries(2.0), {"run": "a" if damage else "b"})
    assert saved_value(path) == 2.0
    assert (store.root / "replaced-step-00000004-1" / "state-00000.safetensors").read_bytes() == before
    assert "replaced-step-00000004-1" in caplog.text
    assert store.steps() == [4]


def test_a_run_that_saves_a_step_again_keeps_one_copy(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    run = {"config_digest": "a", "data_fingerprint": "b"}
    path = store.save(4, make_entries(1.0), run | {"state": {"preemptions": 0}})
    store.save(4, make_entries(1.0), run | {"state": {"preemptions": 1}})
    assert store.verify(path).meta["state"] == {"preemptions": 1}
    assert sorted(os.listdir(store.root)) == ["step-00000004"]
    assert caplog.text == ""
    store.save(4, make_entries(3.0), run | {"config_digest": "other", "state": {}})
    assert sorted(os.listdir(store.root)) == ["replaced-step-00000004-1", "step-00000004"]
    # Bytes that are damaged may still be wanted by someone.
    (path / "state-00000.safetensors").write_bytes(b"rubbish")
    store.save(4, make_entries(3.0), run | {"config_digest": "other", "state": {}})
    assert sorted(os.listdir(store.root))[:2] == ["replaced-step-00000004-1", "replaced-step-00000004-2"]


@contextlib.contextmanager
def file_size_limit(root: Path) -> Iterator[None]:
    """Writing past 64 KiB in one file fails with EFBIG."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@contextlib.contextmanager
def small_disk(root: Path) -> Iterator[None]:
    """A file system of 256 KiB on the root, with what the root holds."""
    kept = root.parent / "kept"
    shutil.copytree(root, kept)
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(root)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a file system needs root")
    try:
        shutil.copytree(kept, root, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", str(root)], check=True)


@pytest.mark.parametrize(("limited", "reason"), [(file_size_limit, "File too large"), (small_disk, "No space left on device")])
def test_a_full_disk_keeps_the_earlier_checkpoints(store: CheckpointStore, limited: Limit, reason: str) -> None:
    first = store.save(1, make_entries(1.0), {})
    seen: list[str] = []
    with limited(store.root):
        stream = watched(make_entries(2.0, count=10, numel=20_000), seen)
        with pytest.raises(CheckpointError, match=rf"step 2 is not saved in .*{reason}.*free: [\d,]+ bytes, needed: unknown"):
            CheckpointStore(store.root, keep_last=1, shard_bytes=100_000).save(2, stream, {})
        assert len(seen) == 10, "the stream is a collective: it must be consumed"
        assert os.listdir(store.root) == ["step-00000001"]
        assert store.latest().path == first
        assert saved_value(first) == 1.0
        assert store.save(3, make_entries(3.0), {}).name == "step-00000003"


def test_too_little_space_is_known_before_writing(store: CheckpointStore) -> None:
    store.save(1, make_entries(1.0), {})
    needed = 1 << 60
    with pytest.raises(CheckpointError, match=f"not enough space .*needed: {needed:,} bytes"):
        store.save(2, make_entries(2.0), {}, expected_bytes=needed)
    assert store.steps() == [1]
    store.save(2, make_entries(2.0), {}, expected_bytes=1000)
    assert store.steps() == [1, 2]


def test_a_root_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'file'}"):
        CheckpointStore(tmp_path / "file").save(1, make_entries(1.0), {})
    with pytest.raises(CheckpointError, match="cannot list"):
        CheckpointStore(tmp_path / "file").latest()


def test_an_error_of_the_stream_leaves_nothing(store: CheckpointStore) -> None:
    def stream() -> Iterator[Entry]:
        yield from make_entries(1.0)
        raise RuntimeError("a rank has gone")

    with pytest.raises(RuntimeError, match="a rank has gone"):
        store.save(1, stream(), {})
    assert os.listdir(store.root) == []
