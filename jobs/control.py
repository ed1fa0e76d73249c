"""What can be done with a run that is there: ``logs``, ``cancel``, ``stop``, ``resume``. Imports no torch."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jobs import scheduler
from jobs.launch import LaunchError, launch_local, resubmit
from jobs.runs import JOB, is_finished, named_run, newest_checkpoint, read_json
from jobs.scheduler import SchedulerError
from jobs.status import find_runs, no_run, running_here
from nepa_dist.config import Config, ConfigError
from nepa_dist.config_load import load_config
from nepa_dist.guard import EXIT_AGAIN


class ControlError(ValueError):
    """It cannot be done; the message says why."""


def main(command: str, argv: Sequence[str]) -> tuple[int, list[str]]:
    """One of the commands; returns the exit code, and problems."""
    args = _parser(command).parse_args(argv)
    try:
        if command == "logs":
            return show_logs(args), []
        if problems := [no_run(folder) for folder in args.run if next(find_runs(folder), None) is None]:
            return 2, problems
        if command == "resume":
            return resume_all(args.run), []
        for folder in args.run:
            end_runs(folder, save=command == "stop" and args.save)
    except (ControlError, ConfigError, LaunchError, SchedulerError) as error:
        return 2, [str(error)]
    return 0, []


def end_runs(folder: Path, *, save: bool) -> None:
    """:func:`end_run` for all that go on in a folder; says what was done.

    Raises:
        ControlError: none does.
        SchedulerError: SLURM refuses.
    """
    ended, problems = 0, []
    for run in find_runs(folder):
        try:
            print(end_run(run, save=save), flush=True)
            ended += 1
        except ControlError as error:
            problems.append(str(error))
    if not ended:
        raise ControlError("; ".join(problems))


def end_run(run: Path, *, save: bool) -> str:
    """End a run so that it does not come back; returns a sentence about what was done.

    Args:
        run: its folder.
        save: let it save first; otherwise what it has done since its newest checkpoint is lost.

    Raises:
        ControlError: nothing runs there that can be reached from here.
        SchedulerError: SLURM refuses.
    """
    number = str(read_json(run / JOB / "job.json").get("id", ""))
    entry = scheduler.queue().get(number) if number else None
    if entry is not None:
        hold(run)
        if save and entry.state == "RUNNING":
            scheduler.cancel(number, "USR2")
            return f"{run}: job {number} was told to save and end; it does not come back by itself"
        scheduler.cancel(number)
        return f"{run}: job {number} is cancelled"
    holder = running_here(run)
    if not holder:
        raise ControlError(f"nothing runs in {run}")
    match = re.fullmatch(r"pid (\d+) on (.+)", holder)
    if match is None or match[2] != os.uname().nodename:
        raise ControlError(f"{run} is in use by {holder}, which cannot be reached from here")
    os.kill(int(match[1]), signal.SIGTERM)
    return f"{run}: {holder} was told to save and end"


def hold(run: Path) -> None:
    """The job of a run shall not come back, however it ends."""
    (run / JOB).mkdir(mode=0o700, exist_ok=True)
    (run / JOB / "hold").touch()


def resume_all(runs: Sequence[Path]) -> int:
    """:func:`resume` one run after the other, until one is told to stop; returns the highest exit code.

    Raises:
        ControlError: a folder is not that of a run; then none is resumed.
    """
    for run in runs:
        if not os.path.exists(run / "config.yaml"):
            raise ControlError(f"{run} is not the folder of a run: give the command of the pipeline or sweep again")
    code = 0
    for run in runs:
        code = max(code, resume(run))
        if code == EXIT_AGAIN:
            break
    return code


def resume(run: Path) -> int:
    """Start a run again with its own settings and, as a job, its own code; returns the exit code.

    Raises:
        ControlError: it runs.
        LaunchError: it could not be started.
    """
    config = read_config(run)
    if is_finished(run):
        print(f"this run is finished: {run} holds all {newest_checkpoint(run)} steps; nothing to do")
        return 0
    if holder := running_here(run):
        raise ControlError(f"{run} is running ({holder})")
    if config.cluster.launcher == "local":
        return launch_local(config)
    number = str(read_json(run / JOB / "job.json").get("id", ""))
    if number in scheduler.queue():
        raise ControlError(f"job {number} of {run} waits or runs already")
    number, code = resubmit(config)
    print(f"submitted job {number}: {run}, with the code {code.name} it had before")
    return 0


def read_config(run: Path) -> Config:
    """The configuration of a run, at the place where it lies now.

    Raises:
        ConfigError: it cannot be read.
    """
    place = {"run_root": str(run.absolute().parent), "name": run.absolute().name}
    return load_config([run / "config.yaml"]).model_copy(update=place)


def show_logs(args: argparse.Namespace) -> int:
    """Print the end of what a run said, and with ``--follow`` what it says from now on.

    Raises:
        ControlError: there is nothing to show.
    """
    files = log_files(args.run, args.rank)
    if not args.follow and not any(path.exists() for path in files):
        raise ControlError(f"nothing is written yet: {', '.join(map(str, files))}")
    position = 0
    for path in files:
        if path.exists():
            lines, position = _last_lines(path, args.lines)
            print("\n".join([f"==> {path}", *lines]), flush=True)
    if args.follow:
        follow(files[-1], position if files[-1].exists() else 0)
    return 0


def log_files(run: Path, rank: int | None) -> list[Path]:
    """What the batch script of the newest job said, then what a rank said.

    Raises:
        ControlError: the folder is not that of a run.
    """
    if not os.path.exists(run / "config.yaml"):
        raise ControlError(f"{run} is not the folder of a run" if os.path.lexists(run) else no_run(run))
    facts = read_json(run / JOB / "job.json")
    own = run / "log.txt" if rank is None and not facts else run / "logs" / f"rank-{rank or 0}.txt"
    batch = [Path(str(facts["log"]))] if rank is None and "log" in facts else []
    return [*batch, own]


def follow(path: Path, position: int) -> None:
    """Print what is in a file from a byte on, and what is added to it, for ever."""
    while True:
        size = path.stat().st_size if path.exists() else 0
        if size < position:  # it was begun anew
            position = 0
        if size > position:
            with path.open("rb") as file:
                file.seek(position)
                content = file.read()
            position += len(content)
            sys.stdout.write(content.decode(errors="replace"))
            sys.stdout.flush()
        time.sleep(0.5)


def _last_lines(path: Path, count: int) -> tuple[list[str], int]:
    """The last lines of a file, and the byte where they end."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 400 * count))
        content = file.read()
    return content.decode(errors="replace").splitlines()[-count:], max(0, size - 400 * count) + len(content)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _parser(command: str) -> argparse.ArgumentParser:
    what = {
        "logs": "What a run says.",
        "cancel": "End runs at once, for good.",
        "stop": "End runs for good after they have saved.",
        "resume": "Start runs again that have ended, with their own settings and code.",
    }
    parser = argparse.ArgumentParser(prog=f"python jobs/submit.py {command}", description=what[command], allow_abbrev=False)
    if command == "logs":
        parser.add_argument("run", type=named_run, help="folder of the run")
        parser.add_argument("-f", "--follow", action="store_true", help="go on with what it says from now on")
        parser.add_argument("--rank", type=int, metavar="R", help="of one rank; default: of rank 0, after those of the job")
        parser.add_argument("-n", "--lines", type=_positive, default=30, metavar="N", help="of the end (30)")
        return parser
    of_several = "" if command == "resume" else ", pipeline or sweep"
    parser.add_argument("run", nargs="+", type=named_run, help=f"folder of a run{of_several}")
    if command == "stop":
        save = "the default; --no-save is cancel"
        parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help=save)
    return parser
