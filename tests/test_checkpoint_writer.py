"""Checkpoints written in the background: the state of the moment, one in flight, no problem lost, killed at any time."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nepa_dist.checkpoint.host_memory import HostMemory, available_bytes
from nepa_dist.checkpoint.portable import Entries
from nepa_dist.checkpoint.store import CheckpointStore
from nepa_dist.checkpoint.writer import CheckpointWriter, SaveResult

Entry = tuple[str, dict[str, Tensor]]


class HeldStore(CheckpointStore):
    """A store whose saves begin when ``gate`` is opened."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, shard_bytes=4000)
        self.gate = threading.Event()

    def save(self, step: int, entries: Entries, meta: Mapping[str, Any], **options: Any) -> Path:
        assert self.gate.wait(60)
        return super().save(step, entries, meta, **options)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[HeldStore]:
    store = HeldStore(tmp_path / "checkpoints")
    yield store
    store.gate.set()  # or the thread would keep the process


def make_entries(value: float, count: int = 5, numel: int = 300) -> list[Entry]:
    return [(f"p{i}", {"weight": torch.full((numel,), value + i), "step": torch.tensor(value)}) for i in range(count)]


def saved_value(path: Path | None) -> float:
    assert path is not None
    _, reader = CheckpointStore.open(path)
    return float(reader.read("p0")["weight"][0])


def watched(entries: list[Entry], seen: list[str]) -> Iterator[Entry]:
    for name, fields in entries:
        seen.append(name)
        yield name, fields


def test_the_file_holds_the_state_of_the_moment_of_start(held: HeldStore) -> None:
    entries = make_entries(1.0)
    meta = {"state": {"step": 5}}
    writer = CheckpointWriter(held)
    assert writer.start(5, iter(entries), meta) is None
    assert writer.poll() is None, "the write is held up"
    for _, fields in entries:
        for tensor in fields.values():
            tensor.fill_(-1.0)
    meta["state"]["step"] = 6
    assert held.steps() == []
    held.gate.set()
    result = writer.wait()
    assert result is not None
    assert (result.step, result.path, result.problem) == (5, held.path(5), None)
    assert result.seconds > 0
    manifest, reader = CheckpointStore.open(held.path(5))
    assert manifest.meta == {"state": {"step": 5}}
    for i in range(5):
        assert reader.read(f"p{i}")["weight"].eq(1.0 + i).all()
        assert reader.read(f"p{i}")["step"].eq(1.0)
    assert writer.wait() is None, "a result is given once"
    writer.close()


def test_all_dtypes_and_shapes_are_copied(tmp_path: Path) -> None:
    wide = torch.arange(24.0).reshape(6, 4)
    given: dict[str, dict[str, Tensor]] = {
        "a": {"weight": torch.nn.Parameter(wide.t()), "exp_avg": wide.bfloat16(), "ema": wide[:, 1].half()},
        "b": {"weight": torch.empty(0, 5), "exp_avg": torch.zeros(1).expand(9), "exp_avg_sq": torch.empty(0)},
        "c": {"weight": torch.tensor([True, False, True]), "ema": wide.double(), "step": torch.tensor(3.0)},
        "d": {"weight": torch.arange(5, dtype=torch.int8), "ema": torch.arange(3)},
    }
    writer = CheckpointWriter(CheckpointStore(tmp_path))
    writer.start(1, given.items(), {})
    result = writer.wait()
    assert result is not None
    assert result.path is not None
    _, reader = CheckpointStore.open(result.path)
    for name, fields in given.items():
        for field, tensor in reader.read(name).items():
            assert tensor.dtype == fields[field].dtype
            assert tensor.equal(fields[field].detach())
    writer.close()


