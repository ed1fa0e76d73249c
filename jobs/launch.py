"""Starts a run that has passed its checks: here, or as a job of SLURM."""

from __future__ import annotations

import fcntl
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from jobs import cluster
from jobs.options import with_value
from jobs.runs import JOB, clear_outcome, read_json
from jobs.slurm import Job, SubmitError, batch_script, job_of, rank_environment_text, submit
from jobs.snapshot import CODE, Snapshot, write_snapshot
from nepa_dist.config import Config
from nepa_dist.guard import EXIT_AGAIN
from nepa_dist.run_folder import SNAPSHOT, write_text


class LaunchError(RuntimeError):
    """Nothing was started; the message says why."""


def launch_local(config: Config, changes: Sequence[str] = ()) -> int:
    """Write the configuration into the run folder and run all ranks here.

    Args:
        config: a configuration without problems.
        changes: lines about settings that differ from those of the run in that folder, to be printed.

    Returns:
        The exit code of the run.

    Raises:
        LaunchError: the folder cannot be written, or a run is going on in it.
    """
    run_dir = config.run_dir
    path = run_dir / "config.yaml"
    try:
        make_private(run_dir)
        with locked(run_dir):
            print("\n".join([f"{'resuming' if path.exists() else 'starting'} {run_dir}", *changes]), flush=True)
            config = with_value(config, "cluster.snapshot", None)
            write_text(path, config.to_yaml())
            clear_outcome(run_dir)
            code = cluster.run_local(run_dir, config.cluster.world_size)
    except BlockingIOError:
        raise LaunchError(f"a run is going on in {run_dir}; wait for it, stop it, or choose another --name") from None
    except OSError as error:
        raise LaunchError(f"cannot start in {run_dir}: {error}") from None
    if code == EXIT_AGAIN:
        print(f"stopped before the end; the same command continues {run_dir} from its newest checkpoint", file=sys.stderr)
    return code


def launch_slurm(config: Config, snapshot: Snapshot, *, folder: Path | None = None, after: str = "") -> str:
    """Write code and configuration into the run folder and submit the run as a job; returns the job's number.

    Args:
        config: a configuration without problems.
        snapshot: the code.
        folder: of a pipeline, which holds the code and the run; default: that of the run.
        after: condition that the job waits for, such as afterok:17.

    Raises:
        LaunchError: the folder cannot be written, SLURM refuses the job, or a run is going on in the folder.
    """
    run_dir, folder = config.run_dir, folder or config.run_dir
    try:
        make_private(run_dir)
        with locked(run_dir):
            code = write_snapshot(snapshot, folder)
            prepare_run(config, snapshot)
            job = job_of(config, code, folder, after)
            number = submit(job)
            note_job(job, run_dir, number)
    except BlockingIOError:
        raise LaunchError(f"another launcher is at work in {run_dir}; try again, or choose another --name") from None
    except SubmitError as error:
        raise LaunchError(str(error)) from None
    except OSError as error:
        raise LaunchError(f"cannot start in {run_dir}: {error}") from None
    return number


def prepare_run(config: Config, snapshot: Snapshot) -> None:
    """Write the configuration that a job will read; it names the code.

    Raises:
        OSError: the folder cannot be written.
    """
    make_private(config.run_dir)
    write_text(config.run_dir / "config.yaml", with_value(config, "cluster.snapshot", snapshot.digest).to_yaml())


def resubmit(config: Config) -> tuple[str, Path]:
    """Submit a run that was a job again, with the code that it had; returns the job's number and the code.

    Raises:
        LaunchError: the code is gone, the folder cannot be written, or SLURM refuses the job.
    """
    run_dir = config.run_dir
    code = Path(str(read_json(run_dir / JOB / "job.json").get("code", "")))
    if not (code / SNAPSHOT).exists():
        raise LaunchError(f"{run_dir} has no code of its own any more: give the command again that submitted it")
    try:
        with locked(run_dir):
            job = job_of(config, code, code.parents[1])
            number = submit(job)
            note_job(job, run_dir, number)
    except BlockingIOError:
        raise LaunchError(f"another launcher is at work in {run_dir}; try again") from None
    except (SubmitError, OSError) as error:
        raise LaunchError(f"cannot start in {run_dir}: {error}") from None
    return number, code


def describe_job(config: Config, snapshot: Snapshot) -> list[str]:
    """The batch script of a run and what its ranks find, as text."""
    if config.cluster.launcher == "local":
        environment = cluster.rank_environment(0, config.cluster.world_size, 20000, {})
        command = shlex.join([sys.executable, "-P", "-m", "jobs.runner", str(config.run_dir)])
        lines = [f"{name}={value}" for name, value in sorted(environment.items()) if name != cluster.LAUNCHER_PID]
        return [f"{config.cluster.world_size} processes of this machine:", command, "", "the first has:", *lines]
    job = job_of(config, config.run_dir / CODE / snapshot.digest[:12])
    return [batch_script(job) + "\n\n" + rank_environment_text(job)]


def note_job(job: Job, run_dir: Path, number: str) -> None:
    """Write down which job a run has."""
    facts = {"id": number, "code": str(job.code), "log": str(job.log_of(number))}
    facts["submitted"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_text(run_dir / job.record / "job.json", json.dumps(facts, indent=1) + "\n")


def make_private(folder: Path) -> None:
    """Make a folder that only its owner can look into, with those above it."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep a second launcher out of a run folder; the kernel gives the lock back when this process ends.

    Raises:
        BlockingIOError: another launcher holds it.
    """
    with (run_dir / ".launcher.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
