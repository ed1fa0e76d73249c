"""``status``: one line per run, from the run folders and one look at the queue. Imports no torch."""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from jobs import scheduler
from jobs.options import TASKS
from jobs.runs import JOB, named_run, newest_checkpoint, read_json, read_outcome, read_progress, tail_rows
from jobs.scheduler import QueueEntry, SchedulerError
from nepa_dist.config import RESERVED_NAMES, nearest

_MAX_DEPTH = 3
_HEAD = ("run", "state", "step", "loss", "images/s", "left", "checkpoint", "starts", "job")


class Run(NamedTuple):
    """What is known of one run."""

    folder: Path
    state: str
    """One word, then why."""
    job: str
    """Number of its newest job; "" if it has none."""
    starts: int


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python jobs/submit.py status", description="One line per run: where it stands, and why.", allow_abbrev=False
    )
    parser.add_argument("folder", nargs="*", type=named_run, help="of runs, pipelines or sweeps; default: runs")
    args = parser.parse_args(argv)
    found = {folder: list(find_runs(folder)) for folder in args.folder or [Path("runs")]}
    for folder in (folder for folder, runs in found.items() if not runs):
        print(no_run(folder), file=sys.stderr)
    if folders := list(dict.fromkeys(run for runs in found.values() for run in runs)):
        runs, remark = look(folders)
        print("\n".join(table(runs)))
        if remark:
            print(remark, file=sys.stderr)
    return 0 if all(found.values()) else 2


def no_run(folder: Path) -> str:
    """Says that there is no run in a folder, and which name may have been meant."""
    if os.path.lexists(folder) and not os.access(folder, os.R_OK | os.X_OK):
        return f"no permission to look into {folder}"
    beside = folder.parent if folder.parent.name else Path("runs")
    try:
        names = [entry.name for entry in os.scandir(beside) if entry.is_dir()]
    except OSError:
        names = []
    hint = "" if os.path.lexists(folder) else nearest(folder.name, names)
    return f"no runs in {folder}{hint}"


def find_runs(folder: Path, depth: int = _MAX_DEPTH) -> Iterator[Path]:
    """Folders of runs at or below a folder: first those in it, in the order of the stages of a pipeline, then by name."""
    if os.path.exists(folder / "config.yaml"):  # False also where it may not be looked for
        yield folder
        return
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return
    inner = [folder / name for name in names if depth and name not in RESERVED_NAMES]
    for found in sorted(inner, key=lambda path: (_stage(path), path.name)):
        yield from find_runs(found, depth - 1)


def _stage(folder: Path) -> int:
    """Place of a run's task among the stages of a pipeline; what is no run comes last."""
    try:
        with (folder / "config.yaml").open(encoding="utf-8", errors="replace") as file:
            task = file.readline().removeprefix("task:").strip()  # the first setting of a resolved configuration
    except FileNotFoundError:
        return len(TASKS) + 1
    except OSError:
        task = ""
    return TASKS.index(task) if task in TASKS else len(TASKS)


def look(folders: Sequence[Path]) -> tuple[list[Run], str]:
    """What is known of runs, and what could not be asked."""
    numbers = {folder: str(read_json(folder / JOB / "job.json").get("id", "")) for folder in folders}
    queue: dict[str, QueueEntry] = {}
    over: dict[str, str] = {}
    remark = ""
    if any(numbers.values()):
        try:
            queue = scheduler.queue()
            open_ends = [number for folder, number in numbers.items() if number and number not in queue and _has_no_end(folder)]
            over = scheduler.final_states(open_ends)
        except SchedulerError as error:
            remark = f"SLURM cannot be asked ({error}); states are from the run folders"
    return [_look_at(folder, number, queue, over) for folder, number in numbers.items()], remark


def table(runs: Sequence[Run]) -> list[str]:
    """Aligned lines, the head first."""
    rows = [_HEAD, *map(_row, runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def attempts(folder: Path) -> list[dict[str, object]]:
    """The record of a run's jobs, oldest first (its newest part, if it is very long)."""
    return list(tail_rows(folder / JOB / "attempts.jsonl"))[::-1]


def _row(run: Run) -> tuple[str, ...]:
    progress, newest = read_progress(run.folder), newest_checkpoint(run.folder)
    running = run.state.startswith("running")
    step = "" if progress.step is None else f"{progress.step:,}" + (f"/{progress.total:,}" if progress.total else "")
    left = str(timedelta(seconds=round(progress.eta_seconds))) if running and progress.eta_seconds is not None else ""
    try:
        name = str(run.folder.relative_to("runs"))
    except ValueError:
        name = str(run.folder)
    return (
        name,
        run.state + _silence(progress.time if running else 0.0, progress.eta_seconds),
        step,
        "" if progress.loss is None else f"{progress.loss:.4f}",
        "" if progress.images_per_second is None else f"{progress.images_per_second:.0f}",
        left,
        "" if newest is None else f"{newest:,}",
        str(run.starts or ""),
        run.job,
    )


def _silence(last: float, eta: float | None) -> str:
    """Says so if a running run has logged nothing for long."""
    minutes = (time.time() - last) / 60
    return f", silent for {minutes:.0f} min" if last and eta and minutes > 15 else ""


def _look_at(folder: Path, number: str, queue: Mapping[str, QueueEntry], over: Mapping[str, str]) -> Run:
    record, outcome = attempts(folder), read_outcome(folder)
    starts = sum(row.get("event") == "start" for row in record)
    ends = [row for row in record if row.get("event") in ("end", "lost")]
    last = _reason(ends[-1]) if ends else ""
    if number in queue:
        entry = queue[number]
        if entry.state == "RUNNING":
            state = f"running on {entry.nodes}" + (f" after {last}" if last else "")
        elif starts:
            state = f"comes back after {last or 'a lost start'} ({entry.state.lower()}: {entry.reason})"
        else:
            state = f"waiting ({entry.reason})"
    elif holder := running_here(folder):
        state = f"running ({holder})"
    elif outcome is not None and outcome.kind == "finished":
        state = "finished"
    elif record and record[-1].get("event") == "end":
        more = outcome.detail if outcome else str(record[-1].get("detail", ""))
        state = f"ended: {last}" + ("" if more == last else _detail(more))
    elif number in over:
        state = f"ended: {_in_words(over[number])}"
    elif outcome is not None:
        state = f"ended: {outcome.kind}{_detail(outcome.detail)}"
    else:
        state = "killed" if read_progress(folder).step is not None else "not started"
    return Run(folder, state, number, starts or read_progress(folder).restarts + (outcome is not None))


def _reason(row: Mapping[str, object]) -> str:
    """How a start ended; a stop says by which signal."""
    why, detail = str(row.get("why", "")), str(row.get("detail", ""))
    return detail if why == "stopped" and detail else _in_words(why)


def _in_words(state: str) -> str:
    """A state of SLURM such as NODE_FAIL in small letters; another text as it is."""
    return state.lower().replace("_", " ") if re.fullmatch("[A-Z_]+", state) else state


def _detail(text: str) -> str:
    line = next(iter(text.splitlines()), "")
    return f" ({textwrap.shorten(line, 70, placeholder='...')})" if line else ""


def _has_no_end(folder: Path) -> bool:
    """Whether the record does not say how the newest job ended."""
    return next((row.get("event") != "end" for row in tail_rows(folder / JOB / "attempts.jsonl")), True)


def running_here(folder: Path) -> str:
    """Who trains in a folder, from the lock that its rank 0 holds; "" if nobody does."""
    path = folder / ".lock"
    try:
        with path.open("r+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return file.read().strip() or "by whom is not known"
    except OSError:
        pass
    return ""
