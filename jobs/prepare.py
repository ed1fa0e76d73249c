"""Prepare a data set here, or with SLURM: a job array writes the shards, and a job after it verifies them.

The plan is always made here, so that mistakes are answered before anything is queued. What the user writes reaches a job as
quoted words of one command, and a directive of sbatch only if it has the form that is expected there. The same command again
after a failure goes on: shards that are finished stay.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep import cli
from jobs.cluster import REPO_ROOT, USER_ERROR
from nepa_dist.config_cluster import PATTERNS, is_hostile

LOGS = "logs"
"""In OUT, beside the folders of the splits: what the jobs print."""

_SOURCE_OPTIONS = ("split", "kind", "val_labels", "image_column", "label_column")
_PLAN_OPTIONS = ("container", "policy", "shards", "shard_mb", "seed", "name", "skip_bad_list", "max_bad")
_FORMS = {name: PATTERNS[name] for name in ("partition", "account", "qos", "time", "mem")}
"""Option whose text goes into a directive -> (what it must match as a whole, the same in words)."""
_NEED_ARRAY = (*_FORMS, "cpus_per_task", "print")
_CPUS = 4
_VARIABLES = {"array": "ARRAY_INX", "time": "TIMELIMIT", "mem": "MEM_PER_NODE"}


class Job(NamedTuple):
    """What sbatch is given."""

    directives: list[str]
    """Options, each with its value."""
    words: list[str]
    """The command; ``--workers`` with the cores of the job is added."""

    def script(self) -> str:
        """The batch script."""
        directives = "".join(f"#SBATCH {directive}\n" for directive in self.directives)
        command = f'exec {shlex.join(self.words)} --workers "$SLURM_CPUS_PER_TASK"'
        return f"#!/bin/bash\n{directives}export {_python_path()}\n{command}\n"


class Work(NamedTuple):
    """The command that plans, and the two jobs that follow."""

    plan: list[str]
    """Arguments of ``python -m data_prep``."""
    logs: Path
    """Working folder of the jobs."""
    write: Job
    verify: Job


class SubmitError(RuntimeError):
    """sbatch did not take a job."""


def main(argv: Sequence[str]) -> int:
    """The command line.

    Args:
        argv: arguments after ``prepare``.

    Returns:
        0; 2 for a mistake of the user, with nothing submitted; 1 where something is damaged, or where sbatch refuses; 130 if
        interrupted. Without ``--array`` that of :func:`data_prep.cli.main`.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.array is None and not (given := _given(args)):
        return cli.main(["prepare", *argv])
    problems = [f"{option} is about jobs: give --array too, or leave it out" for option in given] if args.array is None else []
    problems += list(_job_problems(args))
    work = None
    if not problems:
        work = plan_jobs(args, parser)
        problems += _text_problems(work)
    if not problems and not args.print and not shutil.which("sbatch"):
        problems.append(
            "sbatch is not on PATH: use a login node of the cluster, --print to see the jobs, or no --array to work here"
        )
    if work is None or problems:
        print("\n".join(["nothing was submitted:", *(f"  - {problem}" for problem in problems)]), file=sys.stderr)
        return USER_ERROR
    if args.print:
        print(as_shell(work), end="")
        return 0
    return cli.main(work.plan) or submit(work)


