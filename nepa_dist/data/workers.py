"""Worker processes that fill batches in a :class:`nepa_dist.data.ring.Ring`: deaf to signals, and they always end.

Batch k is made by worker k modulo their number. Processes, not threads: for crops the two measured alike, per image and in what
they left to a busy trainer, but a transform in Python would take the interpreter lock from the trainer, and only a process that
is stuck in a read can be killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Protocol

import torch

from nepa_dist.data.batch import Batch, BatchShape, Filled, Pixels, make_batch, new_pixels
from nepa_dist.data.containers import DataError
from nepa_dist.data.ring import Ring

_SPARE_SLOTS = 2  # the batch in use, and the one before it
_ORPHAN_SECONDS = 1.0  # how often an idle worker looks whether its trainer is still there
# The trainer alone decides when to stop; a scheduler and a terminal signal the whole process group.
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class BatchSource(Protocol):
    """What is in batch k. It is forked, so it must hold no open connection and no thread."""

    @property
    def shape(self) -> BatchShape:
        """Room that each batch needs."""

    def __len__(self) -> int:
        """Number of batches."""

    def fill(self, k: int, pixels: Pixels) -> Filled:
        """Make batch ``k`` in ``pixels``. Raises DataError with a message for the user."""


def batches_here(source: BatchSource, *, pin_memory: bool) -> Iterator[Batch]:
    """All batches of a source, made by this process when they are asked for."""
    for k in range(len(source)):
        pixels = new_pixels(source.shape, pin=pin_memory)
        yield make_batch(pixels, source.fill(k, pixels), pin=pin_memory)


class WorkerPool:
    """Makes the batches of a source in worker processes, ahead of their use. The workers start at once.

    Args:
        source: of the batches.
        num_workers: processes, at least 1.
        prefetch: batches that each worker keeps ready.
        pin_memory: give batches in page-locked memory.
    """

    def __init__(self, source: BatchSource, num_workers: int, prefetch: int, *, pin_memory: bool) -> None:
        self._source = source
        self._pin = pin_memory
        self._next_task = 0
        self._ring = Ring(num_workers * prefetch + _SPARE_SLOTS, source.shape)
        self._workers: list[_Worker] = []
        try:
            with _blocked_signals():
                for _ in range(num_workers):
                    self._workers.append(_Worker(source, self._ring))
            for _ in range(prefetch):
                for worker in self._workers:
                    self._assign(worker, self._ring.take())
        except BaseException:
            self.close()
            raise

    def batches(self) -> Iterator[Batch]:
        """All batches in order, once.

        Raises:
            DataError: the data cannot be used.
            RuntimeError: a worker died or met an error that is not one of the data; the message says which.
        """
        if self._pin:
            self._ring.pin()
        for k in range(len(self._source)):
            worker = self._workers[k % len(self._workers)]
            slot, filled = worker.result()
            yield self._batch(worker, slot, filled)

    def close(self) -> None:
        """End the workers, at once: they have nothing to lose. Can be called more than once."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()

    def _assign(self, worker: _Worker, slot: int | None) -> None:
        if self._next_task < len(self._source) and slot is not None:
            worker.start(self._next_task, slot)
            self._next_task += 1

    def _batch(self, worker: _Worker, slot: int, filled: Filled) -> Batch:
        """The finished batch in ``slot``; its worker gets the next task."""
        more = self._next_task < len(self._source)
        lend = self._ring.pinned or not self._pin
        free = self._ring.take() if lend and more else None
        if lend and (free is not None or not more):
            self._assign(worker, free)
            return make_batch(self._ring.lend(slot), filled, pin=self._pin)
        # A copy where memory could not be pinned, or where the user keeps so many batches that the worker would have no slot.
        copy, original = new_pixels(self._source.shape, pin=self._pin), self._ring.pixels(slot)
        copy.images[:] = original.images
        if copy.masks is not None:
            copy.masks[:] = original.masks
        self._assign(worker, slot)
        return make_batch(copy, filled, pin=self._pin)


class _Worker:
    """One process, seen from the trainer."""

    def __init__(self, source: BatchSource, ring: Ring) -> None:
        self._tasks: deque[int] = deque()
        # Forked, so that workers share the container's memory and inherit the blocked signals.
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(source, ring, theirs, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()  # no later worker may keep it open: its end tells that this worker died

    def start(self, k: int, slot: int) -> None:
        """Have batch ``k`` made in ``slot``."""
        try:
            self._connection.send((k, slot))
        except OSError:
            raise RuntimeError(self._death()) from None
        self._tasks.append(slot)

    def result(self) -> tuple[int, Filled]:
        """Wait for the oldest task: its slot and what is there now."""
        try:
            result = self._connection.recv() if self._connection in wait([self._connection, self._process.sentinel]) else None
        except (EOFError, OSError):
            result = None
        if result is None:
            raise RuntimeError(self._death())
        if isinstance(result, DataError):
            raise result
        if isinstance(result, str):
            raise RuntimeError(f"loader worker (pid {self._process.pid}) failed:\n{result}")
        return self._tasks.popleft(), result

    def kill(self) -> None:
        """End it and wait for its end."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _death(self) -> str:
        # A dying process closes its files before its parent can see that it is dead.
        self._process.join(1.0)
        code = self._process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = "; a frequent cause is too little memory" if code == -signal.SIGKILL else ""
        return f"loader worker (pid {self._process.pid}) {how}{hint}"


def _work(source: BatchSource, ring: Ring, connection: Connection, trainer: int) -> None:
    """What a worker does until its trainer is gone."""
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED_SIGNALS)
    torch.set_num_threads(1)
    result: Filled | DataError | str
    while True:
        while not connection.poll(_ORPHAN_SECONDS):
            if os.getppid() != trainer:
                return
        try:
            k, slot = connection.recv()
            try:
                result = source.fill(k, ring.pixels(slot))
            except DataError as error:
                result = error
            except Exception:
                result = traceback.format_exc()
            connection.send(result)
        except (EOFError, OSError):  # the trainer has gone
            return


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Hold signals back while workers start: they inherit the block until they have begun to ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
