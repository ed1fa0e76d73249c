"""Records what a real Prometheus sees of real runs that are hurt: python tests/record_alerts.py killed_rank data_stall ...

Each is a run of two ranks on this machine with the project's own scrape interval. After a healthy minute or so something is
done to it; golden/alerts/NAME.json gets the series that alerts look at, which tests/test_alerts.py plays to the rules.
Several names are recorded at the same time, one run starting after the other.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:0] = [str(Path(__file__).parents[1])]

from test_alerts import HEALTHY, RECORDINGS

from nepa_dist.metrics.discovery import FOLDER
from nepa_dist.metrics.registry import lookup, prometheus_name
from prometheus_server import ROOT, Prometheus

INTERVAL = 15
HEALTHY_SECONDS = 75
SETTINGS = (
    *("model.image_size=32", "model.patch_size=4", "model.embed_dim=64", "model.depth=3", "model.num_heads=2"),
    *("global_batch_size=64", "micro_batch_size=32", "steps=1000000", "checkpoint.every=50", "data.num_workers=1"),
    *("engine.precision=fp32", "engine.device=cpu", "guard.hang_seconds=1e6", "metrics.peak_tflops=1"),
)


class Run:
    """A run of two ranks."""

    def __init__(self, root: Path, name: str, seed: int) -> None:
        self.folder = root / name
        sets = [part for setting in (*SETTINGS, f"seed={seed}") for part in ("--set", setting)]
        command = [
            sys.executable,
            str(ROOT / "jobs/submit.py"),
            "pretrain",
            "vit_tiny",
            "--cluster",
            "local",
            "--data",
            "digits",
        ]
        self.process = subprocess.Popen(
            [*command, "--run-dir", str(self.folder), "--gpus-per-node", "2", *sets],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip

    def rank(self, number: int) -> int:
        """Process id of a rank."""
        for pid in self._processes():
            if f"RANK={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
        raise LookupError(f"{self.folder} has no rank {number}")

    def workers(self) -> list[int]:
        """Process ids of the loader workers of both ranks."""
        ranks = {self.rank(0), self.rank(1)}
        return self._processes(parents=ranks)

    def _processes(self, parents: set[int] | None = None) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                mine = str(self.folder).encode() in (path / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent in parents if parents else mine and parent == self.process.pid:
                found.append(int(path.name))
        return found

    def end(self) -> None:
        """End all of it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def kill_a_rank(run: Run, _: float) -> None:
    """One rank is gone at once: the others end with an error, and take the target away."""
    os.kill(run.rank(1), signal.SIGKILL)


def kill_the_node(run: Run, _: float) -> None:
    """All of it is gone at once: nobody takes the target away."""
    run.end()


def stop_the_data(run: Run, _: float) -> None:
    """The loader workers hang, as when a file system does."""
    for worker in run.workers():
        os.kill(worker, signal.SIGSTOP)


def slow_the_data(run: Run, end: float) -> None:
    """The loader workers work a tenth of the time, as when the disk is slow."""
    while time.monotonic() < end:
        for number, seconds in ((signal.SIGSTOP, 0.9), (signal.SIGCONT, 0.1)):
            for worker in run.workers():
                os.kill(worker, number)
            time.sleep(seconds)


def nothing(_run: Run, _end: float) -> None:
    """The run stays healthy."""


WHAT: dict[str, tuple[Callable[[Run, float], None], int]] = {
    "killed_rank": (kill_a_rank, 780),
    "killed_node": (kill_the_node, 780),
    "data_stall": (stop_the_data, 270),
    "slow_data": (slow_the_data, 540),
    "healthy_live": (nothing, 200),
}
"""What is done to a run, and for how many seconds after it Prometheus looks on."""


def record(name: str, number: int, root: Path, prometheus: Prometheus) -> None:
    """Run, hurt, and write down."""
    assert name in RECORDINGS
    do, seconds = WHAT[name]
    run = Run(root, name, seed=10 + number)
    try:
        prometheus.wait_for(lambda: prometheus.value(f'nepa_step{{run="{name}"}}'), 120, name)
        begin = time.time()
        time.sleep(HEALTHY_SECONDS)
        end = time.monotonic() + seconds
        do(run, end)
        time.sleep(max(0, end - time.monotonic()))
        series = {key: values_of(prometheus, name, key, begin) for key in HEALTHY}
        series["up"] = values_of(prometheus, name, "up", begin)
    finally:
        run.end()
    path = Path(__file__).parent / f"golden/alerts/{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({key: x for key, x in series.items() if x}, separators=(",", ":")) + "\n")
    print(path, flush=True)


def values_of(prometheus: Prometheus, run: str, key: str, begin: float) -> list[float | None]:
    """One value for each interval, None where the series is not there; clocks begin at 0. Empty without the series."""
    metric, value = (None, None) if key == "up" else lookup(key)
    own = f',{metric.label}="{value}"' if metric and value is not None else ""
    query = f'{prometheus_name(metric) if metric else key}{{run="{run}"{own}}}'
    end = time.time() - INTERVAL
    asked = {"query": query, "start": begin, "end": end, "step": INTERVAL}
    with urllib.request.urlopen(f"{prometheus.url}/api/v1/query_range?{urllib.parse.urlencode(asked)}", timeout=20) as answer:
        found = json.load(answer)["data"]["result"]
    if not found:
        return []
    values = {round((moment - begin) / INTERVAL): float(text) for moment, text in found[0]["values"]}
    offset = begin if "timestamp_seconds" in key else 0.0
    return [float(f"{values[i] - offset:.6g}") if i in values else None for i in range(round((end - begin) / INTERVAL))]


def main(names: list[str]) -> None:
    """Record all of them beside each other; each begins when the one before is through its healthy time."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "runs"
        (root / FOLDER).mkdir(parents=True)
        prometheus = Prometheus(Path(folder) / "prometheus", root / FOLDER, seconds=INTERVAL)
        watcher = subprocess.Popen([sys.executable, "-m", "nepa_dist.metrics", "targets", "--watch", str(root)], cwd=ROOT)
        threads = [threading.Thread(target=record, args=(name, i, root, prometheus)) for i, name in enumerate(names, 1)]
        try:
            for thread in threads:
                thread.start()
                time.sleep(HEALTHY_SECONDS + INTERVAL)
            for thread in threads:
                thread.join()
        finally:
            watcher.kill()
            watcher.wait()
            prometheus.close()


if __name__ == "__main__":
    main(sys.argv[1:])
