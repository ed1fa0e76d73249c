"""Worker processes that never hang: one task at a time each, and a worker that fails or dies ends the run with what it was at.

Workers are spawned, not forked: a fork would copy the locks of the threads of image libraries. They end by themselves when
the main process is gone, since both ends of their pipe are held by no one else.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_longlong
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol, TypeVar

from data_prep.files import PrepError, UsageError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

OnProgress = Callable[[int, int], None]
"""Called with the number of samples and of bytes done since the last call."""

Describe = Callable[[int, int], str]
"""What to call (task, item) in a message; item -1: none had begun."""

_REPORT_SECONDS = 0.5


class Report:
    """Through which a job says where it is.

    Args:
        current: shared with the main process: the item that is being worked on.
        send: takes the samples and bytes done since the last time.
    """

    def __init__(self, current: c_longlong, send: OnProgress) -> None:
        self._current = current
        self._send = send
        self._items = self._bytes = 0
        self._sent = time.monotonic()

    def begin(self, item: int) -> None:
        """The next item: named if the process dies over it."""
        self._current.value = item

    def done(self, num_bytes: int, items: int = 1) -> None:
        """Some work is finished."""
        self._items += items
        self._bytes += num_bytes
        if time.monotonic() - self._sent >= _REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what was not sent yet."""
        self._send(self._items, self._bytes)
        self._items = self._bytes = 0
        self._sent = time.monotonic()


class Job(Protocol[T_co]):
    """What the workers do; it is sent to each of them once."""

    def __call__(self, task: int, report: Report, /) -> T_co:
        """Do one task."""


def num_workers(asked: int | None) -> int:
    """Worker processes to start: as asked, or as many as this process may use cores."""
    if asked is not None and asked < 1:
        raise UsageError(f"--workers {asked}: at least 1 is needed")
    return asked or len(os.sched_getaffinity(0))


def run(
    job: Job[T], tasks: Sequence[int], *, workers: int, describe: Describe, on_progress: OnProgress | None = None
) -> Iterator[tuple[int, T]]:
    """Do all tasks and yield (task, result) as they finish, in any order.

    Args:
        job: called once per task; with one worker or one task in this process, else in worker processes.
        tasks: each at most once.
        workers: processes at most.
        describe: names a task and item for an error.
        on_progress: called in this process.

    Raises:
        PrepError: a job raised, or its process died. The other processes are ended at once; their finished tasks stay done.
    """
    on_progress = on_progress or (lambda items, num_bytes: None)
    if workers <= 1 or len(tasks) <= 1:
        yield from _run_here(job, tasks, describe, on_progress)
        return
    crew = _Crew(job, min(workers, len(tasks)), describe, on_progress)
    try:
        yield from crew.run(tasks)
    finally:
        crew.end()


def _run_here(job: Job[T], tasks: Sequence[int], describe: Describe, on_progress: OnProgress) -> Iterator[tuple[int, T]]:
    for task in tasks:
        current = c_longlong(-1)
        report = Report(current, on_progress)
        try:
            result = job(task, report)
        except Exception as error:
            raise PrepError(f"{describe(task, current.value)}: {_explain(error)}") from error
        report.flush()
        yield task, result


class _Worker:
    """A process, the pipe to it and what it is doing."""

    def __init__(self, context: multiprocessing.context.SpawnContext) -> None:
        self.pipe, self._other = context.Pipe()
        self.current = context.RawValue(c_longlong, -1)
        self.process: SpawnProcess = context.Process(target=_serve, args=(self._other, self.current), daemon=True)
        self.task: int | None = None

    def start(self) -> None:
        self.process.start()
        self._other.close()

    def give(self, task: int) -> None:
        self.task, self.current.value = task, -1
        with contextlib.suppress(BrokenPipeError):  # it is dead: the sentinel tells
            self.pipe.send(task)


class _Crew:
    def __init__(self, job: Job[Any], size: int, describe: Describe, on_progress: OnProgress) -> None:
        self._describe = describe
        self._on_progress = on_progress
        context = multiprocessing.get_context("spawn")
        self._workers = [_Worker(context) for _ in range(size)]
        started = []
        try:
            with _interrupt_ignored():  # the workers inherit it: an interrupt reaches the main process alone
                for worker in self._workers:
                    worker.start()
                    started.append(worker)
            body = bytes(ForkingPickler.dumps(job))
            for worker in self._workers:
                with contextlib.suppress(BrokenPipeError):
                    worker.pipe.send_bytes(body)
        except BaseException:
            self._workers = started
            self.end()
            raise

    def run(self, tasks: Sequence[int]) -> Iterator[tuple[int, Any]]:
        pending = list(reversed(tasks))
        left = len(pending)
        for worker in self._workers:
            worker.give(pending.pop())
        while left:
            ready = wait([end for worker in self._workers for end in (worker.pipe, worker.process.sentinel)])
            for worker in self._workers:
                if worker.pipe not in ready and worker.process.sentinel not in ready:
                    continue
                kind, *values = self._receive(worker)
                if kind == "progress":
                    self._on_progress(*values)
                    continue
                task = worker.task
                assert task is not None
                if kind == "error":
                    raise PrepError(f"{self._describe(task, worker.current.value)}: {values[0]}")
                left -= 1
                worker.task = None
                if pending:
                    worker.give(pending.pop())
                yield task, values[0]

    def _receive(self, worker: _Worker) -> Any:
        """Next message of a worker that has one or is dead."""
        try:
            if worker.pipe.poll():
                return worker.pipe.recv()
        except (EOFError, OSError):
            pass
        worker.process.join()
        where = "a worker" if worker.task is None else self._describe(worker.task, worker.current.value)
        code = worker.process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        hint = "; if memory ran out, use fewer --workers or smaller shards" if code == -signal.SIGKILL else ""
        raise PrepError(f"{where}: the worker process ended ({how}){hint}")

    def end(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()


def _serve(pipe: Connection, current: c_longlong) -> None:
    """Life of a worker."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the main process is gone
        job = pipe.recv()
        while True:
            task = pipe.recv()
            report = Report(current, lambda items, num_bytes: pipe.send(("progress", items, num_bytes)))
            try:
                result = job(task, report)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                pipe.send(("error", _explain(error)))
                continue
            report.flush()
            pipe.send(("result", result))


def _explain(error: Exception) -> str:
    """An expected error by its message; any other with the place it came from."""
    if isinstance(error, PrepError | OSError | ValueError):
        return str(error)
    return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"


@contextlib.contextmanager
def _interrupt_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
