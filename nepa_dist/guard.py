"""When a run must stop: signals, non-finite steps, too many bad samples, and a second trainer in the same folder."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

from nepa_dist.state import TrainState

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Preemption, Ctrl-C, and the warnings before a time limit: save at the next step boundary and exit with EXIT_AGAIN."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_AGAIN = 75
"""Stopped before the end with a checkpoint: run the same command again (sysexits' EX_TEMPFAIL)."""


class RunAborted(ValueError):
    """The run cannot usefully go on; the message says why and what to do."""


class StopFlag:
    """Set by a signal, read by the loop at step boundaries. The handler does nothing else: saving inside a handler corrupts."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    @property
    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self.signal_name is not None


def count_skip(state: TrainState, applied: bool, limit: int) -> None:
    """Account for one step.

    Args:
        state: its skip counters are updated.
        applied: whether the step moved the weights.
        limit: skipped steps in a row that are tolerated.

    Raises:
        RunAborted: more than ``limit`` steps in a row were skipped.
    """
    if applied:
        state.consecutive_skips = 0
        return
    state.skipped_steps += 1
    state.consecutive_skips += 1
    if state.consecutive_skips > limit:
        raise RunAborted(
            f"{state.consecutive_skips} steps in a row had a non-finite gradient and were skipped "
            f"(guard.max_consecutive_skips is {limit}). The weights are as before the first of them. Lower optim.base_lr, "
            f"keep model.qk_norm on, or train in fp32; continuing from the last checkpoint repeats the same steps."
        )


def count_saves(state: TrainState, written: int, failed: int, limit: float) -> None:
    """Account for checkpoints whose writing has ended.

    Args:
        state: its failure counters are updated.
        written: that are on disk.
        failed: that could not be written.
        limit: failures in a row that are tolerated.

    Raises:
        RunAborted: more than ``limit`` checkpoints in a row could not be written.
    """
    if written:
        state.consecutive_checkpoint_failures = 0
    state.checkpoint_failures += failed
    state.consecutive_checkpoint_failures += failed
    if state.consecutive_checkpoint_failures > limit:
        raise RunAborted(
            f"{state.consecutive_checkpoint_failures} checkpoints in a row could not be written "
            f"(guard.max_consecutive_checkpoint_failures is {limit}). Make room, then run again: the last one that was "
            f"written is intact."
        )


def count_bad_samples(state: TrainState, found: Mapping[str, str], limit: int) -> dict[str, str]:
    """Account for unreadable images.

    Args:
        state: ``bad_samples`` is extended.
        found: name to reason.
        limit: different bad images that are tolerated.

    Returns:
        Those that were not known before.

    Raises:
        RunAborted: more than ``limit`` different images are unreadable.
    """
    new = {name: reason for name, reason in found.items() if name not in state.bad_samples}
    state.bad_samples.update(new)
    if len(state.bad_samples) > limit:
        listed = "\n".join(f"  - {name}: {reason}" for name, reason in list(state.bad_samples.items())[-10:])
        raise RunAborted(
            f"{len(state.bad_samples)} images are unreadable, more than data.max_bad_samples = {limit}. "
            f"The last ones:\n{listed}\n"
            f"Raise data.max_bad_samples to go on, or clean the data and start a run under another --name."
        )
    return new


class RunInUse(RunAborted):
    """Another trainer holds the run."""


class RunLock:
    """Keeps a second trainer out of a run folder. Dies with the process, however it ends."""

    def __init__(self, run_dir: Path, wait_seconds: float = 15.0) -> None:
        self._path = run_dir / ".lock"
        self._wait = wait_seconds
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        # POSIX record locks are not inherited by the forked loader workers, which may outlive a killed trainer by seconds.
        self._file = open(self._path, "a+", encoding="utf-8")
        deadline = time.monotonic() + self._wait
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    self._file.seek(0)
                    holder = self._file.read().strip() or "unknown"
                    raise RunInUse(
                        f"{self._path.parent} is in use by another trainer ({holder}). "
                        f"Wait for it, stop it, or give another --name."
                    ) from None
                time.sleep(0.2)
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {os.uname().nodename}\n")
        self._file.flush()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
