"""Whole runs under attack: killed without warning, many times and mostly while they save; and one rank told to stop.

Everything is seen from the outside, in the processes and the files. The seeds fix what is attacked and when; how far a run has
come by then is up to the machine.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from images import image_folder
from jobs.cluster import REPO_ROOT
from nepa_dist.checkpoint.store import CheckpointStore
from nepa_dist.metrics.sinks import read_curve

SECONDS = 90.0
"""More than any single thing takes: the launcher alone waits 30 s for the other ranks when one has gone."""
SETTINGS = [
    *("model.image_size=32", "model.patch_size=8", "model.embed_dim=64", "model.depth=4", "model.num_heads=2"),
    *("global_batch_size=8", "micro_batch_size=4", "steps=100000", "metrics.every=1", "metrics.collapse_every=1000"),
    *("data.num_workers=1", "engine.precision=fp32", "engine.device=cpu", "metrics.prometheus=false"),
    # About twenty small files, each flushed to the disk: a save takes longer than the two steps in between.
    *("checkpoint.every=2", "checkpoint.shard_bytes=200000"),
]
Condition = Callable[[], bool]


class Run(NamedTuple):
    """A run folder, its data, and the output of its launchers."""

    folder: Path
    data: Path
    output: Path

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.folder / "checkpoints")

    def newest(self) -> int:
        """Step of the newest committed checkpoint, 0 without one."""
        return max(self.store.steps(), default=0)

    def last_row(self) -> dict[str, float]:
        """The newest line of metrics.jsonl."""
        file = self.folder / "metrics.jsonl"
        rows = read_curve(file) if file.exists() else []
        return rows[-1] if rows else {"step": 0, "time": 0}

    def temporary(self) -> set[str]:
        """Names of the checkpoints that are being written or deleted."""
        root = self.store.root
        return {name for name in os.listdir(root) if name.startswith(".tmp-")} if root.exists() else set()

    def saving(self) -> bool:
        return any(name.startswith(".tmp-step-") for name in self.temporary())

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    @contextmanager
    def launched(self, ranks: int) -> Iterator[Attack]:
        """Start the run; no launcher outlives the block."""
        script = [sys.executable, str(REPO_ROOT / "jobs/submit.py"), "pretrain", "vit_tiny", "--cluster", "local"]
        options = ["--data", str(self.data), "--run-dir", str(self.folder), "--gpus-per-node", str(ranks)]
        sets = [part for setting in SETTINGS for part in ("--set", setting)]
        with self.output.open("ab") as output:
            process = subprocess.Popen(
                [*script, *options, *sets], stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        try:
            yield Attack(self, process, ranks)
        finally:
            process.kill()
            process.wait()


class Attack(NamedTuple):
    """One start of the run and what is done to it."""

    run: Run
    launcher: subprocess.Popen[bytes]
    num_ranks: int

    def wait_for(self, condition: Condition, what: str, interval: float = 0.01) -> None:
        def ended_or_true() -> bool:
            if self.launcher.poll() is not None:
                raise AssertionError(f"ended with {self.launcher.returncode} before {what}:\n{self.output()}")
            return condition()

        wait_for(ended_or_true, what, interval)

    def ranks(self) -> dict[int, int]:
        """Process ids of the launcher's children by rank, as far as they are started."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) != self.launcher.pid:
                    continue
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", (folder / "environ").read_bytes())
            except OSError:  # it has ended
                continue
            if rank:
                found[int(rank[1])] = int(folder.name)
        return found

    def wait_for_ranks(self) -> dict[int, int]:
        self.wait_for(lambda: len(self.ranks()) == self.num_ranks, "all ranks were started", 0.1)
        return self.ranks()

    def exit_code(self) -> int:
        try:
            return self.launcher.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a deadlock: not ended within {SECONDS:g} s:\n{self.output()}") from None

    def output(self) -> str:
        return "\n".join(self.run.output.read_text(errors="replace").splitlines()[-40:])


def wait_for(condition: Condition, what: str, interval: float) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {SECONDS:g} s in vain: {what}"
        time.sleep(interval)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def catches(pid: int, number: int) -> bool:
    """Whether a process has its own handler for a signal."""
    try:
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return False
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run", image_folder(tmp_path / "images", per_class=8), tmp_path / "output.txt")


