"""The command line: check everything, then start a run on this machine, or print what it would be.

Imports no torch, so that mistakes are answered at once. All problems are found before anything starts and are printed as one
list, exit code 2. The same command again resumes the same run: what happens is decided by what its folder holds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: the folder above holds both packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs import control, doctor_nodes, pipeline, probe, status, sweep
from jobs.checks import Checked, check_stage
from jobs.cluster import USER_ERROR
from jobs.findings import Finding, counted, table
from jobs.launch import LaunchError, describe_job, launch_local, launch_slurm
from jobs.options import TASKS, collect_layers, stage_parser
from jobs.runs import is_finished, newest_checkpoint
from jobs.slurm import SubmitError
from jobs.snapshot import SnapshotError, read_code
from nepa_dist.config import Config, nearest
from nepa_dist.report import build_report

HELP = """\
usage: python jobs/submit.py COMMAND ... (each has its own --help)

examples:
  python jobs/submit.py pretrain vit_tiny --data digits                  train on this machine, with embedded data
  python jobs/submit.py pretrain vit_b --data /data/imagenet --gpus-per-node 8
  python jobs/submit.py pretrain vit_l --nodes 8 --dry-run               64 GPUs: cost, steps, memory; starts nothing
  python jobs/submit.py pretrain vit_s --data digits --config configs/ablate/no_shift.yaml --name no-shift
  python jobs/submit.py pretrain vit_s --data digits --set optim.base_lr=1e-3 --set steps=500
  python jobs/submit.py pipeline vit_tiny --data digits                  pretrain, then fine-tune and segment from it
  python jobs/submit.py sweep objective_digits                           variants of a pipeline, compared in a table

other commands:
  python jobs/submit.py probe RUN                                        what the features of a pretraining run are worth
  python jobs/submit.py prepare SOURCE OUT [--array 16]                  pack a data set into shards, here or as SLURM jobs
  python jobs/submit.py watch RUN                                        its curves, in the terminal
  python jobs/submit.py doctor --data DATA                               can this node feed its GPUs with this data?
  python jobs/submit.py doctor --nodes N                                 are these nodes fit to train together, or which is bad?
  python jobs/submit.py status [RUN ...]                                 where each run stands, and why
  python jobs/submit.py logs RUN [-f] [--rank R]                         what it says
  python jobs/submit.py stop RUN | cancel RUN | resume RUN               save and end | end at once | go on

The same command again resumes the run. Exit codes: 0 finished, 75 stopped after saving, 2 a mistake to correct, others failed.
"""
COMMANDS = (*TASKS, "pipeline", "sweep", "probe", "prepare", "status", "logs", "cancel", "stop", "resume", "watch", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Check, then start or describe a run; or measure or prepare its data.

    Args:
        argv: arguments; default: the command line.

    Returns:
        Exit code: 2 if anything is wrong, 0 after a dry run, otherwise that of :func:`jobs.cluster.run_local`,
        :func:`jobs.doctor.main` or :func:`jobs.prepare.main`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else USER_ERROR
    try:
        return _call(argv[0], argv[1:])
    except (SnapshotError, SubmitError) as error:  # of --print, which runs no checks of the place
        return refuse([str(error)])


def _call(command: str, rest: Sequence[str]) -> int:
    if command in TASKS:
        return run_stage(command, rest)
    if command == "pipeline":
        code, problems = pipeline.main(rest)
        return refuse(problems) if problems else code
    if command == "sweep":
        code, problems = sweep.main(rest)
        return refuse(problems) if problems else code
    if command == "probe":
        code, problems = probe.main(rest)
        return refuse(problems) if problems else code
    if command in ("logs", "cancel", "stop", "resume"):
        code, problems = control.main(command, rest)
        return refuse(problems, "done") if problems else code
    if command == "status":
        return status.main(rest)
    if command == "watch":
        from jobs import watch

        return watch.main(rest)
    if command == "doctor":
        if any(word.partition("=")[0] == "--nodes" for word in rest):
            return doctor_nodes.main(rest)
        from jobs import doctor

        return doctor.main(rest)
    if command == "prepare":
        from jobs import prepare

        return prepare.main(rest)
    return refuse([f"unknown command {command!r}{nearest(command, COMMANDS)} (known: {', '.join(COMMANDS)})"])


def run_stage(task: str, argv: Sequence[str]) -> int:
    """Check, then start or describe a run of one task; returns the exit code."""
    args = stage_parser(task).parse_args(argv)
    layers, problems = collect_layers(args)
    checked = check_stage(args, layers)
    if args.check:
        return show_checks(problems, checked)
    problems += checked.problems
    config = checked.config
    if config is None or problems:
        return refuse(problems)
    if args.dry_run:
        state = "exists, would be resumed" if (config.run_dir / "config.yaml").exists() else "new"
        notes = [checked.note, *(finding.text for finding in checked.findings if finding.kind == "note")]
        report = build_report(config, checked.num_samples, "\n".join(notes))
        _print_report([f"Run folder: {config.run_dir} ({state})", *checked.changes, "", report])
        return 0
    if args.print:
        _print_report(describe_job(config, read_code(args.include)))
        return 0
    try:
        return start(config, checked, args.include)
    except LaunchError as error:
        return refuse([str(error)])


def start(config: Config, checked: Checked, include: Sequence[str]) -> int:
    """Start a run that has passed its checks, here or as a job; returns the exit code.

    Raises:
        LaunchError: it could not be started.
    """
    if config.cluster.launcher == "local":
        return launch_local(config, checked.changes)
    run_dir = config.run_dir
    if is_finished(run_dir, checked.steps):
        print(f"this run is finished: {run_dir} holds all {newest_checkpoint(run_dir)} steps; nothing was submitted")
        return 0
    number = launch_slurm(config, read_code(include))
    print("\n".join([f"submitted job {number}: {run_dir}", *checked.changes]))
    print(f"  python jobs/submit.py status {run_dir}\n  python jobs/submit.py logs -f {run_dir}")
    return 0


def show_checks(problems: Sequence[str], checked: Checked) -> int:
    """Print what every check says; returns 2 if one found a problem."""
    named = [*(Finding("problem", text, "options") for text in problems), *checked.findings]
    which = "checks" if checked.config else "checks (the others need settings that are in order)"
    wrong = sum(finding.kind == "problem" for finding in named)
    count = len({finding.check for finding in named})
    _print_report([*table(named), f"{count} {which}, {counted(wrong)}, nothing was started"])
    return USER_ERROR if wrong else 0


def refuse(problems: Sequence[str], what: str = "started") -> int:
    """Print a list of problems; returns the exit code for it."""
    lines = [f"{counted(len(problems))}, nothing was {what}:", *(f"  - {problem}" for problem in problems)]
    print("\n".join(lines), file=sys.stderr)
    return USER_ERROR


def _print_report(lines: Sequence[str]) -> None:
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted before anything was started")
