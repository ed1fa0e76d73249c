"""Writes checkpoints in the background: a copy of the state in host memory is taken, and training goes on."""

from __future__ import annotations

import concurrent.futures
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any, NamedTuple

from nepa_dist.checkpoint.host_memory import HostMemory, HostMemoryError, available_bytes
from nepa_dist.checkpoint.manifest import as_json
from nepa_dist.checkpoint.portable import CheckpointError, Entries
from nepa_dist.checkpoint.store import CheckpointStore

_log = logging.getLogger(__name__)


class SaveResult(NamedTuple):
    """How the save of one step ended."""

    step: int
    path: Path | None
    """The checkpoint's folder; None if there is none."""
    problem: str | None
    """Why there is none; fit to print alone."""
    seconds: float
    """Time of the write in the background; 0 if there was none."""


class CheckpointWriter:
    """Copies a run's state to host memory and writes it while training goes on; one checkpoint in flight.

    Host memory holds one copy of the whole state from the first save to :meth:`close`. The state on disk is that of the moment
    of :meth:`start`. A process that is killed during a write leaves what :meth:`CheckpointStore.sweep` removes; one that ends
    in the normal way finishes the write first.

    A failed save is a :class:`SaveResult` with a problem. Any other exception of the write is raised by the next call of
    :meth:`poll`, :meth:`wait`, :meth:`start` or :meth:`close`.

    Args:
        store: where checkpoints go. Only this writer saves to it.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._memory = HostMemory()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write: Future[SaveResult] | None = None

    def start(
        self, step: int, entries: Entries, meta: Mapping[str, Any], *, expected_bytes: int | None = None
    ) -> SaveResult | None:
        """Wait for the write in flight, copy the state, and begin to write it.

        ``entries`` is consumed to its end whatever happens: making it may be a collective that other ranks take part in.

        Args:
            step: finished optimizer updates.
            entries: full tensors, parameter by parameter; they may change as soon as this returns.
            meta: JSON values to keep in the manifest.
            expected_bytes: size of the state, if known; checked against the free disk space before anything is written.

        Returns:
            The result of the earlier write; None if there was none or :meth:`poll` or :meth:`wait` gave it already. That there
            is not enough host memory for this one is known at once, and given by the next :meth:`poll` or :meth:`wait`.

        Raises:
            ValueError: ``meta`` is not JSON, or an entry is malformed.
        """
        stream = iter(entries)
        try:
            earlier = self.wait()
            values = as_json(meta)
            self._write = self._begin(step, stream, values, expected_bytes)
        finally:
            for _ in stream:
                pass
        return earlier

    def busy(self, timeout: float) -> bool:
        """Whether a write is still in flight after at most ``timeout`` seconds."""
        return self._write is not None and bool(concurrent.futures.wait([self._write], timeout).not_done)

    def poll(self) -> SaveResult | None:
        """The result of a write that has ended, once; None while it runs. Never blocks."""
        return self.wait() if self._write is not None and self._write.done() else None

    def wait(self) -> SaveResult | None:
        """Block until the write in flight has ended; its result, once. None if there is none."""
        if self._write is None:
            return None
        wait_for([self._write])
        write, self._write = self._write, None
        return write.result()

    def close(self) -> None:
        """Finish the write in flight and give the memory back. A problem that nobody asked for is logged."""
        try:
            result = self.wait()
            if result is not None and result.problem is not None:
                _log.warning("%s", result.problem)
        finally:
            self._thread.shutdown()
            self._memory.clear()

    def _begin(self, step: int, entries: Entries, meta: dict[str, Any], expected_bytes: int | None) -> Future[SaveResult]:
        try:
            copies = self._memory.copy(entries)
        except HostMemoryError as error:
            free = available_bytes()
            problem = (
                f"the checkpoint of step {step} is not saved: {error}, "
                f"and {'an unknown number' if free is None else f'{free:,}'} are free. Give the job more memory"
            )
            failed: Future[SaveResult] = Future()
            failed.set_result(SaveResult(step, None, problem, 0.0))
            return failed
        return self._thread.submit(self._save, step, copies, meta, expected_bytes)

    def _save(self, step: int, entries: Entries, meta: dict[str, Any], expected_bytes: int | None) -> SaveResult:
        """Runs in the thread."""
        start = time.perf_counter()
        path, problem = None, None
        try:
            path = self._store.save(step, entries, meta, expected_bytes=expected_bytes, copy=False)
        except CheckpointError as error:
            problem = str(error)
        return SaveResult(step, path, problem, time.perf_counter() - start)
