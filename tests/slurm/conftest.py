"""One cluster for all tests of this folder, and what they do with runs on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import Cluster, why_not
from jobs.cluster import REPO_ROOT

SITE = """\
cluster:
  launcher: slurm
  shared: [{shared}]
  cpus_per_gpu: 1
  mem: 2G
  time: "1:00:00"
  environment: {{MASTER_ADDR: 127.0.0.1}}  # the nodes of this cluster have names that nobody resolves
"""
TINY = ("--data", "digits", "--set", "model.depth=1", "--set", "optim.warmup_steps=1", "--gpus-per-node", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs SLURM and takes its time."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster, SLURM's commands talk to it."""
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    started = Cluster(folder)
    before = os.environ.get("SLURM_CONF")
    os.environ.update(started.environment)
    try:
        started.start()
        yield started
    finally:
        started.stop()
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)


class Desk:
    """A user at a login node: a working folder, the command line, and eyes for queue and run folders."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.site = folder / "site.yaml"
        self.site.write_text(SITE.format(shared=f"/tmp, {folder}, {REPO_ROOT}, {Path(sys.executable).parent}"))

    def submit(self, *words: str, code: int = 0, root: Path = REPO_ROOT, env: dict[str, str] | None = None) -> str:
        """Call the command line; returns what it printed, errors included."""
        command = [sys.executable, str(root / "jobs" / "submit.py"), *words]
        done = subprocess.run(command, cwd=self.folder, env={**os.environ, **(env or {})}, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def train(self, name: str, *words: str, nodes: int = 2, **more: Any) -> str:
        """Submit a small pretraining run; returns the job's number."""
        options = ("--name", name, "--config", str(self.site), "--nodes", str(nodes), *TINY, *words)
        text = self.submit("pretrain", "vit_tiny", *options, **more)
        return text.partition("submitted job ")[2].partition(":")[0]

    def run(self, name: str) -> Path:
        """Folder of a run."""
        return self.folder / "runs" / name

    def ask(self, *command: str) -> str:
        """Output of one of SLURM's commands."""
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    def state(self, job: str) -> str:
        """State of a job in the controller's words."""
        return self.ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").split("\n")[0]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        return read_lines(self.run(name) / "metrics.jsonl")

    def record(self, name: str) -> list[dict[str, Any]]:
        """The record of a run's jobs."""
        return read_lines(self.run(name) / "job" / "attempts.jsonl")

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 300.0) -> Any:
        """Wait until a condition holds; returns what it said."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"waited {seconds:g} s in vain for {what}\n{self.picture()}")
            time.sleep(0.25)
        return found

    def wait_for_step(self, name: str, step: int) -> None:
        """Wait until a run has logged a step."""
        self.wait(lambda: any(row["step"] >= step for row in self.rows(name)), f"step {step} of {name}")

    def wait_for_start(self, name: str, number: int) -> None:
        """Wait until a run has begun for the n-th time."""
        self.wait(lambda: sum(row["event"] == "start" for row in self.record(name)) >= number, f"start {number} of {name}")

    def wait_for_end(self, *jobs: str, seconds: float = 600.0) -> None:
        """Wait until jobs have left the queue."""

        def gone() -> bool:
            return not {*jobs} & {*self.ask("squeue", "--noheader", "--me", "--format=%F").split()}

        self.wait(gone, f"jobs {', '.join(jobs)} to end", seconds)

    def picture(self) -> str:
        """What one would look at first when something is wrong."""
        parts = [self.ask("squeue", "--states=all"), self.ask("sinfo")]
        for path in sorted(self.folder.glob("runs/**/logs/*.txt")) + sorted(self.folder.glob("runs/**/attempts.jsonl")):
            parts.append(f"==> {path}\n{path.read_text(errors='replace')[-2000:]}")
        return "\n".join(parts)


@pytest.fixture
def desk(cluster: Cluster, tmp_path: Path) -> Iterator[Desk]:
    """A login node; what is left in the queue is cancelled afterwards."""
    yield Desk(cluster, tmp_path)
    subprocess.run(["scancel", "--me"], check=False, timeout=60)
    deadline = time.monotonic() + 60
    while (
        subprocess.run(["squeue", "--noheader", "--me"], capture_output=True, text=True).stdout and time.monotonic() < deadline
    ):
        time.sleep(0.2)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file; none if it is not there; a line that is being written is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
