"""Prepared splits behind a URL: what comes back from a bad line, and what processes share in the cache."""

import fcntl
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from nepa_dist.data.containers import DataError
from nepa_dist.data.index import MANIFEST, Manifest
from nepa_dist.data.open import open_container
from nepa_dist.data.remote import RemoteContainer
from shards import make_samples, write_split

SAMPLES = make_samples(6, masks=True)


class Server:
    """Serves a folder over HTTP. ``faults`` says what goes wrong: file -> the faults of its first requests."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: dict[str, list[str]] = {}
        self.gets: Counter[str] = Counter()
        self.ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, server: Server, *args: Any) -> None:
        self._files = server
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self._files.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        faults = self._files.faults.get(path.name, [])
        fault = ""
        if body:
            self._files.gets[path.name] += 1
            fault = faults.pop(0) if faults else ""
        if fault == "500":
            self.send_error(500)
            return
        if fault == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "short":
            data = data[:-1]
        if fault == "long":
            data += b"x"
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if fault in ("cut", "hang") else data)
        if fault == "hang":
            self._files.ended.wait(30)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "remote")
    yield server
    server.close()


def _prepare(tmp_path: Path, shards: int = 3) -> Manifest:
    return write_split(tmp_path / "remote" / "train", "tar", SAMPLES, shards=shards)


def _open(url: str, tmp_path: Path, **options: Any) -> RemoteContainer:
    options = {"retries": 2, "timeout_seconds": 20.0, "backoff_seconds": 0.01, "check": True} | options
    return RemoteContainer(f"{url}/train", cache_dir=tmp_path / "cache", **options)


def _images(split: RemoteContainer) -> list[Any]:
    return [split.read(i).image for i in range(len(split))]


def _cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").glob("*/shard*"))


def _left_over(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").glob("*/.tmp*"))


EXPECTED = [sample.image for sample in SAMPLES]


def test_a_split_over_http_is_fetched_once(tmp_path: Path, server: Server) -> None:
    manifest = _prepare(tmp_path)
    split = _open(server.url, tmp_path)
    assert (len(split), split.class_names, split.fingerprint) == (6, ["a", "b", "c"], manifest.content_sha256)
    assert _cached(tmp_path) == []
    assert split.read(1).image == EXPECTED[1]
    assert _cached(tmp_path) == ["shard-00001.tar"]
    assert split.name(1) == "class_1/1.jpg (shard-00001.tar)"
    assert _images(split) == EXPECTED
    assert _images(pickle.loads(pickle.dumps(split))) == EXPECTED  # noqa: S301
    assert _images(_open(server.url, tmp_path)) == EXPECTED
    assert server.gets == {MANIFEST: 2, "index.npy": 1, "names.txt": 1} | {f"shard-0000{k}.tar": 1 for k in range(3)}
    assert _left_over(tmp_path) == []


def test_any_file_system_that_fsspec_knows(tmp_path: Path) -> None:
    _prepare(tmp_path)
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "remote" / "train").iterdir():
        memory.pipe_file(f"bucket/set/train/{path.name}", path.read_bytes())
    try:
        split = open_container("memory://bucket/set/", "train", image_size=8, cache_dir=tmp_path / "cache")
        assert [split.read(i).image for i in range(6)] == EXPECTED
        with pytest.raises(DataError, match=r"memory://bucket/set/val/manifest.json .* no such file"):
            open_container("memory://bucket/set", "val", image_size=8, cache_dir=tmp_path / "cache")
    finally:
        memory.rm("bucket", recursive=True)
    local = open_container(f"file://{tmp_path}/remote", "train", image_size=8, cache_dir=tmp_path / "other")
    assert [local.read(i).image for i in range(6)] == EXPECTED


@pytest.mark.parametrize("fault", ["500", "cut", "flip", "short", "long", "hang"])
def test_a_fault_that_passes_is_tried_again(tmp_path: Path, server: Server, fault: str) -> None:
    _prepare(tmp_path)
    server.faults = {name: [fault] for name in ("index.npy", "shard-00001.tar")}
    split = _open(server.url, tmp_path, timeout_seconds=1.0 if fault == "hang" else 20.0)
    assert _images(split) == EXPECTED
    assert server.gets["index.npy"] == server.gets["shard-00001.tar"] == 2
    assert _left_over(tmp_path) == []


def test_a_fault_that_stays_names_the_url_and_every_attempt(tmp_path: Path, server: Server) -> None:
    _prepare(tmp_path)
    split = _open(server.url, tmp_path)
    server.faults = {"shard-00002.tar": ["500", "long", "flip", "500", "500", "500"]}
    with pytest.raises(DataError) as caught:
        split.read(2)
    text = str(caught.value)
    assert f"{server.url}/train/shard-00002.tar cannot be fetched: attempt 1: " in text
    assert "500" in text
    assert "attempt 2: it has more than the " in text
    assert "attempt 3: its SHA-256 is not the one in manifest.json" in text
    assert "attempt 4" not in text
    assert split.read(1).image == EXPECTED[1]
    assert _cached(tmp_path) == ["shard-00001.tar"]
    assert _left_over(tmp_path) == []
    server.faults = {}
    assert split.read(2).image == EXPECTED[2]  # the next call tries again


def test_what_is_not_there_is_not_tried_again(tmp_path: Path, server: Server) -> None:
    _prepare(tmp_path)
    (tmp_path / "remote" / "train" / "shard-00000.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00000.tar cannot be fetched: attempt 1: there is no such file$"):
        _open(server.url, tmp_path).read(0)
    with pytest.raises(DataError, match=r"elsewhere/train/manifest.json cannot be fetched: attempt 1: there is no such file"):
        _open(f"{server.url}/elsewhere", tmp_path)


def test_a_manifest_that_cannot_be_used_is_named_by_its_url(tmp_path: Path, server: Server) -> None:
    _prepare(tmp_path)
    (tmp_path / "remote" / "train" / MANIFEST).write_text('{"format": 99}')
    with pytest.raises(DataError, match=f"{server.url}/train/{MANIFEST} has format 99"):
        _open(server.url, tmp_path)
    assert not list((tmp_path / "cache").rglob("*manifest*"))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://bucket/set", "needs a package that is not installed: .*s3fs"),
        ("gs://bucket/set", "needs a package that is not installed: .*gcsfs"),
        ("nonsense://me:secret@host/set", "nonsense://host/set/train cannot be opened"),
    ],
)
def test_a_url_that_cannot_be_opened(tmp_path: Path, url: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=reason) as caught:
        open_container(url, "train", image_size=8, cache_dir=tmp_path / "cache")
    assert "secret" not in str(caught.value)


def test_the_default_cache_belongs_to_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _prepare(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    url = f"file://{tmp_path}/remote"
    assert len(open_container(url, "train", image_size=8)) == 6
    folder = tmp_path / f"nepa-dist-cache-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    stranger = os.getuid() + 1
    folder.rename(tmp_path / f"nepa-dist-cache-{stranger}")
    monkeypatch.setattr(os, "getuid", lambda: stranger)
    with pytest.raises(DataError, match="belongs to someone else"):
        open_container(url, "train", image_size=8)


def _read_all(url: str, tmp_path: Path) -> bool:
    return _images(_open(url, tmp_path)) == EXPECTED


def test_processes_fetch_each_file_together_once(tmp_path: Path, server: Server) -> None:
    _prepare(tmp_path)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert all(pool.starmap(_read_all, [(server.url, tmp_path)] * 8))
    assert {name: count for name, count in server.gets.items() if name != MANIFEST} == {
        "index.npy": 1, "names.txt": 1, "shard-00000.tar": 1, "shard-00001.tar": 1, "shard-00002.tar": 1,
    }  # fmt: skip


def test_a_container_that_is_open_goes_on_in_a_forked_process(tmp_path: Path, server: Server) -> None:
    _prepare(tmp_path)
    split = _open(server.url, tmp_path)
    assert split.read(0).image == EXPECTED[0]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_images, [split, split]) == [EXPECTED, EXPECTED]
    assert server.gets["shard-00001.tar"] == 1


def _fetch_one(url: str, tmp_path: Path) -> None:
    _open(url, tmp_path).read(1)


def test_a_process_that_is_killed_leaves_nothing_that_stops_others(tmp_path: Path, server: Server) -> None:
    _prepare(tmp_path)
    server.faults = {"shard-00001.tar": ["hang"]}
    process = multiprocessing.get_context("fork").Process(target=_fetch_one, args=(server.url, tmp_path))
    process.start()
    deadline = time.monotonic() + 60
    while not server.gets["shard-00001.tar"] and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert [path.name for path in _left_over(tmp_path)] == [".tmp-shard-00001.tar"]
    assert _images(_open(server.url, tmp_path)) == EXPECTED
    assert _left_over(tmp_path) == []


def _num_deleted_but_open(tmp_path: Path) -> int:
    links = [f"/proc/self/fd/{descriptor}" for descriptor in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.lexists(link)]
    return sum(target.startswith(f"{tmp_path}/cache") and target.endswith("(deleted)") for target in targets)


def test_the_cache_keeps_its_limit_and_readers_what_they_have(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = _prepare(tmp_path, shards=6)
    size = manifest.shards[0].bytes
    assert {shard.bytes for shard in manifest.shards} == {size}
    split = _open(server.url, tmp_path, cache_bytes=3 * size)
    assert "will be fetched again" in caplog.text
    views = []
    for i in (0, 1, 2, 3, 4, 5, 0, 1):
        views.append(split.read(i).image)
        assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/shard*")) <= 3 * size
        assert _num_deleted_but_open(tmp_path) <= 1  # more would fill the disk all the same
    assert views == [EXPECTED[i] for i in (0, 1, 2, 3, 4, 5, 0, 1)]
    assert _cached(tmp_path) == ["shard-00000.tar", "shard-00001.tar", "shard-00005.tar"]
    with pytest.raises(DataError, match=f"a cache of {size - 1} bytes does not hold a shard of {size}"):
        _open(server.url, tmp_path, cache_bytes=size - 1)


def test_a_shard_in_use_is_the_last_to_be_deleted(tmp_path: Path, server: Server) -> None:
    size = _prepare(tmp_path, shards=6).shards[0].bytes
    user = _open(server.url, tmp_path)
    user.read(0)
    idle = _open(server.url, tmp_path)
    for i in (1, 2):
        idle.read(i)
    del idle
    _open(server.url, tmp_path, cache_bytes=3 * size).read(3)
    assert _cached(tmp_path) == ["shard-00000.tar", "shard-00002.tar", "shard-00003.tar"]
    _open(server.url, tmp_path, cache_bytes=size).read(4)  # no choice: all others go
    assert _cached(tmp_path) == ["shard-00004.tar"]
    assert user.read(0).image == EXPECTED[0]  # still open
    assert user.read(1).image == EXPECTED[1]


def test_what_a_killed_process_left_makes_room_too(tmp_path: Path, server: Server) -> None:
    size = _prepare(tmp_path, shards=6).shards[0].bytes
    split = _open(server.url, tmp_path, cache_bytes=2 * size)
    folder = split.folder
    for k, held in ((3, False), (4, True)):
        (folder / f".tmp-shard-0000{k}.tar").write_bytes(bytes(size // 2))
        (folder / f".lock-shard-0000{k}.tar").touch()
        if held:
            lock = os.open(folder / f".lock-shard-0000{k}.tar", os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
    split.read(0)
    split.read(1)
    os.close(lock)
    assert [path.name for path in _left_over(tmp_path)] == [".tmp-shard-00004.tar"]
    assert _cached(tmp_path) == ["shard-00001.tar"]


def test_a_data_set_that_is_made_anew_is_another_one(tmp_path: Path, server: Server) -> None:
    _prepare(tmp_path)
    old = _open(server.url, tmp_path)
    old.read(0)
    for path in (tmp_path / "remote" / "train").iterdir():
        path.unlink()
    (tmp_path / "remote" / "train").rmdir()
    write_split(tmp_path / "remote" / "train", "tar", SAMPLES[:3])
    assert len(_open(server.url, tmp_path)) == 3
    assert old.read(0).image == EXPECTED[0]
    with pytest.raises(DataError, match="cannot be fetched"):
        old.read(1)  # its shard is another one now


def test_a_cache_folder_that_cannot_be_used(tmp_path: Path, server: Server) -> None:
    _prepare(tmp_path)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cache folder .* cannot be made"):
        _open(server.url, tmp_path)
