"""Places that metrics are written to: a JSONL file, the terminal, a text log. Imports no torch.

The JSONL file is the record of a run: one object per call, ``{"step": ..., "time": unix seconds, key: value, ...}``, floats
with all their digits. JSON has no NaN: non-finite values are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which
:func:`read_curve` turns back into floats.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress


class Sink(Protocol):
    """Takes the values of logged steps and messages to people; ``name`` is a value in ``registry.SINKS``."""

    name: str

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of one step, keyed as in the registry. May raise."""

    def event(self, message: str) -> None:
        """Take a message; a sink without readers ignores it. May raise."""

    def close(self) -> None:
        """Write what is pending and give everything back."""


class JsonlSink:
    """Append one line per call to a JSONL file whose steps never go back, also over restarts.

    Opening the file takes out what a resumed run will do again: lines after ``resume_step``, and lines cut off by a crash,
    are moved to the end of ``<stem>.superseded.jsonl`` beside it (``superseded_step`` is the last step of them). The file is
    replaced in one step, so a crash while opening loses nothing. A line that cannot be written in full is taken back.

    Args:
        path: the file; made if missing, with its folder.
        resume_step: the step of the checkpoint that the run continues from, 0 for a new run.

    Raises:
        OSError: the file cannot be read or written.
    """

    name = "jsonl"

    def __init__(self, path: str | Path, resume_step: int) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.superseded_step = resume_step
        self._supersede(resume_step)
        self._file = self.path.open("ab", buffering=0)
        self._last_step = resume_step

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line.

        Raises:
            ValueError: ``step`` is before a step already written.
            OSError: the line could not be written; the file is as before.
        """
        if step < self._last_step:
            raise ValueError(f"{self.path}: step {step} comes after step {self._last_step}")
        row: dict[str, float | str] = {"step": step, "time": round(time.time(), 3)}
        row |= {key: _to_json(value) for key, value in values.items() if key not in row}
        self._append(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._last_step = step

    def event(self, message: str) -> None:
        """Messages are not part of the curve."""

    def close(self) -> None:
        """Make the file durable and close it."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def _append(self, line: bytes) -> None:
        start = self._file.seek(0, os.SEEK_END)
        rest = memoryview(line)
        try:
            while rest:  # a write may stop early on a full disk
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(start)
            raise

    def _supersede(self, resume_step: int) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        lines = [line for line in content.split(b"\n") if line.strip()]
        kept: list[bytes] = []
        moved: list[bytes] = []
        for line in lines:
            step = _step_of(line)
            (kept if step is not None and step <= resume_step else moved).append(line)
            self.superseded_step = max(self.superseded_step, step or 0)
        if moved:
            _append_durably(self.path.with_suffix(f".superseded{self.path.suffix}"), moved)
        remaining = b"".join(line + b"\n" for line in kept)
        if remaining != content:
            _replace_durably(self.path, remaining)


def read_curve(path: str | Path) -> list[dict[str, float]]:
    """Read a JSONL file of metrics; a last line that was cut off by a crash is left out.

    Returns:
        One mapping per line, in order: ``step`` (int), ``time`` (Unix seconds) and the metrics of that line.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line other than the last is not a JSON object with a step; the message names file and line.
    """
    lines = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if _step_of(line) is None:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not a JSON object with a step")
        row = json.loads(line)
        rows.append({key: float(value) if isinstance(value, str) else value for key, value in row.items()})
    return rows


class ConsoleSink:
    """Show progress: a bar on a terminal, else one plain line per logged step.

    Args:
        total_steps: the last step of the run.
        start_step: where this process starts; the bar begins there.
        stream: where to write; default: stderr.
    """

    name = "console"

    def __init__(self, total_steps: int, start_step: int, stream: TextIO | None = None) -> None:
        self._total = total_steps
        self._stream = stream or sys.stderr
        self._bar = _progress_bar(total_steps, start_step, self._stream) if self._stream.isatty() else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Show one step; values that the line has no place for are left out."""
        fields = _format_fields(values)
        if not fields:
            return
        if self._bar is not None:
            shown = [fields.pop("eta_seconds", ""), *fields.values()]  # the end is cut off where the terminal is narrow
            self._bar.start()
            self._bar.update(self._bar.task_ids[0], completed=step, fields="  ".join(filter(None, shown)), refresh=True)
        else:
            print(_format_line(step, self._total, fields), file=self._stream, flush=True)

    def event(self, message: str) -> None:
        """Print a message, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            print(message, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()


class LogSink:
    """Append plain lines with the local time to a text file.

    Args:
        path: the file; made if missing, with its folder.
        total_steps: the last step of the run.

    Raises:
        OSError: the file cannot be opened.
    """

    name = "log"

    def __init__(self, path: str | Path, total_steps: int) -> None:
        self._total = total_steps
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one step; values that the line has no place for are left out."""
        if fields := _format_fields(values):
            self.event(_format_line(step, self._total, fields))

    def event(self, message: str) -> None:
        """Append a message."""
        print(time.strftime("%Y-%m-%d %H:%M:%S"), message, file=self._file)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _format_line(step: int, total: int, fields: Mapping[str, str]) -> str:
    return "  ".join([f"step {step:>{len(str(total))}}/{total}", *fields.values()])


def _format_fields(values: Mapping[str, float]) -> dict[str, str]:
    """The values that a person watches, as words by their key; those not given are left out."""
    fields = {}
    if "loss" in values:
        fields["loss"] = f"loss {values['loss']:.4f}"
    if "grad_norm" in values:
        fields["grad_norm"] = f"grad_norm {values['grad_norm']:.3g}"
    if "lr" in values:
        mantissa, _, exponent = f"{values['lr']:.2e}".partition("e")
        fields["lr"] = f"lr {mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if exponent else f"lr {mantissa}"
    if "images_per_second" in values:
        speed = values["images_per_second"]
        fields["images_per_second"] = f"{speed:.0f} img/s" if speed >= 10 else f"{speed:.2g} img/s"
    if values.get("step_seconds", 0) > 0 and "data_wait_seconds" in values:
        share = values["data_wait_seconds"] / values["step_seconds"]
        fields["data_wait_seconds"] = f"data wait {100 * share:.0f} %"
    if values.get("applied", 1) == 0:
        fields["applied"] = "SKIPPED"
    if "eta_seconds" in values:
        eta = values["eta_seconds"]
        fields["eta_seconds"] = f"eta {timedelta(seconds=round(eta)) if math.isfinite(eta) else '?'}"
    return fields


def _progress_bar(total: int, start: int, stream: TextIO) -> Progress | None:
    """A bar with one task, or None on a terminal that cannot move its cursor.

    It redraws only when told to: a thread of its own could hold a lock while a loader worker is forked.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    console = Console(file=stream)
    if not console.is_terminal or console.is_dumb_terminal:
        return None
    progress = Progress(
        TextColumn("step {task.completed}/{task.total}", table_column=Column(no_wrap=True, min_width=6 + 2 * len(str(total)))),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=5)),
        TextColumn("{task.fields[fields]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console,
        auto_refresh=False,
        expand=True,
    )
    progress.add_task("", total=total, completed=start, fields="")
    return progress


def _to_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _step_of(line: bytes) -> int | None:
    """The step of a JSONL line; None if the line is not a whole JSON object with a step."""
    try:
        row: Any = json.loads(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None


def _append_durably(path: Path, lines: Iterable[bytes]) -> None:
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # an earlier append was cut off
                file.write(b"\n")
        file.write(b"".join(line + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def _replace_durably(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