def plan_jobs(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Work:
    """What the options ask for.

    Args:
        args: parsed, without problems.
        parser: that they came from, for the defaults.
    """
    places = [os.path.abspath(args.source), os.path.abspath(args.out)]

    def words(names: Sequence[str]) -> Iterator[str]:
        for name in names:
            value = getattr(args, name)
            if value != parser.get_default(name):  # jobs have another working folder
                yield f"{_option(name)}={os.path.abspath(value) if isinstance(value, Path) else value}"

    source = list(words(_SOURCE_OPTIONS))
    quiet = ["--quiet"] if args.quiet else []
    common = ["--nodes=1", "--ntasks=1", f"--cpus-per-task={args.cpus_per_task or _CPUS}"]
    common += [f"--{name}={value}" for name in _FORMS if (value := getattr(args, name)) is not None]
    common += ["--open-mode=append", "--requeue"]  # a task that lost its node goes on in the same log
    program = [sys.executable, "-P", "-m", "data_prep"]
    return Work(
        plan=["plan", *source, *words(_PLAN_OPTIONS), *places],
        logs=Path(places[1], LOGS),
        write=Job(
            ["--job-name=nepa-prepare", f"--array=0-{args.array - 1}", "--output=write-%A_%a.txt", *common],
            [*program, "write", *source, *quiet, *places],
        ),
        verify=Job(
            ["--job-name=nepa-verify", "--output=verify-%j.txt", *common],
            [*program, "verify", "--level=hash", *quiet, places[1]],
        ),
    )


def as_shell(work: Work) -> str:
    """A shell script that does what submitting does, with both batch scripts in full."""
    plan = shlex.join([sys.executable, "-P", "-m", "data_prep", *work.plan])
    logs = shlex.quote(str(work.logs))
    return f"""\
#!/bin/bash
set -eu
{_python_path()} {plan}
mkdir -p {logs}
cd {logs}
unset {" ".join(_overriding(work.write))}
job=$(sbatch --parsable <<'END'
{work.write.script()}END
)
sbatch --parsable {_after('"${job%%;*}"')} <<'END'
{work.verify.script()}END
"""


def submit(work: Work) -> int:
    """Give both jobs to sbatch; returns 0, or 1 after saying what was not submitted."""
    try:
        work.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: no folder for the logs of the jobs: {error}\nnothing was submitted", file=sys.stderr)
        return 1
    try:
        array = _sbatch(work.write, work.logs)
    except (SubmitError, OSError) as error:
        print(f"error: {error}\nnothing was submitted", file=sys.stderr)
        return 1
    try:
        last = _sbatch(work.verify, work.logs, *shlex.split(_after(array)))
    except (SubmitError, OSError) as error:
        command = shlex.join(work.verify.words)
        print(
            f"error: {error}\njob {array} writes the shards, but nothing verifies them after it:\n  {command}", file=sys.stderr
        )
        return 1
    print(f"job {array} writes the shards, then job {last} verifies them; what they print: {work.logs}")
    print(f"they are done when job {last} has ended well; after a failure the same command goes on: squeue -j {array},{last}")
    return 0


def _sbatch(job: Job, logs: Path, *more: str) -> str:
    """Submit; returns the job's number."""
    environment = {name: value for name, value in os.environ.items() if name not in _overriding(job)}
    command = ["sbatch", "--parsable", *more]  # its messages go to the user as they are
    done = subprocess.run(command, input=os.fsencode(job.script()), stdout=subprocess.PIPE, cwd=logs, env=environment)
    answer = done.stdout.decode(errors="replace").strip().split(";")[0]
    if done.returncode:
        raise SubmitError(f"sbatch refused the job (exit code {done.returncode})")
    if not re.fullmatch("[0-9]+", answer):
        raise SubmitError(f"sbatch answered {answer!r}, which is no job number")
    return answer


def _after(job: str) -> str:
    return f"--dependency=afterok:{job} --kill-on-invalid-dep=yes"


def _overriding(job: Job) -> list[str]:
    """Variables of the environment that sbatch would follow instead of the directives of a job."""
    names = [directive[2:].partition("=")[0] for directive in job.directives]
    return [f"SBATCH_{_VARIABLES.get(name, name.upper().replace('-', '_'))}" for name in names]


def _python_path() -> str:
    return f"PYTHONPATH={shlex.quote(str(REPO_ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _given(args: argparse.Namespace) -> list[str]:
    """Options that make sense with ``--array`` alone."""
    return [_option(name) for name in _NEED_ARRAY if getattr(args, name) not in (None, False)]


def _job_problems(args: argparse.Namespace) -> Iterator[str]:
    """Sentences about the options of jobs."""
    for name in ("array", "cpus_per_task"):
        value = getattr(args, name)
        if value is not None and value < 1:
            yield f"{_option(name)} {value}: at least 1 is needed"
    for name, (pattern, meaning) in _FORMS.items():
        value = getattr(args, name)
        if value is not None and not re.fullmatch(pattern, value, re.ASCII):
            yield f"{_option(name)} {value!r}: it must be {meaning}"
    if args.array is not None and args.workers is not None:
        yield "--workers is for work here; a job has one worker per core: use --cpus-per-task"


def _text_problems(work: Work) -> Iterator[str]:
    """Sentences about characters that have no place in a job script: they could hide what it does, or end a line."""
    folder = os.path.realpath(work.logs.parent)
    if "%" in folder or "\\" in folder:  # the patterns of --output hold in the working folder too, behind which it is put
        yield f"{folder}: SLURM does not take the characters % and \\ of a log's path as they are; rename OUT"
    # Each of the user's words is in one of these.
    for text in dict.fromkeys([*work.plan, *work.write.words, str(REPO_ROOT)]):
        if is_hostile(text):
            yield f"{text!r} has a control character, a line break, or bytes that are no UTF-8; no job script may hold them"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python jobs/submit.py prepare",
        description="Plan, write and verify a prepared data set, here or as jobs; the same command again goes on.",
        allow_abbrev=False,
    )
    cli.add_prepare_options(parser)
    jobs = parser.add_argument_group("as jobs of SLURM", "The plan is made here, the rest by jobs; OUT must be in their reach.")
    jobs.add_argument("--array", type=int, metavar="N", help="write with N tasks, then verify in one more job")
    jobs.add_argument("--cpus-per-task", type=int, metavar="C", help=f"cores, and workers, of a task; default: {_CPUS}")
    jobs.add_argument("--partition", metavar="P", help="default: the cluster's")
    jobs.add_argument("--account", metavar="A", help="default: the cluster's")
    jobs.add_argument("--qos", metavar="Q", help="default: the cluster's")
    jobs.add_argument("--time", metavar="T", help="limit of a job, such as 2:00:00; default: the cluster's")
    jobs.add_argument("--mem", metavar="M", help="memory of a task, such as 16G; default: the cluster's")
    jobs.add_argument("--print", action="store_true", help="show the jobs as a shell script; plan and submit nothing")
    return parser
