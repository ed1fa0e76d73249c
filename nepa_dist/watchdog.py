"""Ends a rank that hangs, after writing down where: a job that stands still costs as much as one that runs.

One daemon thread per rank looks several times per limit whether the loop has finished a step. All ranks hang when one does, for
they wait for it in a collective, so each rank's own watchdog writes its own stacks and no rank needs to ask another. It then
waits a little before it ends the process: the death of one rank is an error in the others, which would hide where they are.

Two ways to the end:

- The usual one. The main thread waits: for a lock, a file, a collective, a device. The watchdog's thread runs, writes a header
  and the stacks of all threads, and ends the process with :data:`nepa_dist.guard.EXIT_AGAIN`.
- A native call hangs and keeps the interpreter's lock, so that no Python runs any more. Then two timers of the system that the
  thread sets again at every look run out. One writes the stacks. The other only sets the alarm clock, whose signal ends the
  process :data:`ALARM_SECONDS` later: by SIGALRM, because without Python nobody can choose an exit code. On Linux only.

A process that was stopped and goes on (SIGSTOP, a suspended machine) is not taken for one that hangs: the thread counts its own
looks and not the time between them, and it resets the alarm clock as soon as it runs.

While a watchdog is open, SIGALRM, the real-time interval timer and :func:`faulthandler.dump_traceback_later` belong to it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from nepa_dist.guard import EXIT_AGAIN

ALARM_SECONDS = int(signal.SIGALRM)
"""Seconds between the two signals of the alarm clock: the first one's handler is ``alarm``, called with the signal's number."""
LOOKS_PER_LIMIT = 10
LOOKS_BEFORE_THE_END = 3
"""The ranks notice a hang within two looks of each other; the first one waits for the last."""
MAX_SECONDS_BETWEEN_LOOKS = 5.0
STDERR = 2
"""The descriptor itself: the main thread may hold the lock of ``sys.stderr``."""
NUM_DURATIONS = 100
"""Newest steps whose durations decide what is long."""


def exit_again() -> NoReturn:
    """End the process at once, with the exit code that asks for another start."""
    os._exit(EXIT_AGAIN)


class Watchdog:
    """Watches that the loop goes on. Armed after the second step, for the first may compile for minutes.

    A hang is: no beat for the larger of ``min_seconds`` and ``factor`` times the median duration of the last 100 steps, and
    still none at the next look.

    Open it after the loader has forked its workers: a thread must not be running then.

    Args:
        path: file that the stacks are appended to. Made at once, and removed by :meth:`close` when nothing was written.
        min_seconds: shortest limit, seconds, > 0.
        factor: limit in units of the median step, >= 1.
        on_hang: called in the watchdog's thread once the stacks are written; must end the process.

    Raises:
        ValueError: ``min_seconds`` or ``factor`` is out of range.
        OSError: the file cannot be made.
    """

    def __init__(
        self,
        path: Path,
        *,
        min_seconds: float = 60.0,
        factor: float = 10.0,
        on_hang: Callable[[], NoReturn] = exit_again,
    ) -> None:
        if not min_seconds > 0 or not factor >= 1:
            raise ValueError(f"min_seconds {min_seconds} must be positive and factor {factor} at least 1")
        self._path, self._min_seconds, self._factor, self._on_hang = path, min_seconds, factor, on_hang
        path.parent.mkdir(parents=True, exist_ok=True)
        # Kept open, and written to without a buffer: in a process that hangs, an open or a lock may hang as well.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._durations: deque[float] = deque(maxlen=NUM_DURATIONS)
        self._last_beat = time.monotonic()
        self._step: int | None = None
        self._pauses = 0
        self._timers = _Timers(self._file.fileno())
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int | None = None) -> None:
        """Say that the loop goes on.

        Args:
            step: the step that has just been finished. None where something else went on, such as a batch of an evaluation:
                its duration says nothing about those of steps.
        """
        now = time.monotonic()
        if step is not None:
            if self._step is not None:
                self._durations.append(now - self._last_beat)
            self._step = step
        self._last_beat = now

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Expect no beat inside: for what is long by its nature. What hangs there is not noticed."""
        with self._lock:
            self._pauses += 1
            self._timers.stop()
        try:
            yield
        finally:
            with self._lock:
                self._last_beat = time.monotonic()
                self._pauses -= 1

    def close(self) -> None:
        """Stop watching; remove the file if it is empty. Can be called more than once."""
        if self._file.closed:
            return
        self._closing.set()
        self._thread.join()
        self._timers.stop()
        empty = os.fstat(self._file.fileno()).st_size == 0
        self._file.close()
        if empty:
            self._path.unlink(missing_ok=True)  # someone may have tidied up

    def _limit(self) -> float:
        """Seconds without a beat that are tolerated now."""
        return max(self._min_seconds, self._factor * statistics.median(self._durations.copy() or [0.0]))

    def _watch(self) -> None:
        try:
            self._look_until_closed()
        finally:  # without this thread nobody sets the timers again
            self._timers.stop()

    def _look_until_closed(self) -> None:
        limit = self._min_seconds
        looked, seen = time.monotonic(), self._last_beat
        silent, num_late = 0.0, 0
        while not self._closing.wait(wait := min(limit / LOOKS_PER_LIMIT, MAX_SECONDS_BETWEEN_LOOKS)):
            with self._lock:
                now = time.monotonic()
                gap, looked, armed_for, limit = now - looked, now, limit, self._limit()
                armed = len(self._durations) > 0 and self._pauses == 0
                if not armed or self._last_beat != seen:
                    silent, seen = 0.0, self._last_beat
                else:
                    # In a longer gap this process, or all Python in it, stood still. That is not the loop's fault.
                    silent += min(gap, 2 * wait)
                num_late = num_late + 1 if silent > limit else 0
                if armed:
                    self._timers.start(limit)
            if armed and gap > armed_for:
                self._write(f"=== {_place()}: stood still for {gap:.1f} s and goes on; stacks just above are of no hang\n")
            if num_late == 2:
                self._write_stacks(limit)
                time.sleep(LOOKS_BEFORE_THE_END * wait)
                self._on_hang()

    def _write_stacks(self, limit: float) -> None:
        # The timers are still set: a write that blocks does not keep the process alive.
        median = statistics.median(self._durations)
        header = (
            f"=== {_place()}: no step for {time.monotonic() - self._last_beat:.1f} s after step {self._step}. The limit is "
            f"{limit:.1f} s: at least {self._min_seconds:g} s and {self._factor:g} x the median step of {median:.3f} s. "
            f"The process ends itself; this is what its threads do:\n"
        )
        with suppress(OSError):  # the terminal may be gone; the file gets the same
            os.write(STDERR, header.encode())
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        self._write(header)
        faulthandler.dump_traceback(file=self._file, all_threads=True)

    def _write(self, text: str) -> None:
        try:
            self._file.write(text.encode())
        except OSError as error:  # a full disk must not keep the process alive
            with suppress(OSError):
                os.write(STDERR, f"{self._path} cannot be written: {error.strerror}\n".encode())


class _Timers:
    """What acts when no Python runs: stacks into a file at the limit, SIGALRM's default action ALARM_SECONDS later."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        if self._libc is not None:
            self._libc.sysv_signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
            self._alarm = ctypes.cast(self._libc.alarm, ctypes.c_void_p)

    def start(self, seconds: float) -> None:
        """Set both to ``seconds`` from now, whether they run or not. Too slow for every step: up to 0.5 ms."""
        faulthandler.dump_traceback_later(seconds, file=self._file)
        if self._libc is not None:
            # A handler of this kind serves one signal, then the default action is back. So the first signal runs alarm(14), and
            # the second ends the process, unless this is called in between. After a stop only one of them can be waiting.
            self._libc.sysv_signal(signal.SIGALRM, self._alarm)
            signal.siginterrupt(signal.SIGALRM, False)
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def stop(self) -> None:
        """Stop both."""
        faulthandler.cancel_dump_traceback_later()
        if self._libc is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _place() -> str:
    time_now = datetime.now(UTC).isoformat(timespec="seconds")
    return f"{time_now} rank {os.environ.get('RANK', '0')}, pid {os.getpid()} on {os.uname().nodename}"