def test_all_files_get_the_rights_that_the_umask_says(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        path = CheckpointStore(tmp_path).save(1, make_entries(1.0), {})
    finally:
        os.umask(old)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {
        "manifest.json": "0o640",
        "state-00000.safetensors": "0o640",
    }


def test_one_write_at_a_time_and_start_gives_the_earlier_result(held: HeldStore) -> None:
    writer = CheckpointWriter(held)
    writer.start(1, make_entries(1.0), {})
    threading.Timer(0.2, held.gate.set).start()
    seen: list[str] = []
    earlier = writer.start(2, watched(make_entries(2.0), seen), {})
    assert earlier is not None
    assert (earlier.step, earlier.path) == (1, held.path(1))
    assert len(seen) == 5
    last = writer.wait()
    assert last is not None
    assert last.step == 2
    assert (saved_value(held.path(1)), saved_value(last.path)) == (1.0, 2.0)
    writer.start(3, make_entries(3.0), {})
    assert poll_until_done(writer).step == 3
    assert writer.start(4, make_entries(4.0), {}) is None, "the result was polled"
    writer.close()
    assert held.steps() == [2, 3, 4]


def poll_until_done(writer: CheckpointWriter) -> SaveResult:
    deadline = time.monotonic() + 60
    while (result := writer.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return result


def places(copies: list[Entry]) -> list[int]:
    return [tensor.data_ptr() for _, fields in copies for tensor in fields.values()]


@pytest.mark.parametrize("size", [{}, {"count": 45, "numel": 1_000_000}])  # one block and several
def test_host_memory_is_used_again(size: dict[str, int]) -> None:
    memory = HostMemory()
    given = make_entries(1.0, **size)
    first = memory.copy(given)
    assert all(fields["weight"].eq(1.0 + i).all() for i, (_, fields) in enumerate(first))
    before = places(first)
    assert len(set(before)) == 2 * len(given)
    assert not set(before) & set(places(given))
    del given
    second = memory.copy(make_entries(2.0, **size))
    assert places(second) == before
    assert all(fields["weight"].eq(2.0 + i).all() for i, (_, fields) in enumerate(second))
    assert first[1][1]["weight"].eq(3.0).all(), "it is the same memory"


def test_a_checkpoint_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(CheckpointStore(tmp_path / "file"))
    assert writer.start(1, make_entries(1.0), {}) is None
    result = writer.start(2, make_entries(2.0), {}, expected_bytes=7)
    assert result is not None
    assert (result.step, result.path) == (1, None)
    assert "the checkpoint of step 1 is not saved" in str(result.problem)
    assert "needed: 7 bytes" in str(poll_until_done(writer).problem)
    writer.close()


def test_a_problem_that_nobody_asked_for_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(CheckpointStore(tmp_path / "file"))
    writer.start(1, make_entries(1.0), {})
    writer.close()
    assert "the checkpoint of step 1 is not saved" in caplog.text
    writer.close()


@pytest.mark.parametrize("ask", ["poll", "wait", "start", "close"])
def test_a_bug_of_the_write_is_raised(tmp_path: Path, ask: str) -> None:
    class Broken(CheckpointStore):
        def save(self, *args: Any, **options: Any) -> Path:
            raise ZeroDivisionError("a bug")

    writer = CheckpointWriter(Broken(tmp_path))
    writer.start(1, make_entries(1.0), {})
    seen: list[str] = []
    calls = {
        "poll": lambda: poll_until_done(writer),
        "wait": writer.wait,
        "start": lambda: writer.start(2, watched(make_entries(2.0), seen), {}),
        "close": writer.close,
    }
    with pytest.raises(ZeroDivisionError, match="a bug"):
        calls[ask]()
    assert len(seen) == (5 if ask == "start" else 0), "the stream is a collective: it must be consumed"
    writer.close()


@pytest.mark.parametrize(
    ("bad", "meta", "message"),
    [
        (("p9", {"weight": torch.zeros(3).to_sparse()}), {}, "full, dense tensor"),
        (("p0", {"weight": torch.zeros(3)}), {}, "'p0' comes twice"),
        (("p9", {"grad": torch.zeros(3)}), {}, "has the fields"),
        (("p9", {"weight": torch.zeros(3)}), {"x": {1}}, "must be JSON"),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(tmp_path: Path, bad: Entry, meta: dict[str, Any], message: str) -> None:
    writer = CheckpointWriter(CheckpointStore(tmp_path))
    seen: list[str] = []
    with pytest.raises(ValueError, match=message):
        writer.start(1, watched([*make_entries(1.0), bad, ("last", {"weight": torch.zeros(1)})], seen), meta)
    assert seen[-1] == "last", "the stream is a collective: it must be consumed"
    assert writer.wait() is None
    writer.start(2, make_entries(2.0), {})
    writer.close()
    assert saved_value(tmp_path / "step-00000002") == 2.0


def test_a_full_disk_is_a_problem_and_the_next_save_works(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    writer = CheckpointWriter(store)
    writer.start(1, make_entries(1.0), {})
    writer.wait()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
    try:
        writer.start(2, make_entries(2.0, numel=20_000), {})
        result = writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert result is not None
    assert "File too large" in str(result.problem)
    assert os.listdir(tmp_path) == ["step-00000001"]
    writer.start(3, make_entries(3.0), {})
    writer.close()
    assert store.steps() == [1, 3]


def test_too_little_host_memory_is_a_problem_with_numbers(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, make_entries(1.0), {})
    writer = CheckpointWriter(store)
    large = torch.empty(1, dtype=torch.uint8).expand(1 << 28)
    seen: list[str] = []
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), old[1]))
    try:
        assert writer.start(2, watched([(f"p{i}", {"weight": large}) for i in range(3)], seen), {}) is None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
    assert len(seen) == 3, "the stream is a collective: it must be consumed"
    result = writer.poll()
    assert result is not None
    assert (result.step, result.path) == (2, None)
    start = "the checkpoint of step 2 is not saved: a copy of the state needs 805,306,368 bytes of host memory"
    assert str(result.problem).startswith(start)
    writer.start(3, make_entries(3.0), {})
    writer.close()
    assert store.steps() == [1, 3]


@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("raise RuntimeError('training failed')", 1)])
def test_a_normal_exit_finishes_the_write(tmp_path: Path, end: str, code: int) -> None:
    program = """
        import sys, time
        from pathlib import Path
        import torch
        from nepa_dist.checkpoint.store import CheckpointStore
        from nepa_dist.checkpoint.writer import CheckpointWriter

        class Slow(CheckpointStore):
            def save(self, *args, **options):
                time.sleep(0.5)
                return super().save(*args, **options)

        root = Path(sys.argv[1])
        writer = CheckpointWriter(Slow(root))
        writer.start(7, [("p0", {"weight": torch.full((4,), 7.0)})], {})
        assert CheckpointStore(root).steps() == []
    """
    command = [sys.executable, "-c", textwrap.dedent(program) + end, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == code, result.stderr
    assert ("training failed" in result.stderr) == (code == 1)
    assert os.listdir(tmp_path) == ["step-00000007"]
    assert saved_value(tmp_path / "step-00000007") == 7.0


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "nepa_dist.checkpoint.writer"])


