"""Writing a prepared split, stopped at any moment or done twice at a time, ends with the bytes of an unbroken run."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.files import sweep, temp_path
from data_prep.plan import Container
from data_prep.write import write_split
from images import image_folder
from splits import Trapped, content, planned, prepare, source, write

# Children are forked from a process that has imported everything, for a process of its own takes seconds to start.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["data_prep.write", "data_prep.formats.mds", "data_prep.formats.beton", "data_prep.sources"])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("source") / "images", num_classes=3, per_class=20)


@pytest.fixture(scope="module")
def unbroken(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of a split that was written in one go."""
    folder = planned(images, tmp_path_factory.mktemp("unbroken") / "train")
    write(folder, images)
    return content(folder)


def _write_until_call(folder: Path, images: Path, calls: int) -> None:
    """Write, but die at the given call that changes or flushes the disk."""
    left = calls

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name in ("fsync", "rename", "unlink", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))
    write(folder, images)


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_dies_at_any_step_is_made_good(
    images: Path, tmp_path: Path, unbroken: dict[str, bytes], stride: int
) -> None:
    exit_codes = []
    for calls in range(1, 200, stride):
        folder = planned(images, tmp_path / str(calls))
        child = _context.Process(target=_write_until_call, args=(folder, images, calls))
        child.start()
        child.join()
        exit_codes.append(child.exitcode)
        if child.exitcode == 0:
            break
        write(folder, images)
        assert content(folder) == unbroken, calls
        shutil.rmtree(folder)
    assert exit_codes[-1] == 0
    assert set(exit_codes[:-1]) == {-signal.SIGKILL}
    assert len(exit_codes) > 40 // stride


def _write_slowly_in_group(folder: Path, images: Path) -> None:
    os.setsid()
    write_split(folder, Trapped(source(images), functools.partial(time.sleep, 0.03), index=None), workers=2, quiet=True)


def _group_lives(group: int | None) -> bool:
    """Whether a process of the group is not dead yet; those that nobody waited for stay in the list of processes."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, member = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(member) == group and state != "Z":
                return True
    return False


@pytest.mark.parametrize(
    ("container", "kills"), [("mds", 6), *(pytest.param(name, 20, marks=pytest.mark.slow) for name in ("tar", "mds", "beton"))]
)
def test_killed_at_random_times(images: Path, tmp_path: Path, container: Container, kills: int) -> None:
    unbroken = content(prepare(images, tmp_path / "unbroken" / "train", container, shards=5))
    folder = planned(images, tmp_path / "train", container)
    in_time = 0
    for attempt in range(kills):
        before = set(folder.glob(".tmp-*"))
        child = _context.Process(target=_write_slowly_in_group, args=(folder, images))
        child.start()
        while child.exitcode is None and set(folder.glob(".tmp-*")) <= before:
            time.sleep(0.01)
        child.join(random.Random(attempt).uniform(0, 0.7))
        if child.exitcode is None and child.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it was quicker
                os.killpg(child.pid, signal.SIGKILL)
        child.join()
        while _group_lives(child.pid):
            time.sleep(0.01)
        in_time += child.exitcode == -signal.SIGKILL
    assert in_time > 0
    write(folder, images)
    assert content(folder) == unbroken


def test_two_writers_at_once(images: Path, tmp_path: Path, unbroken: dict[str, bytes]) -> None:
    folder = planned(images, tmp_path / "train")
    children = [_context.Process(target=write, args=(folder, images)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert content(folder) == unbroken


@pytest.fixture
def sleeper() -> Iterator[int]:
    """Id of a process that lives."""
    child = _context.Process(target=time.sleep, args=(60,))
    child.start()
    assert child.pid is not None
    yield child.pid
    child.kill()
    child.join()


def test_sweeping_takes_leftovers_only(tmp_path: Path, sleeper: int) -> None:
    mine = temp_path(tmp_path / "shard-00000.tar").name
    place = mine.rpartition("-")[2]
    dead, alive = f".tmp-shard-1-999999999-{place}", f".tmp-shard-2-{sleeper}-{place}"
    elsewhere, old = ".tmp-shard-3-999999999-00000000", ".tmp-shard-4-999999999-00000000"
    for name in (dead, alive, elsewhere, old, ".tmp-of-the-user", "shard-00001.tar"):
        (tmp_path / name).touch()
    os.utime(tmp_path / old, (time.time() - 3700,) * 2)
    assert sweep(tmp_path) == sorted([dead, old])
    assert sorted(os.listdir(tmp_path)) == sorted([alive, elsewhere, ".tmp-of-the-user", "shard-00001.tar"])
