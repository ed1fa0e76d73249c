"""What SLURM knows: queue, record of jobs, partitions, accounts. Each question is one call of a command, with a time limit."""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from typing import NamedTuple

TIMEOUT_SECONDS = 20.0
ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STOPPED", "SIGNALING")


class QueueEntry(NamedTuple):
    """A job that is waiting or running."""

    state: str
    """In SLURM's words: PENDING, RUNNING, ..."""
    reason: str
    """Why it waits."""
    nodes: str
    end: str
    """When it will be ended by its time limit, or N/A."""


class Partition(NamedTuple):
    """Nodes of one kind in one partition."""

    name: str
    is_up: bool
    minutes: float
    """Time limit; infinity if there is none."""
    nodes: int
    cores: int
    """Per node."""
    memory_megabytes: int
    """Per node."""
    gpus: int
    """Per node; 0 if it has none."""


class SchedulerError(RuntimeError):
    """A command of SLURM did not answer; the message says which, and what it said."""


def ask(*command: str) -> str:
    """Output of a command of SLURM.

    Raises:
        SchedulerError: it is not installed, fails, or does not answer.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, errors="replace")
    except FileNotFoundError:
        raise SchedulerError(f"{command[0]} is not on PATH") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SchedulerError(f"{command[0]}: {error}") from None
    if done.returncode:
        raise SchedulerError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout


def is_here() -> bool:
    """Whether this machine can talk to a cluster at all."""
    return shutil.which("sbatch") is not None


def queue() -> dict[str, QueueEntry]:
    """Jobs of this user that wait or run, by number; tasks of an array as ``17_3``.

    Raises:
        SchedulerError: squeue does not answer.
    """
    entries: dict[str, QueueEntry] = {}
    for line in ask("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r|%N|%e").splitlines():
        number, *fields = line.split("|")
        if len(fields) == 4:
            entries[number] = QueueEntry(*fields)
    return entries


def final_states(numbers: Iterable[str]) -> dict[str, str]:
    """State of jobs that are over, such as COMPLETED or NODE_FAIL, from the accounting; those it does not know are left out.

    Raises:
        SchedulerError: sacct does not answer, as on a cluster without accounting.
    """
    wanted = ",".join(numbers)
    if not wanted:
        return {}
    lines = ask("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={wanted}", "--format=JobID,State").splitlines()
    pairs = [line.split("|", 1) for line in lines if "|" in line]
    return {number: state.split()[0] for number, state in pairs if state}


def cancel(number: str, signal_name: str | None = None) -> None:
    """End a job, or send a signal to its ranks.

    Raises:
        SchedulerError: scancel refuses.
    """
    ask("scancel", *([f"--signal={signal_name}"] if signal_name else []), number)


def partitions() -> list[Partition]:
    """All of them, one entry per kind of node.

    Raises:
        SchedulerError: sinfo does not answer.
    """
    found = []
    for line in ask("sinfo", "--noheader", "--format=%R|%a|%l|%D|%c|%m|%G").splitlines():
        fields = line.split("|")
        if len(fields) != 7:
            continue
        name, available, limit, nodes, cores, memory, gres = fields
        gpus = sum(int(number) for number in re.findall(r"gpu:(?:[^:,(]+:)?(\d+)", gres))
        sizes = [int(re.sub(r"\D.*", "", text) or 0) for text in (nodes, cores, memory)]  # 8+ where nodes differ
        found.append(Partition(name, available == "up", minutes(limit), sizes[0], sizes[1], sizes[2], gpus))
    return found


def default_partition() -> str | None:
    """Name of the partition that jobs without one go to.

    Raises:
        SchedulerError: sinfo does not answer.
    """
    names = [line.strip() for line in ask("sinfo", "--noheader", "--format=%P").splitlines()]
    return next((name.rstrip("*") for name in names if name.endswith("*")), None)


def accounts() -> dict[str, set[str]]:
    """Accounts that this user may charge -> their qualities of service; empty where no associations are kept.

    Raises:
        SchedulerError: sacctmgr does not answer.
    """
    user = getpass.getuser()
    found: dict[str, set[str]] = {}
    command = ("sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}", "format=account,qos")
    for line in ask(*command).splitlines():
        account, _, qos = line.partition("|")
        if account:
            found.setdefault(account, set()).update(filter(None, qos.split(",")))
    return found


def minutes(text: str) -> float:
    """A time limit in SLURM's words, minutes: ``30``, ``1:00:00``, ``2-00``, ``2-00:00:00``, ``infinite``."""
    days, dash, rest = text.strip().rpartition("-")
    if not re.fullmatch(r"[0-9]+(:[0-9]+){0,2}", rest) or (dash and not days.isdigit()):
        return float("inf")
    parts: Sequence[int] = [int(part) for part in rest.split(":")]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, mins, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, mins, seconds = parts
    else:  # minutes[:seconds]
        hours, mins, seconds = 0, *[*parts, 0][:2]
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60
