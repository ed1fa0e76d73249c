"""Tells a Prometheus elsewhere where the endpoints of running jobs are: file_sd files in the run root.

``RUN_ROOT/prometheus/NAME.json`` exists while the run is there, and ``NAME@node-1.json`` and so on while its further nodes
are. Each is replaced in one step; a restart on other nodes or ports replaces it too, so none is ever two targets. It is a
lease: the trainer renews its time stamp every RENEW_SECONDS and removes it at its end. After a kill nobody does, so whoever
comes by removes files that were not renewed for LEASE_SECONDS: any trainer with the same run root, and ``python -m
nepa_dist.metrics targets RUN_ROOT``, which runs beside Prometheus. Ages are measured with the file server's clock.

Imports no torch.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

FOLDER = "prometheus"
RENEW_SECONDS = 15.0
LEASE_SECONDS = 60.0


class Target:
    """The lease of one endpoint.

    Args:
        run_root: where all runs are.
        run: name of this one; the label ``run`` of the target.
        endpoint: ``host:port``.
        labels: more labels of the target.
        node: number of the node in the run; its label ``node``. None for the endpoint of the run itself.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, run_root: Path, run: str, endpoint: str, labels: Mapping[str, str], node: int | None = None) -> None:
        # No name of a run has an @.
        self.path = run_root / FOLDER / (f"{run}.json" if node is None else f"{run}@node-{node}.json")
        labels = {**labels, "run": run} if node is None else {**labels, "run": run, "node": str(node)}
        self._content = json.dumps([{"targets": [endpoint], "labels": labels}]) + "\n"
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread = threading.Thread(target=self._renew, name="discovery", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Remove the file, unless it is another process's by now."""
        self._closing.set()
        with self._lock, suppress(OSError):
            if self.path.read_text(encoding="utf-8") == self._content:
                self.path.unlink()

    def _write(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.uname().nodename}.{os.getpid()}")
        temporary.write_text(self._content, encoding="utf-8")
        os.replace(temporary, self.path)

    def _renew(self) -> None:
        while not self._closing.wait(RENEW_SECONDS):
            # A disk that is full or hangs is no reason to stop: the next round tries again.
            with suppress(OSError), self._lock:
                if self._closing.is_set():
                    return
                self._write()
            with suppress(OSError):
                prune(self.path.parent.parent)


def prune(run_root: Path, lease_seconds: float = LEASE_SECONDS) -> list[str]:
    """Remove the files of runs that have ended without a word.

    Args:
        run_root: where all runs are.
        lease_seconds: age from which a file is stale.

    Returns:
        Names of the runs whose file was removed.

    Raises:
        OSError: the folder cannot be used.
    """
    folder = run_root / FOLDER
    if not folder.is_dir():
        return []
    now = _time_of(folder)
    removed = []
    for path in sorted(folder.iterdir()):
        if path.suffix != ".json" and not path.name.startswith("."):
            continue  # not of this project
        with suppress(FileNotFoundError):
            if now - path.stat().st_mtime > lease_seconds:
                path.unlink()
                if path.suffix == ".json" and not path.name.startswith("."):
                    removed.append(path.stem)
    return removed


def watch(run_root: Path, seconds: float = RENEW_SECONDS) -> None:
    """Prune for ever, and say what was removed."""
    while True:
        with suppress(OSError):
            for run in prune(run_root):
                print(f"{run}: its lease is over, removed", flush=True)
        time.sleep(seconds)


def _time_of(folder: Path) -> float:
    """Now, by the clock that stamps this folder's files."""
    clock = folder / f".clock.{os.uname().nodename}.{os.getpid()}"
    clock.write_bytes(b"")
    try:
        return clock.stat().st_mtime
    finally:
        clock.unlink(missing_ok=True)
