"""Start the processes (ranks) of a run on this machine and wait for them.

The launcher stays alive as long as its ranks: it forwards signals to them, ends all when one fails, and turns their exit codes
into one. A rank that the launcher started dies with it (see ``jobs.runner.die_with_launcher``).

Exit codes of a rank and of the whole run: 0 finished, 75 stopped after saving (run the same command again), any other failed.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from nepa_dist.guard import EXIT_AGAIN, EXIT_DONE, STOP_SIGNALS

USER_ERROR = 2
"""Exit code of a rank that found a mistake in the configuration or the data."""
REPO_ROOT = Path(__file__).resolve().parents[1]
LAUNCHER_PID = "NEPA_LAUNCHER_PID"
"""Environment variable with the process id of the launcher, for ranks that must die with it."""
POLL_SECONDS = 0.05
TAIL_LINES = 20


class Rank(NamedTuple):
    """One started process."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path | None
    """Its output; None where it writes to the launcher's terminal."""
    log_start: int
    """Bytes that were in the log before this start."""


def run_local(
    run_dir: str | Path,
    world_size: int,
    *,
    command: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    grace_seconds: float = 30.0,
) -> int:
    """Run all ranks of one node as processes of this machine and wait until they have ended.

    Rank 0 shares the launcher's output, rank N writes to ``run_dir/logs/rank-N.txt``. Each rank has a session of its own, so
    that a Ctrl-C reaches it once, through the launcher. Must be called from the main thread, which receives the signals.

    Args:
        run_dir: folder of the run, which holds config.yaml.
        world_size: number of ranks, > 0.
        command: what each rank executes; default: ``python -m jobs.runner RUN_DIR``.
        env: environment that the ranks' variables are added to; default: this process's.
        grace_seconds: time between SIGTERM and SIGKILL for the other ranks after one has failed.

    Returns:
        0 when all ranks returned 0; 75 when one returned 75, or was ended by its watchdog, before any failed; otherwise the
        exit code of the rank that failed first, or 1 if a signal ended it.
    """
    run_dir = Path(run_dir).absolute()
    # -P keeps the working folder out of sys.path: a folder named jobs there must not be taken for ours.
    command = command or [sys.executable, "-P", "-m", "jobs.runner", str(run_dir)]
    received: deque[int] = deque()
    ranks: list[Rank] = []
    previous = _receive_signals(received)
    try:
        port = free_port()
        for number in range(world_size):
            environment = rank_environment(number, world_size, port, os.environ if env is None else env)
            ranks.append(_start(number, command, environment, run_dir / "logs"))
        return _wait(ranks, received, grace_seconds)
    finally:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.kill()
                rank.process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that no process listens on at this moment.

    Below the range that the kernel hands out by itself, so that no passing connection takes it before rank 0 does.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def rank_environment(rank: int, world_size: int, port: int, base: Mapping[str, str]) -> dict[str, str]:
    """Environment of one rank on a single node: torch.distributed's variables, threads, and where the code is.

    Args:
        rank: 0 <= rank < world_size.
        world_size: number of ranks on this machine.
        port: TCP port on which rank 0 meets the others.
        base: environment to start from; OMP_NUM_THREADS and OMP_WAIT_POLICY in it are kept.
    """
    cores = len(os.sched_getaffinity(0))
    path = [str(REPO_ROOT), *filter(None, [base.get("PYTHONPATH")])]
    return {
        "OMP_NUM_THREADS": str(max(1, cores // world_size)),
        # Threads that spin while they wait take the cores from loader workers and neighbours: measured 10 times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
        **base,
        "PYTHONPATH": os.pathsep.join(path),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHER_PID: str(os.getpid()),
    }


def environment_from_srun(env: Mapping[str, str]) -> dict[str, str]:
    """What torch.distributed wants to know, from the variables that srun gives to each task.

    Args:
        env: of this process.

    Returns:
        RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR (the first node of the step) and MASTER_PORT (the same for
        all ranks of the job); empty outside of srun, or where a launcher has set RANK.
    """
    if "RANK" in env or "SLURM_PROCID" not in env:
        return {}
    tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
    per_node = expand_counts(env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", tasks)))
    node = int(env.get("SLURM_NODEID", "0"))
    job, step = int(env.get("SLURM_JOB_ID", "0")), int(env.get("SLURM_STEP_ID", "0"))
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(per_node[node] if node < len(per_node) else per_node[-1]),
        "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", ""))),
        "MASTER_PORT": env.get("MASTER_PORT") or str(20000 + (job * 16 + step) % 12000),
    }


def first_host(nodes: str) -> str:
    """First name of a list of nodes as SLURM writes it: ``gpu[007-012,020],login1`` gives ``gpu007``; this machine if empty."""
    head = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    assert head is not None  # every part may be empty
    return "".join(part or "" for part in head.groups()) or "127.0.0.1"


