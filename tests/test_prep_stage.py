"""Staging to a node: one copy, whole or not there, whoever asks for it and whatever stops it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import namedtuple
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from data_prep import stage
from data_prep.files import PrepError, UsageError
from data_prep.stage import Staged, stage_split
from data_prep.verify import verify_split
from images import image_folder
from nepa_dist.data.prepared import PreparedContainer
from splits import prepare

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["data_prep.stage"])

NAMES = {"SHA256SUMS", "index.json", "index.npy", "manifest.json", "names.txt", "repairs.jsonl"}
SHARDS = {f"shard.{k:05d}.mds" for k in range(4)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    return prepare(image_folder(root / "images", num_classes=3, per_class=8), root / "prepared" / "train")


def copy(prepared: Path, dest: Path, *, check: bool = False) -> Staged:
    return stage_split(prepared, dest, check=check, quiet=True)


def same(prepared: Path, dest: Path) -> bool:
    return {path.name: path.read_bytes() for path in dest.iterdir()} == {
        name: (prepared / name).read_bytes() for name in NAMES | SHARDS
    }


def test_a_copy_is_a_prepared_split(prepared: Path, tmp_path: Path) -> None:
    dest = tmp_path / "new" / "train"
    done = copy(prepared, dest)
    assert (done.folder, done.copied_files, done.kept_files) == (dest, len(NAMES | SHARDS) - 2, 0)
    assert same(prepared, dest)
    assert verify_split(dest, level="decode", quiet=True).good
    assert PreparedContainer(dest, check=True).fingerprint == PreparedContainer(prepared).fingerprint


def test_a_whole_copy_is_left_alone_and_not_read(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dest = tmp_path / "train"
    copy(prepared, dest)
    times = {path: path.stat().st_mtime_ns for path in dest.iterdir()}
    monkeypatch.setattr(stage, "sha256_of", None)  # it would take minutes for a large set
    again = copy(prepared, dest)
    assert (again.copied_files, again.copied_bytes) == (0, 0)
    assert {path: path.stat().st_mtime_ns for path in dest.iterdir()} == times


@pytest.mark.parametrize("manifest_there", [True, False])
def test_a_copy_is_completed(prepared: Path, tmp_path: Path, manifest_there: bool) -> None:
    dest = tmp_path / "train"
    copy(prepared, dest)
    (dest / "shard.00001.mds").unlink()
    os.truncate(dest / "shard.00002.mds", 5)
    if not manifest_there:
        (dest / "manifest.json").unlink()
    done = copy(prepared, dest)
    assert (done.copied_files, done.kept_files) == (2, 6)
    assert same(prepared, dest)


def _spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_files_of_an_unfinished_copy_are_not_trusted(prepared: Path, tmp_path: Path) -> None:
    dest = tmp_path / "train"
    copy(prepared, dest)
    (dest / "manifest.json").unlink()
    _spoil(dest / "shard.00003.mds")
    assert copy(prepared, dest).copied_files == 1
    assert same(prepared, dest)


def test_check_hashes_a_finished_copy(prepared: Path, tmp_path: Path) -> None:
    dest = tmp_path / "train"
    copy(prepared, dest)
    _spoil(dest / "shard.00003.mds")
    assert copy(prepared, dest).copied_files == 0
    assert copy(prepared, dest, check=True).copied_files == 1
    assert same(prepared, dest)


def test_a_link_in_the_copy_is_not_followed(prepared: Path, tmp_path: Path) -> None:
    dest, outside = tmp_path / "train", tmp_path / "outside"
    outside.write_text("mine")
    dest.mkdir()
    (dest / "shard.00000.mds").symlink_to(outside)
    copy(prepared, dest)
    assert same(prepared, dest)
    assert outside.read_text() == "mine"


def test_a_damaged_source_is_refused(prepared: Path, tmp_path: Path) -> None:
    damaged, dest = tmp_path / "damaged", tmp_path / "train"
    shutil.copytree(prepared, damaged)
    _spoil(damaged / "shard.00002.mds")
    with pytest.raises(PrepError, match=r"shard\.00002\.mds does not have the SHA-256"):
        copy(damaged, dest)
    assert not (dest / "manifest.json").exists()
    assert not list(dest.glob(".tmp-*"))
    assert copy(prepared, dest).copied_files > 0
    assert same(prepared, dest)


def test_a_digest_list_that_leads_outside_is_refused(prepared: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    shutil.copytree(prepared, hostile)
    digest = hashlib.sha256(b"x").hexdigest()
    with (hostile / "SHA256SUMS").open("a") as file:
        file.write(f"{digest}  ../outside\n")
    with pytest.raises(PrepError, match="SHA256SUMS is damaged in line"):
        copy(hostile, tmp_path / "train")


def test_another_split_is_not_replaced(prepared: Path, tmp_path: Path) -> None:
    dest = tmp_path / "train"
    copy(prepare(image_folder(tmp_path / "images", seed=5), tmp_path / "other"), dest)
    before = {path: path.read_bytes() for path in dest.iterdir()}
    with pytest.raises(UsageError, match="holds another prepared split"):
        copy(prepared, dest)
    assert {path: path.read_bytes() for path in dest.iterdir()} == before


def test_the_space_is_checked_first(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 9_000, 1_000))
    with pytest.raises(UsageError, match=r"1\.0 kB free, the copy needs .* kB more"):
        copy(prepared, tmp_path / "train")
    assert list((tmp_path / "train").iterdir()) == []


def test_what_is_no_finished_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished split"):
        copy(tmp_path, tmp_path / "train")


def _copy_and_tell(prepared: Path, dest: Path, pipe: Connection) -> None:
    pipe.send(copy(prepared, dest).copied_files)


def test_many_processes_make_one_copy(prepared: Path, tmp_path: Path) -> None:
    dest = tmp_path / "train"
    mine, theirs = _context.Pipe()
    children = [_context.Process(target=_copy_and_tell, args=(prepared, dest, theirs)) for _ in range(4)]
    for child in children:
        child.start()
    counts = [mine.recv() for _ in children]
    for child in children:
        child.join()
    assert sorted(counts) == [0, 0, 0, len(NAMES | SHARDS) - 2]
    assert same(prepared, dest)


def _hold_lock(dest: Path, pipe: Connection) -> None:
    with stage._lock(dest):
        pipe.send("locked")
        time.sleep(60)


def test_the_lock_goes_with_its_holder(prepared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dest = tmp_path / "train"
    mine, theirs = _context.Pipe()
    holder = _context.Process(target=_hold_lock, args=(dest, theirs))
    holder.start()
    assert mine.recv() == "locked"
    waiting, told = _context.Pipe()
    second = _context.Process(target=_copy_and_tell, args=(prepared, dest, told))
    second.start()
    assert not waiting.poll(0.5), "it waits"
    holder.kill()
    holder.join()
    assert waiting.recv() > 0
    second.join()
    assert same(prepared, dest)
    with caplog.at_level(logging.WARNING):
        copy(prepared, dest)
    assert "waiting" not in caplog.text


def _copy_slowly(prepared: Path, dest: Path) -> None:
    commit = stage.commit

    def slow(temp: Path, path: Path) -> None:
        time.sleep(0.05)
        commit(temp, path)

    stage.commit = slow
    stage_split(prepared, dest, threads=2, quiet=True)


def test_a_copy_that_is_killed_goes_on(prepared: Path, tmp_path: Path) -> None:
    dest = tmp_path / "train"
    killed = 0
    for attempt in range(6):
        child = _context.Process(target=_copy_slowly, args=(prepared, dest))
        child.start()
        while child.exitcode is None and not list(dest.glob(".tmp-*")):
            time.sleep(0.005)
        child.join(random.Random(attempt).uniform(0, 0.05))
        with contextlib.suppress(AttributeError):
            child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        if (dest / "manifest.json").exists():
            assert verify_split(dest, quiet=True).good
    assert killed
    copy(prepared, dest)
    assert same(prepared, dest)