def kill(run: Run, ranks: int, rng: random.Random, *, in_save: bool, early: bool) -> set[str]:
    """Start the run and kill one of its processes, the launcher or a rank. Returns what an interrupted save left behind."""
    base, leftovers = run.newest(), run.temporary()
    with run.launched(ranks) as attack:
        if early:
            attack.wait_for_ranks()
            time.sleep(rng.uniform(0, 3))
        else:
            attack.wait_for(lambda: run.newest() > base, f"a checkpoint after step {base}")
            assert not leftovers & run.temporary(), "the start before this kill left the remains of the one before"
            assert base == 0 or f"step-{base:08}, step {base}\n" in run.log()
            if in_save:
                attack.wait_for(run.saving, "a checkpoint is being written")
            time.sleep(rng.uniform(0, 0.1 if in_save else 0.5))
        pids = attack.wait_for_ranks()
        target = rng.choice([attack.launcher.pid, *pids.values()])
        committed = run.newest()
        os.kill(target, signal.SIGKILL)
        code = attack.exit_code()
    assert code == (-signal.SIGKILL if target == attack.launcher.pid else 1), attack.output()
    wait_for(lambda: all(is_gone(pid) for pid in pids.values()), "the ranks end after their launcher", 0.05)
    assert run.newest() >= committed >= base, "a committed checkpoint is lost"
    for step in run.store.steps():
        CheckpointStore.verify(run.store.path(step))  # raises if it cannot be loaded
    return run.temporary()


def kill_campaign(run: Run, rng: random.Random, rounds: int) -> None:
    """Kill in turn 1 and 2 ranks, each second pair while it saves, and some early."""
    num_progress = num_interrupted = 0
    for number in range(rounds):
        base = run.newest()
        leftovers = kill(run, 1 + number % 2, rng, in_save=number // 2 % 2 == 0, early=number % 8 == 7)
        num_progress += run.newest() > base
        num_interrupted += any(name.startswith(".tmp-step-") for name in leftovers)
    assert num_progress > rounds / 2
    assert num_interrupted >= rounds / 4, "hardly any save was hit, so little was tested"


def stop_one_rank(run: Run, rng: random.Random, *, early: bool) -> None:
    """Start the run on two ranks, send SIGUSR2 to one of them, and look at how the run ends."""
    number, base, started = signal.SIGUSR2, run.newest(), time.time()
    with run.launched(2) as attack:
        pid = rng.choice(sorted(attack.wait_for_ranks().items()))[1]
        if early:
            attack.wait_for(lambda: catches(pid, number), "the rank has its handlers")
            time.sleep(rng.uniform(0, 3))
        else:
            attack.wait_for(lambda: run.last_row()["time"] > started, f"a step after {base}")
            time.sleep(rng.uniform(0, 0.5))
        os.kill(pid, number)
        assert attack.exit_code() == 75, attack.output()
    assert early or run.newest() > base
    assert run.newest() == run.last_row()["step"], "the step at which it stopped is not saved"
    assert run.temporary() == set()
    CheckpointStore.verify(run.store.path(run.newest()))
    assert base == 0 or run.newest() == base or f"step-{base:08}, step {base}\n" in run.log()


def assert_whole(run: Run) -> None:
    """After a regular end: the newest checkpoint verifies, and every step up to it is logged once."""
    found = run.store.latest()
    assert found.passed_over == []
    assert found.manifest is not None
    assert [row["step"] for row in read_curve(run.folder / "metrics.jsonl")] == list(range(1, found.manifest.step + 1))


def test_kills_and_signals_lose_nothing(run: Run) -> None:
    rng = random.Random(0)
    kill_campaign(run, rng, rounds=4)
    for _ in range(3):
        stop_one_rank(run, rng, early=False)
    assert_whole(run)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_kills(run: Run) -> None:
    rng = random.Random(1)
    kill_campaign(run, rng, rounds=30)
    stop_one_rank(run, rng, early=False)
    assert_whole(run)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_signals(run: Run) -> None:
    rng = random.Random(1)
    for number in range(20):
        stop_one_rank(run, rng, early=number in (7, 14))
    assert_whole(run)
