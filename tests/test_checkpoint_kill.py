"""A process that is killed while it saves: what was committed loads, and nothing is left behind.

One server process imports torch once; the processes to kill are forked from it.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from nepa_dist.checkpoint.store import CheckpointStore

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "nepa_dist.checkpoint.store"])

COUNT = 24


def open_store(root: Path) -> CheckpointStore:
    return CheckpointStore(root, keep_last=2, shard_bytes=40_000)


def save(store: CheckpointStore, step: int, meta: dict[str, Any] | None = None) -> None:
    entries = ((f"p{i}", {"weight": torch.full((2000,), float(step)), "step": torch.tensor(float(step))}) for i in range(COUNT))
    store.save(step, entries, meta or {})


def save_for_ever(root: Path, first: int, pipe: Connection) -> None:
    """Save step after step; send each once it is committed."""
    store = open_store(root)
    pipe.send(first - 1)
    step = first
    while True:
        save(store, step)
        pipe.send(step)
        step += 1


def save_until_call(root: Path, step: int, meta: dict[str, Any], calls: int) -> None:
    """Save one step, but die at the given call that changes or flushes the disk."""
    left = calls

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "unlink", "rmdir", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))
    save(open_store(root), step, meta)


def newest_after_restart(root: Path) -> int:
    """What a new process does at its start; checks that all there is is whole."""
    store = open_store(root)
    store.sweep()
    assert not [name for name in os.listdir(root) if name.startswith(".")], "leftovers after the sweep"
    found = store.latest()
    assert found.passed_over == []
    assert found.path is not None
    for step in store.steps():
        manifest, reader = store.open(root / f"step-{step:08d}")
        assert manifest.step == step
        assert len(reader.names()) == COUNT
        assert all(reader.read(name)["weight"].eq(step).all() for name in reader.names())
    assert found.manifest is not None
    return found.manifest.step


def test_kill_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(0)
    save(open_store(tmp_path), 1)
    newest = 1
    saved = rounds = 0
    while rounds < 12 or not saved:
        rounds += 1
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=save_for_ever, args=(tmp_path, newest + 1, theirs))
        process.start()
        theirs.close()
        committed = ours.recv()
        time.sleep(rng.uniform(0.0, 0.01 * rounds))  # a busy machine takes long for a save
        process.kill()
        process.join()
        try:
            while True:
                committed = ours.recv()
        except EOFError:
            pass
        saved += committed - newest
        newest = newest_after_restart(tmp_path)
        assert newest in (committed, committed + 1)  # killed between the commit and the message


def test_kill_at_every_call(tmp_path: Path) -> None:
    """Steps 1 to 3 exist and 4 is saved, so an older one is deleted; another run's or an earlier step 4 gives way."""
    run = {"config_digest": "a", "data_fingerprint": "b"}
    new = run | {"state": {"preemptions": 1}}
    for replay in (None, {"run": "other"}, run | {"state": {"preemptions": 0}}):
        calls = 0
        exit_code: int | None = -signal.SIGKILL
        while exit_code == -signal.SIGKILL:
            calls += 1
            root = tmp_path / f"{len(replay or {})}-{calls}"
            for step in (1, 2, 3):
                save(open_store(root), step)
            if replay:
                save(open_store(root), 4, replay)
            process = _context.Process(target=save_until_call, args=(root, 4, new, calls))
            process.start()
            process.join()
            exit_code = process.exitcode
            assert newest_after_restart(root) in (3, 4)
            assert exit_code in (0, -signal.SIGKILL)
            if exit_code == 0:
                assert open_store(root).steps() == [3, 4]
                assert open_store(root).verify(root / "step-00000004").meta == new
        assert calls > 8, "the save made fewer calls than there are files to flush"