def expand_counts(text: str) -> list[int]:
    """Tasks per node as SLURM writes it: ``4(x2),3`` gives [4, 4, 3]."""
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeat or 1)
    return counts or [1]


def _start(number: int, command: Sequence[str], env: Mapping[str, str], log_dir: Path) -> Rank:
    if number == 0:
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
        return Rank(number, process, None, 0)
    log_dir.mkdir(parents=True, exist_ok=True)
    path = log_dir / f"rank-{number}.txt"
    with path.open("ab") as log:
        log.write(f"--- started {datetime.now(UTC).isoformat(timespec='seconds')}\n".encode())
        log.flush()
        start = log.tell()
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Rank(number, process, path, start)


def _receive_signals(received: deque[int]) -> dict[int, signal._HANDLER]:
    """Collect signals in ``received`` and return the handlers that were there before."""

    def remember(number: int, _: FrameType | None) -> None:
        received.append(number)

    previous: dict[int, signal._HANDLER] = {number: signal.signal(number, remember) for number in STOP_SIGNALS}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it, and then so do we
        # A closed terminal would end the launcher, and with it the ranks, before they have saved: ask them to stop instead.
        previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: received.append(signal.SIGTERM))
    return previous


def _wait(ranks: Sequence[Rank], received: deque[int], grace_seconds: float) -> int:
    """Wait until all ranks have ended; when one fails or stops alone, end the others. Returns the exit code of the run."""
    failed: list[Rank] = []
    stranded: set[int] = set()
    kill_at = float("inf")
    while True:
        codes = [_exit_code(rank) for rank in ranks]
        running = [rank for rank, code in zip(ranks, codes, strict=True) if code is None]
        if EXIT_AGAIN in codes and not failed:
            # It was asked to stop before it had joined the others, or it hung. They wait for it in vain, or fail without it.
            stranded = {rank.number for rank in ranks}
            if running and kill_at == float("inf"):
                kill_at = time.monotonic() + grace_seconds
        if not failed:
            ended = [rank for rank, code in zip(ranks, codes, strict=True) if code not in (None, EXIT_DONE, EXIT_AGAIN)]
            failed = [rank for rank in ended if rank.number not in stranded]
            if failed:
                # One that a signal ended did not fail because another went away; an error may have that reason.
                # A mistake of the user's on one rank makes the others lose it.
                failed.sort(key=lambda rank: (rank.process.returncode > 0, rank.process.returncode != USER_ERROR))
                _report(failed, len(running), grace_seconds)
                _send(running, signal.SIGTERM)
                kill_at = time.monotonic() + grace_seconds
        if not running:
            break
        while received:
            _send(running, received.popleft())
        if time.monotonic() > kill_at:
            _send(running, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    if failed:
        first = failed[0]
        # Once more, at the end: the errors of the ranks that lost it may have come in between.
        print(f"the run failed: rank {first.number} {describe_exit(first.process.returncode)}", file=sys.stderr, flush=True)
        return max(1, failed[0].process.returncode)
    return EXIT_AGAIN if any(rank.process.returncode != EXIT_DONE for rank in ranks) else EXIT_DONE


def _exit_code(rank: Rank) -> int | None:
    """Exit code so far; 75 also for a signal's default action that asks for another start.

    A stop signal has it until the rank has its handlers, SIGALRM when the watchdog ends a rank in which no Python runs.
    """
    code = rank.process.poll()
    return EXIT_AGAIN if code is not None and -code in (*STOP_SIGNALS, signal.SIGALRM) else code


def _send(ranks: Sequence[Rank], number: int) -> None:
    for rank in ranks:
        rank.process.send_signal(number)  # does nothing if the process has ended


def _report(failed: Sequence[Rank], num_running: int, grace_seconds: float) -> None:
    lines = []
    for rank in failed:
        lines.append(f"rank {rank.number} {describe_exit(rank.process.returncode)}")
        if rank.log is None:
            lines[-1] += "; its output is above"
        else:
            lines[-1] += f"; the end of {rank.log}:"
            with rank.log.open("rb") as log:
                lines += [f"    {line}" for line in _tail(log, rank.log_start)]
    if num_running:
        lines.append(f"the other {num_running} running ranks are asked to stop and are killed after {grace_seconds:g} s")
    print("\n".join(lines), file=sys.stderr, flush=True)


def _tail(log: IO[bytes], start: int) -> list[str]:
    """Last lines after byte ``start``; at most the last 16 KiB are read."""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(start, size - 16384))
    return log.read().decode(errors="replace").splitlines()[-TAIL_LINES:]


def describe_exit(code: int) -> str:
    """How a process ended, in words, from :attr:`subprocess.Popen.returncode`."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (often: out of memory)" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"
