"""Saves the state of a run: all ranks give their shards, the main one copies them to the host and writes beside training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from nepa_dist.checkpoint.writer import CheckpointWriter, SaveResult
from nepa_dist.data.augment import AUGMENT_VERSION
from nepa_dist.data.classes import known_names
from nepa_dist.reporting import Reporter
from nepa_dist.run import Run
from nepa_dist.run_folder import versions


class Saves(NamedTuple):
    """Saves that ended on this rank; only the main one writes."""

    written: int = 0
    failed: int = 0


class Saver:
    """Takes checkpoints of a run; one is in flight at most.

    Args:
        run: what is saved.
        reporter: told how long the loop stood still, how long the disk took, and what went wrong.
        beat: called again and again while the loop waits for the disk, for at most ``engine.timeout_seconds``.
    """

    def __init__(self, run: Run, reporter: Reporter, beat: Callable[[], None]) -> None:
        self._run, self._reporter, self._beat = run, reporter, beat
        self._writer = CheckpointWriter(run.store) if run.world.is_main else None
        self._ended = Saves()

    def start(self) -> None:
        """Wait for the save before it, copy the state as it is now and begin to write it. A collective."""
        run, start = self._run, time.perf_counter()
        self._wait_for_the_disk()
        entries = run.engine.named_state()
        if self._writer is None:
            for _ in entries:  # takes part in the collectives
                pass
        else:
            meta = {
                # Whoever reads this continues from a save that did not fail.
                "state": run.state.to_dict() | {"consecutive_checkpoint_failures": 0},
                "config": run.config.model_dump(mode="json"),
                "class_names": known_names(run.config, run.container),
                "config_digest": run.config.digest(),
                "data_fingerprint": run.container.fingerprint,
                "augment_version": AUGMENT_VERSION,
                "world_size": run.world.world_size,
                "versions": versions(),
            }
            self._account(self._writer.start(run.state.step, entries, meta, expected_bytes=_checkpoint_bytes(run)))
        self._reporter.stalled(time.perf_counter() - start)

    def take(self) -> Saves:
        """Saves that have ended on this rank since the last call. Never blocks."""
        if self._writer is not None:
            self._account(self._writer.poll())
        ended, self._ended = self._ended, Saves()
        return ended

    def wait(self) -> bool:
        """Wait for the save in flight; returns on all ranks whether it is on disk."""
        start = time.perf_counter()
        self._wait_for_the_disk()
        saved = True
        if self._writer is not None:
            result = self._writer.wait()
            self._account(result)
            saved = result is not None and result.problem is None
        saved, failed = self._run.world.gather((saved, self._ended.failed))[0]
        self._run.state.checkpoint_failures += failed
        self._ended = Saves()
        self._reporter.stalled(time.perf_counter() - start)
        return saved

    def _wait_for_the_disk(self) -> None:
        """Wait for the write in flight, all ranks together: each collective is short, and the watchdog sees life."""
        start, timeout = time.monotonic(), 0.05
        while self._run.world.gather(self._writer is not None and self._writer.busy(timeout))[0]:
            timeout = min(2 * timeout, 2.0)
            if time.monotonic() - start < self._run.config.engine.timeout_seconds:
                self._beat()

    def close(self) -> None:
        """Finish the save in flight and free the copy of the state."""
        if self._writer is not None:
            self._writer.close()

    def _account(self, result: SaveResult | None) -> None:
        if result is None:
            return
        if result.problem is None:
            self._ended = self._ended._replace(written=self._ended.written + 1)
            size = sum(file.stat().st_size for file in result.path.iterdir()) if result.path else 0
            self._reporter.saved(result.step, result.seconds, size)
        else:
            self._ended = self._ended._replace(failed=self._ended.failed + 1)
            self._reporter.event(f"checkpoint at step {result.step} failed: {result.problem}")


def _checkpoint_bytes(run: Run) -> int:
    """Size of a checkpoint: weight, two moments and the average, fp32."""
    return run.num_parameters * 4 * (3 if run.config.optim.ema_decay is None else 4)
