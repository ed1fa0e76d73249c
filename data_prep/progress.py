"""How far the work is: a bar on a terminal, a line every half minute elsewhere; both on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.files import human_bytes

_LINE_SECONDS = 30.0


class Meter:
    """Counts samples and bytes while it is entered.

    Args:
        label: what is being done.
        total: samples, or whatever is counted, to do.
        quiet: show nothing.
        unit: what is counted.
    """

    def __init__(self, label: str, total: int, *, quiet: bool = False, unit: str = "images") -> None:
        self.samples = 0
        self.bytes = 0
        self._label, self._total, self._quiet, self._unit = label, total, quiet, unit
        self._started = self._shown = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._line = self._bar.add_task(label, total=total, rate="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        elif not self._quiet and self.samples:
            print(self.line(), file=sys.stderr, flush=True)

    def add(self, samples: int, num_bytes: int) -> None:
        """Some more is done."""
        self.samples += samples
        self.bytes += num_bytes
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._line, completed=self.samples, rate=self._rate())
        elif not self._quiet and now - self._shown >= _LINE_SECONDS:
            self._shown = now
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """Where the work stands, in one line."""
        seconds = time.monotonic() - self._started
        left = seconds / self.samples * (self._total - self.samples) if self.samples else 0.0
        clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"
        return f"{self._label}: {self.samples:,} of {self._total:,} {self._unit}, {self._rate()}, {clock} left"

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-3)
        short = "img" if self._unit == "images" else self._unit
        return f"{self.samples / seconds:,.0f} {short}/s, {human_bytes(self.bytes / seconds)}/s"