def train_for_ever(root: Path, first: int, pipe: Connection) -> None:
    """Change the weights and save them, step after step; send each step whose checkpoint is known to be written."""
    weights = [torch.zeros(20_000) for _ in range(20)]
    writer = CheckpointWriter(CheckpointStore(root, keep_last=2, shard_bytes=300_000))
    pipe.send(first - 1)
    step = first
    while True:
        for weight in weights:
            weight.fill_(step)
        result = writer.start(step, ((f"p{i}", {"weight": weight}) for i, weight in enumerate(weights)), {})
        if result is not None:
            assert result.problem is None
            pipe.send(result.step)
        step += 1


def test_kill_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(0)
    newest = saved = leftovers = rounds = 0
    while rounds < 10 or not (saved and leftovers):
        rounds += 1
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=train_for_ever, args=(tmp_path, newest + 1, theirs))
        process.start()
        theirs.close()
        committed = ours.recv()
        time.sleep(rng.uniform(0.02, 0.03 * rounds))  # a busy machine takes long for a save
        process.kill()
        process.join()
        try:
            while True:
                committed = ours.recv()
        except EOFError:
            pass
        saved += committed - newest
        store = CheckpointStore(tmp_path)
        leftovers += len(store.sweep())
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
        for step in store.steps():
            _, reader = store.open(store.path(step))
            assert len(reader.names()) == 20
            assert all(reader.read(name)["weight"].eq(step).all() for name in reader.names())
        found = max(store.steps(), default=0)
        assert found >= committed, "what was said to be written is there"
        assert found <= committed + 2  # one in flight, one more known only to the killed process
        newest = found


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n"}, 4_096_000),
        ({"proc/self/cgroup": "0::/job/step\n", "memory": "sys/fs/cgroup/job/memory.max 900000 300000"}, 620_000),
        ({"proc/self/cgroup": "0::/job\n", "memory": "sys/fs/cgroup/job/memory.max max 300000"}, 4_096_000),
        (
            {
                "proc/self/cgroup": "5:cpu:/\n4:memory:/job/step\n",
                "memory": "sys/fs/cgroup/memory/job/memory.limit_in_bytes 900000 300000",
            },
            620_000,
        ),
        ({}, None),
    ],
)
def test_available_memory_is_the_least_of_machine_and_job(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    tree = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:   4000 kB\n"} | {k: v for k, v in files.items() if k != "memory"}
    if "memory" in files:
        limit_file, limit, usage = files["memory"].split()
        usage_file = limit_file.replace("memory.max", "memory.current").replace("limit_in_bytes", "usage_in_bytes")
        stat_file = limit_file.rpartition("/")[0] + "/memory.stat"
        tree |= {limit_file: limit, usage_file: usage, stat_file: "anon 1\ninactive_file 15000\nactive_file 5000\n"}
    for name, text in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_bytes(tmp_path) == expected
