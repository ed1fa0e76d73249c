"""Hands the scalars of a run to every sink, and keeps training when a sink fails. Imports no torch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from nepa_dist.metrics import registry
from nepa_dist.metrics.metric import NUMBERED
from nepa_dist.metrics.sinks import Sink

MAX_CONSECUTIVE_FAILURES = 10
"""Writes in a row that may fail before a sink is used no more."""


class Meter:
    """The one place that the loop reports to.

    A sink that raises never stops training: the failure is counted in ``sink_failures_total.<sink>``, which all sinks receive
    whenever it changed; the first failure of a sink is reported on the others, and after ten failed writes in a row the sink is
    used no more. Use from one thread.

    Args:
        sinks: where values go; their names differ and are in ``registry.SINKS``.
        failed: names of sinks that could not even be opened; they count as one failure each.

    Raises:
        KeyError: a sink's name is not in the registry.
        ValueError: two sinks have the same name.
    """

    def __init__(self, sinks: Sequence[Sink], *, failed: Sequence[str] = ()) -> None:
        self._sinks = list(sinks)
        self._failures = {sink.name: 0 for sink in sinks}
        if len(self._failures) != len(self._sinks):
            raise ValueError(f"two sinks have the same name: {[sink.name for sink in sinks]}")
        for name in self._failures:
            registry.lookup(_failure_key(name))
        self._reported: dict[str, int] = {}
        self._consecutive = dict(self._failures)
        self._failures |= dict.fromkeys(failed, 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Pass the values of one step to every sink; those of single ranks and nodes go to the endpoint alone.

        Args:
            step: optimizer steps done.
            values: numbers by registry key.

        Raises:
            KeyError: a key is not in the registry; no sink has got anything then.
        """
        for key in values:
            registry.lookup(key)
        row = {key: float(value) for key, value in values.items()}
        changed = {name: count for name, count in self._failures.items() if self._reported.get(name) != count}
        row |= {_failure_key(name): float(count) for name, count in changed.items()}
        self._reported |= changed
        of_run = {key: value for key, value in row.items() if registry.lookup(key)[0].label not in NUMBERED}
        for sink in self._working():
            if self._try(sink, partial(sink.write, step, row if sink.name == "prometheus" else of_run)):
                self._consecutive[sink.name] = 0

    def event(self, message: str) -> None:
        """Pass a message for people to every sink."""
        for sink in self._working():
            self._try(sink, partial(sink.event, message))

    def close(self) -> None:
        """Close every sink, also those that are used no more."""
        for sink in self._sinks:
            self._try(sink, sink.close)

    def _working(self) -> list[Sink]:
        return [sink for sink in self._sinks if self._consecutive[sink.name] < MAX_CONSECUTIVE_FAILURES]

    def _try(self, sink: Sink, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:
            self._count_failure(sink, error)
            return False
        return True

    def _count_failure(self, sink: Sink, error: Exception) -> None:
        self._failures[sink.name] += 1
        self._consecutive[sink.name] += 1
        what = f"{type(error).__name__}: {error}"
        if self._failures[sink.name] == 1:
            self._report(sink, f"metrics sink {sink.name} failed ({what}); training goes on, further failures are counted")
        if self._consecutive[sink.name] == MAX_CONSECUTIVE_FAILURES:
            self._report(sink, f"metrics sink {sink.name} failed {MAX_CONSECUTIVE_FAILURES} times in a row and is off ({what})")

    def _report(self, failed: Sink, message: str) -> None:
        """Tell the other sinks, and stderr unless the console does so already."""
        told = [sink.name for sink in self._working() if sink is not failed and self._try(sink, partial(sink.event, message))]
        if "console" not in told:
            with contextlib.suppress(OSError, ValueError):  # stderr is gone or closed
                print(message, file=sys.stderr)


def _failure_key(sink_name: str) -> str:
    return f"sink_failures_total.{sink_name}"
